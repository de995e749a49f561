# SPDX-License-Identifier: Apache-2.0
"""The key/value caches of one inference request of a fused model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino as ov

from .fuse_attention import BEAM_TABLE, CacheLayout
from .library import block_tokens
from .memory import aligned_bytes


# The first allocation; memory that no token has reached yet is address space only.
_FIRST_BLOCKS = 16


class FusedAttentionState:
    """Owns the caches of one inference request and tells the request where they are.

    Every call of the model is `prepare`, `infer`, `advance`; between calls `reorder`, `rollback` and `reset` change
    what the next one sees, without touching keys or values. Not to be shared by requests or threads.

    ```python
    state = FusedAttentionState(request, layout, max_tokens=8192)
    state.prepare(batch=1, new_tokens=input_ids.shape[1])
    request.infer({"input_ids": input_ids, ...})
    state.advance(input_ids.shape[1])
    ```
    """

    def __init__(self, request: ov.InferRequest, layout: CacheLayout, max_tokens: int):
        """
        Args:
            request: an inference request of a model that `fuse_attention` changed.
            layout: `cache_layout` of that model.
            max_tokens: context length, without a prefix; the caches never grow beyond it.
        """
        self.layout = layout
        self.max_tokens = max_tokens
        self._length = layout.prefix_tokens  # of every row, with the prefix
        self._request = request
        self._caches: dict[str, ov.Tensor] = {}
        # The request knows addresses only: what it reads and writes lives as long as it does, also after `release`,
        # while another thread may still compute.
        request.caches = self._caches
        self._table = np.zeros((0, 0), np.int32)
        self._rows = self._blocks = self._batch = 0

    @property
    def past_length(self) -> int:
        """Tokens in the caches, of every row of the batch, without a prefix."""
        return self._length - self.layout.prefix_tokens

    @property
    def batch_size(self) -> int:
        """Rows that the caches hold."""
        return self._batch

    @property
    def capacity(self) -> int:
        """Tokens of each row that fit without growing."""
        return self._blocks * block_tokens()

    @property
    def caches(self) -> list[ov.Tensor]:
        """Key and value caches of each layer in turn, u8 `CacheLayout.shape`, until they grow or are released."""
        return list(self._caches.values())

    def prepare(self, batch: int, new_tokens: int) -> None:
        """Makes room for `new_tokens` more tokens in each of `batch` rows and binds the caches to the request.

        Raises:
            ValueError: the tokens exceed `max_tokens`, or `batch` is not the number of rows that the caches hold.
        """
        needed = self.past_length + new_tokens
        if needed > self.max_tokens:
            raise ValueError(
                f"{needed} tokens (past and new) exceed the context length of {self.max_tokens}: shorten the prompt"
            )
        if self.past_length and batch != self._batch:
            raise ValueError(
                f"the caches hold {self._batch} rows, the call has {batch}: reorder() or reset() comes before a change"
            )
        self._batch = batch
        blocks = -(-(self._length + new_tokens) // block_tokens())
        if blocks > self._blocks or batch > self._rows:
            most = -(-(self.max_tokens + self.layout.prefix_tokens) // block_tokens())
            if blocks > self._blocks:
                blocks = min(max(2 * blocks, _FIRST_BLOCKS), most)
            self._grow(max(batch, self._rows), max(blocks, self._blocks))
        if self._table.shape != (batch, self.capacity):
            table = np.tile(np.arange(batch, dtype=np.int32)[:, None], (1, self.capacity))
            if self.past_length:
                table[:, : self._length] = self._table[:, : self._length]
            self._bind_table(table)
        elif not self.past_length:
            self._table[:, : self._length] = np.arange(batch)[:, None]  # a prefix is stored in every row

    def advance(self, new_tokens: int) -> None:
        """Counts the tokens that the call since `prepare` has appended."""
        self._table[:, self._length : self._length + new_tokens] = np.arange(self._batch)[:, None]
        self._length += new_tokens

    def reorder(self, beam_idx: Sequence[int] | np.ndarray) -> None:
        """Row i goes on from what row `beam_idx[i]` holds; there may be more or fewer rows than before.

        Raises:
            ValueError: `beam_idx` names a row that is not there.
        """
        beam_idx = np.asarray(beam_idx, dtype=np.int64)
        if not self.past_length or np.array_equal(beam_idx, np.arange(self._batch)):
            return
        if beam_idx.ndim != 1 or not len(beam_idx) or beam_idx.min() < 0 or beam_idx.max() >= self._batch:
            raise ValueError(f"beam_idx must name rows 0 to {self._batch - 1}, found {beam_idx.tolist()}")
        past = self._table[beam_idx, : self._length]
        if len(beam_idx) == self._batch:
            self._table[:, : self._length] = past
        else:
            table = np.zeros((len(beam_idx), self.capacity), np.int32)
            table[:, : self._length] = past
            self._batch = len(beam_idx)
            self._bind_table(table)

    def rollback(self, tokens: int) -> None:
        """Forgets the last `tokens` tokens of every row, in constant time.

        Raises:
            ValueError: there are fewer.
        """
        if not 0 <= tokens <= self.past_length:
            raise ValueError(f"cannot roll back {tokens} tokens, the caches hold {self.past_length}")
        self._length -= tokens

    def reset(self) -> None:
        """Forgets everything; the memory is kept for the next sequence."""
        self._length = self.layout.prefix_tokens

    def begin(self, batch: int, tokens: int) -> None:
        """Counts `tokens` tokens in each of `batch` new rows; `blocks` gives the place of their keys and values.

        Raises:
            ValueError: see `prepare`.
        """
        self.reset()
        self.prepare(batch, tokens)
        self.advance(tokens)

    def blocks(self, row: int, count: int) -> list[np.ndarray]:
        """The first `count` blocks of each cache in turn, u8 `[num_key_value_heads, count, bytes]`, not copied.

        The tokens of a prefix come first in them. They are valid until the caches grow or are released. `row` is a row
        of the caches, see `stored_row`.
        """
        return [cache.data[row, :, :count] for cache in self.caches]

    def stored_row(self, row: int) -> int | None:
        """The row of the caches that holds all tokens of row `row`; `None` if several do, as after a beam search."""
        table = self._table[row, : self._length]
        return int(table[0]) if (table == table[0]).all() else None

    def copy(self, other: FusedAttentionState) -> None:
        """Holds the same tokens as `other`, a state of another request of the same model, in memory of its own."""
        self._rows, self._blocks, self._batch = other._rows, other._blocks, other._batch
        for name, cache in other._caches.items():
            memory = aligned_bytes(cache.data.shape)
            memory[:] = cache.data
            self._caches[name] = ov.Tensor(memory, shared_memory=True)
            self._request.set_tensor(name, self._caches[name])
        self._bind_table(other._table.copy())
        self._length = other._length

    def release(self) -> None:
        """Forgets everything and gives the memory and the request back; this object is of no use any more."""
        self.reset()
        self._caches = {}
        self._table = np.zeros((0, 0), np.int32)
        self._request = None

    def _bind_table(self, table: np.ndarray) -> None:
        table = np.ascontiguousarray(table)
        self._request.set_tensor(BEAM_TABLE, ov.Tensor(table, shared_memory=True))
        self._request.beam_table = table
        self._table = table  # not before: until then the request reads the other one

    def _grow(self, rows: int, blocks: int) -> None:
        """Larger caches with the same content, layer by layer, so that one layer at a time is there twice."""
        shape = self.layout.shape(rows, blocks)
        used = -(-self._length // block_tokens())
        for names in self.layout.layers:
            for name in names:
                tensor = ov.Tensor(aligned_bytes(shape), shared_memory=True)
                if self.past_length:
                    # a try that ran out of memory may have left more rows in some
                    tensor.data[: self._rows, :, :used] = self._caches[name].data[: self._rows, :, :used]
                self._request.set_tensor(name, tensor)
                self._caches[name] = tensor
        self._rows, self._blocks = rows, blocks
