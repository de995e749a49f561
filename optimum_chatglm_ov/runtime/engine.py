# SPDX-License-Identifier: Apache-2.0
"""A compiled model together with the keys and values it holds: one interface, whoever keeps them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import openvino as ov

from ..native.cache_state import FusedAttentionState
from ..native.fuse_attention import CacheLayout


LOGITS_TO_KEEP = "logits_to_keep"
"""Name of the i64 scalar input of a compiled model: how many last positions get logits, 0 for all."""


@dataclass(frozen=True)
class HeldTokens:
    """The tokens whose keys and values an engine holds.

    Attributes:
        input_ids, attention_mask: int64 `[B, past]`.
        is_counted: padding is on the left alone, and positions count the tokens behind it.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    is_counted: bool = True

    @classmethod
    def none(cls) -> HeldTokens:
        """No row, no token."""
        return cls(np.zeros((0, 0), np.int64), np.zeros((0, 0), np.int64))

    @property
    def padding(self) -> np.ndarray:
        """Tokens on the left of each row that are none, int64 `[B]`."""
        return (self.attention_mask == 0).sum(axis=1)

    @property
    def length(self) -> int:
        """Tokens of every row, padding included."""
        return self.input_ids.shape[1]

    def followed_by(self, inputs: Mapping[str, np.ndarray]) -> HeldTokens:
        """These and those of a call, see `Engine.run`."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"].copy()  # the caller's may change
        held = self if self.length else HeldTokens(ids[:, :0], mask[:, :0])
        # what is held was computed with the mask of then
        counted = held.is_counted and np.array_equal(mask[:, : held.length], held.attention_mask)
        counted = counted and is_counted(mask, inputs["position_ids"])
        return HeldTokens(np.concatenate((held.input_ids, ids), axis=1), mask, counted)

    def rows(self, beam_idx: np.ndarray) -> HeldTokens:
        """Those of rows `beam_idx`."""
        return HeldTokens(self.input_ids[beam_idx], self.attention_mask[beam_idx], self.is_counted)

    def first(self, length: int) -> HeldTokens:
        """The first `length` of every row."""
        return HeldTokens(self.input_ids[:, :length], self.attention_mask[:, :length], self.is_counted)


def is_counted(attention_mask: np.ndarray, position_ids: np.ndarray) -> bool:
    """Whether rows of a mask `[B, past + L]` go on with padding on the left alone, and positions `[B, L]` count.

    Of the past, the mask must have been found so before: a token after thousands costs little.
    """
    past = attention_mask.shape[1] - position_ids.shape[1]
    end = attention_mask[:, max(past - 1, 0) :].astype(np.int64)
    if ((end != 0) & (end != 1)).any() or (np.diff(end, axis=1) < 0).any():
        return False
    new = attention_mask[:, past:]
    counts = attention_mask[:, :past].sum(axis=1, keepdims=True) + new.cumsum(axis=1) - 1
    return bool((position_ids == counts)[new != 0].all())


class Engine(ABC):
    """Runs a compiled model and holds the keys and values of one batch of sequences, all of one length.

    `run` appends its tokens to the sequences. Between two calls of it `reorder`, `crop` and `reset` change what the
    next one goes on from. An engine is not to be used by two threads at once, nor two forks of one at the same time.
    """

    can_crop: ClassVar[bool]
    """Whether `crop` takes single tokens back."""

    def __init__(self, request: ov.InferRequest):
        self.request = request
        self.sequences = object()
        """Stands for the sequences that are held: another one after every `reset`."""
        self.held = HeldTokens.none()
        self._rows = np.zeros(0, np.int32)  # the row of the state variables that each row goes on from
        self._names = {name for port in request.model_inputs for name in port.names}

    @property
    def is_counted(self) -> bool:
        """Whether keys and values are those that its tokens always have: see `HeldTokens.is_counted`."""
        # an interrupt between two statements leaves other numbers of tokens
        return self.held.is_counted and self.held.length == self.past_length

    @property
    @abstractmethod
    def past_length(self) -> int:
        """Tokens of every row that are held, padding included."""

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Rows that are held."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Appends tokens to the sequences, begun anew if none are held.

        Args:
            inputs: `input_ids` and `position_ids` int64 `[B, L]`, `attention_mask` int64 `[B, past + L]`, and
                `logits_to_keep` int64 scalar; B is the number of rows held.

        Returns:
            Logits f32 `[B, L or logits_to_keep, vocab_size]`, a copy.
        """
        batch, new_tokens = inputs["input_ids"].shape
        if not self.past_length:
            self._rows = np.arange(batch, dtype=np.int32)
        self._prepare(batch, new_tokens)
        inputs = {**inputs, "beam_idx": self._rows}
        held = self.held.followed_by(inputs)
        self._infer({name: value for name, value in inputs.items() if name in self._names})
        self._rows = np.arange(batch, dtype=np.int32)  # rows are reordered once
        self._advance(new_tokens)
        self.held = held
        return self.request.get_tensor("logits").data.copy()

    def reorder(self, beam_idx: Sequence[int] | np.ndarray) -> None:
        """Row i goes on from what row `beam_idx[i]` holds; there may be more or fewer rows than before."""
        beam_idx = np.asarray(beam_idx, dtype=np.int64)
        self._rows = self._rows[beam_idx]
        if self.past_length:
            self.held = self.held.rows(beam_idx)

    @abstractmethod
    def crop(self, length: int) -> None:
        """Keeps the first `length` tokens of every row.

        Raises:
            ValueError: this engine cannot take single tokens back, or holds fewer.
        """

    def reset(self) -> None:
        """Forgets the sequences; memory is kept for the next ones."""
        self.request.reset_state()
        self.sequences = object()
        self.held = HeldTokens.none()
        self._rows = np.zeros(0, np.int32)

    def fork(self) -> Engine:
        """Another engine over the same compiled model, which holds a copy of the sequences."""
        other = self._empty(self.request.get_compiled_model().create_infer_request())
        if self.past_length:
            states = {state.name: state.state for state in self.request.query_state()}
            for state in other.request.query_state():
                state.state = states[state.name]
            other._rows = self._rows.copy()
            other.held = self.held
            other._copy(self)
        return other

    def release(self) -> None:
        """Forgets the sequences and gives their memory back; this engine is of no use any more."""
        self.sequences = object()
        self.request = None

    def read_state(self, name: str) -> np.ndarray | None:
        """Content of a small state variable that is no cache; `None` if the model has none of that name."""
        return next((state.state.data.copy() for state in self.request.query_state() if state.name == name), None)

    def read_rows(self, name: str) -> np.ndarray | None:
        """`read_state`, of the rows that the next call goes on from."""
        content = self.read_state(name)
        return None if content is None else content[self._rows]

    def write_state(self, name: str, value: np.ndarray) -> None:
        """Sets a small state variable that is no cache, if the model has one of that name."""
        for state in self.request.query_state():
            if state.name == name:
                state.state = ov.Tensor(value)

    @abstractmethod
    def _empty(self, request: ov.InferRequest) -> Engine:
        """An engine of this kind on another request of the same model."""

    @abstractmethod
    def _copy(self, other: Any) -> None:
        """Takes over what `other`, of this kind, counts and holds outside of state variables."""

    def _prepare(self, batch: int, new_tokens: int) -> None:  # noqa: B027
        """Makes room for a call."""

    @abstractmethod
    def _advance(self, new_tokens: int) -> None:
        """Counts the tokens of a call that has ended."""

    def _infer(self, inputs: dict[str, Any]) -> None:
        try:
            self.request.start_async(inputs, share_inputs=True)
            self.request.wait()
        except RuntimeError:  # OpenVINO's own: nothing was started, or it has ended; another thread's goes on
            raise
        except BaseException:
            # interrupted between the two: the request must not go on while the caller believes that it has ended
            self.request.cancel()
            with suppress(RuntimeError):
                self.request.wait()
            raise


class StatefulEngine(Engine):
    """Keys and values are state variables of the inference request, in the form that OpenVINO chooses."""

    can_crop = False

    def __init__(self, request: ov.InferRequest):
        super().__init__(request)
        self._past_length = 0

    @property
    def past_length(self) -> int:
        return self._past_length

    @property
    def batch_size(self) -> int:
        return len(self._rows)

    def crop(self, length: int) -> None:
        if length == 0:
            self.reset()
        elif length != self._past_length:
            raise ValueError(
                f"crop({length}): the {self._past_length} tokens that OpenVINO's state variables hold cannot be taken "
                'back one by one. Load the model with `attention="native"`, or start anew.'
            )

    def reset(self) -> None:
        super().reset()
        self._past_length = 0

    def _empty(self, request: ov.InferRequest) -> StatefulEngine:
        return StatefulEngine(request)

    def _copy(self, other: StatefulEngine) -> None:
        self._past_length = other._past_length

    def _advance(self, new_tokens: int) -> None:
        self._past_length += new_tokens


class FusedEngine(Engine):
    """Keys and values are this package's caches, which the fused attention operation writes in place."""

    can_crop = True

    def __init__(self, request: ov.InferRequest, layout: CacheLayout, max_tokens: int):
        """
        Args:
            request: an inference request of a model with fused attention.
            layout: `cache_layout` of that model.
            max_tokens: context length.
        """
        super().__init__(request)
        self.state = FusedAttentionState(request, layout, max_tokens)

    @property
    def past_length(self) -> int:
        return self.state.past_length

    @property
    def batch_size(self) -> int:
        return self.state.batch_size

    def reorder(self, beam_idx: Sequence[int] | np.ndarray) -> None:
        self.state.reorder(beam_idx)  # refuses rows that are not there
        super().reorder(beam_idx)  # of chatglm-6b's state variable

    def crop(self, length: int) -> None:
        self.state.rollback(self.state.past_length - length)
        self.held = self.held.first(length)

    def reset(self) -> None:
        super().reset()
        self.state.reset()

    def hold(self, held: HeldTokens) -> None:
        """Begins sequences of these tokens, whose keys and values are still to be written to `state`."""
        self.reset()
        self.state.begin(*held.input_ids.shape)
        self.held = held
        self._rows = np.arange(len(held.input_ids), dtype=np.int32)

    def go_on_as_others(self, length: int) -> None:
        """Keeps the first `length` tokens of every row, as the beginning of other sequences."""
        self.crop(length)
        self.sequences = object()

    def release(self) -> None:
        super().release()
        self.state.release()

    def _empty(self, request: ov.InferRequest) -> FusedEngine:
        return FusedEngine(request, self.state.layout, self.state.max_tokens)

    def _copy(self, other: FusedEngine) -> None:
        self.state.copy(other.state)

    def _prepare(self, batch: int, new_tokens: int) -> None:
        self.state.prepare(batch, new_tokens)

    def _advance(self, new_tokens: int) -> None:
        self.state.advance(new_tokens)
