# SPDX-License-Identifier: Apache-2.0
"""What an engine holds, as transformers sees it: `past_key_values`."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from transformers import DynamicCache

from .engine import Engine, FusedEngine


# transformers wants something that is neither None nor empty.
_MARKER = ((),)


class FusedCache(DynamicCache):
    """What a fused model returns as `past_key_values`: one sequence in the caches of its inference request.

    It holds no tensors: keys and values are the engine's. As any `Cache`, it grows with each call that it is given to,
    and `crop` and `reset` take tokens back (in constant time). An engine holds one sequence at a time: once a call
    without `past_key_values` has begun another, these raise. What handles the tensors of other caches raises always.

    `transformers` crops only what is a `DynamicCache` in all its versions.
    """

    def __init__(self, engine: FusedEngine, uncroppable: int = 0):
        """
        Args:
            engine: holds the sequences that this stands for.
            uncroppable: tokens at the beginning that cannot be taken back one by one, because each was computed
                with all of them in view.
        """
        super().__init__()
        self.uncroppable = uncroppable
        self.beams_from: int | None = None
        """After a beam search, the length up to which the rows are those of the sequences that it returned."""
        self._engine = engine
        self._sequences = engine.sequences

    @property
    def is_outdated(self) -> bool:
        """Whether the caches hold another sequence by now."""
        return self._sequences is not self._engine.sequences

    def belongs_to(self, engine: Engine) -> bool:
        """Whether `engine` holds, or held, what this stands for."""
        return self._engine is engine

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
        self._engine.crop(max_length)
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
        return len(self._engine.state.layout.layers)

    def __repr__(self) -> str:
        tokens = "outdated" if self.is_outdated else f"{self.get_seq_length()} tokens"
        return f"{type(self).__name__}({tokens})"

    def _current(self) -> Engine:
        if self.is_outdated:
            raise ValueError(
                "These `past_key_values` are outdated: the model has begun another sequence since it returned them, "
                "and its caches hold one at a time. Leave `past_key_values` out to compute the sequence again."
            )
        return self._engine


def past_key_values_of(engine: Engine, uncroppable: int) -> FusedCache | tuple:
    """What a call that has begun new sequences returns as `past_key_values`; `uncroppable` as in `FusedCache`."""
    return FusedCache(engine, uncroppable) if engine.can_crop else _MARKER


def held_length(engine: Engine | None, past_key_values: Any) -> int:
    """Tokens that `past_key_values` stand for, 0 for `None`.

    Raises:
        ValueError: `engine` has not returned them, has begun other sequences since, or holds beams.
    """
    if past_key_values is None:
        return 0
    if engine is not None and not engine.can_crop and past_key_values == _MARKER and engine.past_length:
        return engine.past_length
    if engine is None or not isinstance(past_key_values, FusedCache) or not past_key_values.belongs_to(engine):
        raise ValueError(
            f"`past_key_values` is a {type(past_key_values).__name__} that this model has not returned; its "
            "caches hold nothing of it. Leave it out to start a new sequence."
        )
    length = past_key_values.get_seq_length()
    if past_key_values.beams_from is not None and length > past_key_values.beams_from:
        raise ValueError(
            "`past_key_values` hold the beams that a beam search ended with, which are not the sequences that it "
            f"returned. Leave them out, or `crop({past_key_values.beams_from})` them to the prompt."
        )
    return length


def context_tokens(engine: Engine, attention_mask: np.ndarray) -> int:
    """Tokens at the beginning of the prompt that see each other in both directions, padding included."""
    layout = engine.read_state("prompt_layout")
    if layout is None:
        return 0
    padding = (attention_mask == 0).sum(axis=1)
    return int((padding + layout[:, 0]).max())
