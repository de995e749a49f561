# SPDX-License-Identifier: Apache-2.0
"""The caches of fused attention as transformers sees them."""

from __future__ import annotations

from typing import Any, NoReturn

from transformers import DynamicCache

from ..native.cache_state import FusedAttentionState


class FusedCache(DynamicCache):
    """What a fused model returns as `past_key_values`: one sequence in the caches of its inference request.

    It holds no tensors. As any `Cache`, it grows with each call that it is given to, and `crop` and `reset` take
    tokens back (in constant time). The caches hold one sequence at a time: once a call without `past_key_values` has
    begun another, these raise. What handles the tensors of other caches raises always.

    `transformers` crops only what is a `DynamicCache` in all its versions.
    """

    def __init__(self, state: FusedAttentionState, uncroppable: int = 0):
        """
        Args:
            state: the caches, right after their `reset`.
            uncroppable: tokens at the beginning that cannot be taken back one by one, because each was computed
                with all of them in view.
        """
        super().__init__()
        self.uncroppable = uncroppable
        self.beams_from: int | None = None
        """After a beam search, the length up to which the rows are those of the sequences that it returned."""
        self._state = state
        self._sequence = state.sequence

    @property
    def is_outdated(self) -> bool:
        """Whether the caches hold another sequence by now."""
        return self._sequence is not self._state.sequence

    def belongs_to(self, state: FusedAttentionState) -> bool:
        """Whether `state` are the caches that this one shows."""
        return self._state is state

    @property
    def batch_size(self) -> int:
        """Rows in the caches."""
        return self._current().batch_size

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of each row in the caches.

        Raises:
            ValueError: the cache is outdated.
        """
        return self._current().past_length

    def crop(self, max_length: int) -> None:
        """Keeps the first `max_length` tokens (negative: forgets that many) of every row.

        Raises:
            ValueError: the cache is outdated, or `max_length` lies inside the prompt's context of chatglm-6b.
        """
        length = self.get_seq_length()
        if max_length < 0:
            max_length = max(length + max_length, 0)
        if max_length >= length:
            return
        if max_length < self.uncroppable:
            raise ValueError(
                f"crop({max_length}): the first {self.uncroppable} tokens are the context of a chatglm-6b prompt, "
                "which was computed with all of it in view. Start anew without `past_key_values`."
            )
        self._state.rollback(length - max_length)
        if self.beams_from is not None and max_length <= self.beams_from:
            self.beams_from = None

    def reset(self) -> None:
        """Takes all tokens back; raises as `crop` does."""
        self.crop(0)

    def _no_tensors(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses what reads, copies or changes tensors; the model reorders its beams itself."""
        raise NotImplementedError(
            "These `past_key_values` stand for caches inside the model and hold no tensors: they can be handed back "
            "to the model, cropped and reset, and not be read, copied or changed."
        )

    update = reorder_cache = batch_repeat_interleave = batch_select_indices = to_legacy_cache = _no_tensors
    __iter__ = __getitem__ = __deepcopy__ = __reduce_ex__ = _no_tensors

    def __len__(self) -> int:
        return len(self._state.layout.layers)

    def __repr__(self) -> str:
        tokens = "outdated" if self.is_outdated else f"{self.get_seq_length()} tokens"
        return f"{type(self).__name__}({tokens})"

    def _current(self) -> FusedAttentionState:
        if self.is_outdated:
            raise ValueError(
                "These `past_key_values` are outdated: the model has begun another sequence since it returned them, "
                "and its caches hold one at a time. Leave `past_key_values` out to compute the sequence again."
            )
        return self._state
