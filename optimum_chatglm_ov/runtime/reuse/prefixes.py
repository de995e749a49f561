# SPDX-License-Identifier: Apache-2.0
"""Beginnings of prompts that an engine need not compute, because it, or a store, has their keys and values."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from ...architectures.architecture import Architecture
from ...native.library import block_tokens
from ..engine import FusedEngine, HeldTokens, is_counted
from ..inputs import Call
from .rows import Span, clear_padding, read_blocks, write_blocks
from .stores import Store


# Blocks of the caches that one entry of a store has: prompts share what is equal in whole entries.
_BLOCKS_TOGETHER = 2


@dataclass(frozen=True)
class Entry:
    """What a store keeps together; its key tells the model, these tokens, and all tokens before them."""

    key: bytes
    span: Span


class Prefixes:
    """Lets an engine begin a prompt with what is known of it, and keeps what it has computed.

    Tokens that see only those before them are kept in pieces, so that prompts with one beginning share its pieces. The
    context of a chatglm-6b prompt is one piece: all of its tokens see each other.
    """

    def __init__(self, engine: FusedEngine, architecture: Architecture, store: Store, model: bytes):
        """
        Args:
            engine: what begins prompts.
            architecture: that of its model.
            store: keeps what the engine does not hold any more; where it is lasting, also what it holds.
            model: tells apart whatever may not share keys and values.
        """
        self.engine, self.store = engine, store
        self._architecture, self._model = architecture, model
        self._prefix_tokens = engine.state.layout.prefix_tokens
        self._piece = _BLOCKS_TOGETHER * block_tokens()
        self._sequences: object | None = None  # that were begun here
        self._pieces_kept = 0  # of them

    def begin(self, call: Call, most: int) -> int:
        """Begins the sequences of a call with what is known of them.

        Args:
            call: of new sequences.
            most: tokens of each row, padding included, that need not be computed.

        Returns:
            Tokens of each row that the engine holds now. If there are none, it is as it was.
        """
        if most <= 0 or not is_counted(call.attention_mask, call.position_ids):
            self.keep()
            return 0
        wanted = HeldTokens(call.input_ids, call.attention_mask)
        contexts = self._contexts(wanted, call.prompt_layout)
        live = self._continues(wanted, contexts, most)
        if live < self.engine.past_length:  # else all of it goes on, and needs no copy
            self.keep()
        found = [self._stored(wanted, contexts, row) for row in range(len(wanted.input_ids))]
        stored = self._begun(wanted, contexts, [len(entries) and entries[-1].span.last for entries in found], most)
        if stored > live:
            read = self._hold(wanted.first(stored), found)
            if contexts is not None:
                self.engine.write_state("prompt_layout", contexts)
            if (begun := self._begun(wanted, contexts, read, stored)) < stored:  # the rest is damaged
                self.engine.crop(begun)
            return begun
        if live:
            self.engine.go_on_as_others(live)
            self._sequences = self.engine.sequences  # to be kept even if the call fails
        return live

    def after_call(self, has_begun: bool, is_copied: bool = False) -> None:
        """Takes notice of a call that the engine has computed.

        Args:
            has_begun: whether it began sequences that are to be kept.
            is_copied: whether each becomes several beams now, of which nothing can be kept later.
        """
        engine = self.engine
        if has_begun:
            self._sequences, self._pieces_kept = engine.sequences, 0
        if is_copied:
            self.keep()
        elif self.store.is_lasting and engine.sequences is self._sequences:
            pieces = (self._prefix_tokens + engine.past_length) // self._piece
            if pieces != self._pieces_kept or has_begun:
                self.keep()
                self._pieces_kept = pieces

    def keep(self) -> None:
        """Puts what the engine holds, of sequences that were begun here, into the store."""
        engine, held = self.engine, self.engine.held
        if engine.sequences is not self._sequences or not engine.is_counted or not engine.past_length:
            return
        contexts = engine.read_rows("prompt_layout")
        for row in range(engine.batch_size):
            stored_row = engine.state.stored_row(row)
            if stored_row is None:  # beams
                continue
            entries = self._that_fit(self._entries(held, contexts, row))
            keys = [entry.key for entry in entries]
            self.store.used(keys)  # not to make room for what comes after them
            for entry in entries:
                if entry.key not in self.store:
                    blocks = read_blocks(engine.state, stored_row, int(held.padding[row]), entry.span)
                    self.store.put(entry.key, blocks)
            self.store.used(keys)

    # What is known --------------------------------------------------------------------------------------------------

    def _contexts(self, wanted: HeldTokens, prompt_layout: np.ndarray | None) -> np.ndarray | None:
        """Of each row, see `Architecture.context_of`."""
        if prompt_layout is not None:
            return prompt_layout
        contexts = [self._architecture.context_of(ids[pad:]) for ids, pad in zip(wanted.input_ids, wanted.padding)]
        return None if contexts[0] is None else np.stack(contexts)

    def _continues(self, wanted: HeldTokens, contexts: np.ndarray | None, most: int) -> int:
        """Tokens that the engine holds of a row without padding, and may go on from."""
        engine = self.engine
        if engine.sequences is not self._sequences or not engine.is_counted:
            return 0
        if not engine.batch_size == len(wanted.input_ids) == 1 or wanted.padding[0] or engine.held.padding[0]:
            return 0
        longest = min(most, engine.past_length)
        differ = np.flatnonzero(engine.held.input_ids[0, :longest] != wanted.input_ids[0, :longest])
        same = int(differ[0]) if len(differ) else longest
        if contexts is not None and not np.array_equal(engine.read_rows("prompt_layout"), contexts):
            return 0
        return same if contexts is None or same >= contexts[0, 0] else 0

    def _stored(self, wanted: HeldTokens, contexts: np.ndarray | None, row: int) -> list[Entry]:
        """The entries of the beginning of a row that the store has."""
        return list(takewhile(lambda entry: entry.key in self.store, self._entries(wanted, contexts, row)))

    def _begun(self, wanted: HeldTokens, contexts: np.ndarray | None, places: list[int], most: int) -> int:
        """Tokens of each row that are known, where each has so many places, prefix and no padding included."""
        tokens = np.maximum(np.array(places) - self._prefix_tokens, 0)
        begun = min(most, int((wanted.padding + tokens).min()))
        least = wanted.padding + (1 if contexts is None else contexts[:, 0])
        return begun if (begun >= least).all() else 0

    def _hold(self, held: HeldTokens, found: list[list[Entry]]) -> list[int]:
        """Lets the engine hold tokens, one entry after the other; returns the places of each row that were read."""
        state = self.engine.state
        self.engine.hold(held)
        places = []
        for row, padding in enumerate(held.padding.tolist()):
            if padding:
                clear_padding(state, row, padding)
            last, read = 0, []
            for entry in found[row]:
                blocks = self.store.get(entry.key, entry.span.shape(state.layout))
                if blocks is None:
                    break
                write_blocks(state, row, padding, entry.span, blocks)
                last = entry.span.last
                read.append(entry.key)
            self.store.used(read)
            places.append(last)
        return places

    def _that_fit(self, entries: list[Entry]) -> list[Entry]:
        """The first of them, which the store holds together."""
        sizes = np.cumsum([np.prod(entry.span.shape(self.engine.state.layout)) for entry in entries])
        return entries[: int(np.searchsorted(sizes, self.store.size, side="right"))]

    def _entries(self, held: HeldTokens, contexts: np.ndarray | None, row: int) -> list[Entry]:
        """What the tokens of a row make. A prefix of P-Tuning, which is the model's own, counts as tokens -1."""
        prefix = np.full(self._prefix_tokens, -1)
        ids = np.concatenate((prefix, held.input_ids[row, held.padding[row] :]))
        if contexts is not None:
            context = self._prefix_tokens + int(contexts[row, 0])
            key = hashlib.sha256(self._model + contexts[row].tobytes() + ids[:context].tobytes()).digest()
            return [Entry(key, Span(0, context))] if context <= len(ids) else []
        entries, key = [], self._model
        for first in range(0, len(ids) - self._piece + 1, self._piece):
            last = first + self._piece
            key = hashlib.sha256(key + ids[first:last].tobytes()).digest()
            entries.append(Entry(key, Span(first, last)))
        return entries
