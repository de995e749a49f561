# SPDX-License-Identifier: Apache-2.0
"""Keys and values of parts of a row, out of the caches of an engine and into them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...native.cache_state import FusedAttentionState
from ...native.fuse_attention import CacheLayout
from ...native.library import block_tokens, copy_tokens


@dataclass(frozen=True)
class Span:
    """Places in a row without padding, where a prefix of P-Tuning comes before the tokens; `first` begins a block."""

    first: int
    last: int

    def shape(self, layout: CacheLayout) -> tuple[int, int, int, int]:
        """Of its blocks: key and value caches of each layer in turn, heads, blocks, bytes."""
        _, heads, blocks, size = layout.shape(1, _blocks(self.last - self.first))
        return 2 * len(layout.layers), heads, blocks, size

    def parts(self, prefix_tokens: int, padding: int) -> Iterator[tuple[int, int, int]]:
        """First and last place of what lies together in a padded row, and how much further on: padding comes between
        prefix and tokens."""
        border = min(max(prefix_tokens, self.first), self.last)
        for first, last, shift in ((self.first, border, 0), (border, self.last, padding)):
            if first < last:
                yield first, last, shift


def read_blocks(state: FusedAttentionState, stored_row: int, padding: int, span: Span) -> np.ndarray:
    """Copies the blocks u8 `span.shape` of a row of the caches, whose tokens follow `padding` others."""
    layout = state.layout
    copies = np.zeros(span.shape(layout), np.uint8)
    begin = span.first // block_tokens()
    for cache, (rows, blocks) in enumerate(zip(state.blocks(stored_row, _blocks(padding + span.last)), copies)):
        if not padding:
            blocks[:] = rows[:, begin : begin + blocks.shape[1]]
            continue
        for first, last, shift in span.parts(layout.prefix_tokens, padding):
            source, target = (rows, first + shift), (blocks, first - span.first)
            copy_tokens((layout.cache_precision, layout.head_dim), cache % 2 == 0, source, target, last - first)
    return copies


def write_blocks(state: FusedAttentionState, row: int, padding: int, span: Span, copies: np.ndarray) -> None:
    """Puts what `read_blocks` gave into a row of the caches, as far as the row reaches."""
    layout = state.layout
    length = layout.prefix_tokens + state.past_length
    begin = span.first // block_tokens()
    for cache, (rows, blocks) in enumerate(zip(state.blocks(row, _blocks(length)), copies)):
        if not padding:
            end = min(begin + blocks.shape[1], rows.shape[1])
            rows[:, begin:end] = blocks[:, : end - begin]
            continue
        for first, last, shift in span.parts(layout.prefix_tokens, padding):
            source, target = (blocks, first - span.first), (rows, first + shift)
            count = min(last, length - shift) - first
            copy_tokens((layout.cache_precision, layout.head_dim), cache % 2 == 0, source, target, max(count, 0))


def clear_padding(state: FusedAttentionState, row: int, padding: int) -> None:
    """Makes the padding of a new row numbers: masked, yet multiplied."""
    for rows in state.blocks(row, _blocks(state.layout.prefix_tokens + padding)):
        rows[:] = 0


def _blocks(tokens: int) -> int:
    return -(-tokens // block_tokens())
