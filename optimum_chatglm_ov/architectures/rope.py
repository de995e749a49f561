# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings as the configurations of transformers describe them, in the forms of its versions 4 and 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PretrainedConfig


_DEFAULT_THETA = 10000.0
_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}
_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


@dataclass(frozen=True)
class RotaryEmbedding:
    """Which channels of a head turn, and how fast.

    Attributes:
        inv_freq: angle of each pair of channels from one position to the next, f64 `[rotary_dim / 2]`.
        attention_factor: what cosine and sine are multiplied by.
        context_length: tokens that the frequencies are meant for.
    """

    inv_freq: np.ndarray
    attention_factor: float
    context_length: int

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that turn, the first ones."""
        return 2 * len(self.inv_freq)


def rotary_embedding_of(config: PretrainedConfig) -> RotaryEmbedding:
    """Reads the rotary embedding that `config` describes.

    transformers 5 has everything in `rope_parameters`; version 4 has `rope_theta` and `partial_rotary_factor` beside
    `rope_scaling`, and leaves `rope_parameters` that version 5 has saved unread.

    Raises:
        ValueError: another kind of rotary embedding, or settings without a meaning.
    """
    given = _parameters(config)
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in _KEYS:
        raise ValueError(f"`rope_type` is {kind!r}; expected one of {', '.join(map(repr, _KEYS))}.")
    unknown = sorted(given.keys() - _COMMON_KEYS - _KEYS[kind])
    if unknown:
        raise ValueError(f"The rotary embedding of type {kind!r} has {', '.join(unknown)}, which it does not know.")
    theta = float(_first(given.get("rope_theta"), getattr(config, "rope_theta", None), _DEFAULT_THETA))
    part = _first(given.get("partial_rotary_factor"), getattr(config, "partial_rotary_factor", None), 1.0)
    rotary_dim = int(config.head_dim * part)
    if not (0 < rotary_dim <= config.head_dim) or rotary_dim % 2:
        raise ValueError(
            f"`partial_rotary_factor`={part} lets {rotary_dim} of {config.head_dim} channels of a head turn; expected "
            "an even number of them."
        )
    inv_freq = theta ** -(np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    length = config.max_position_embeddings
    if kind == "default":
        return RotaryEmbedding(inv_freq, 1.0, length)
    if kind == "linear":
        return RotaryEmbedding(inv_freq / _factor(given), 1.0, length)
    original = given.get("original_max_position_embeddings") or length
    factor = _factor(given) if given.get("factor") else length / original
    inv_freq = _yarn_frequencies(inv_freq, theta, factor, original, given)
    return RotaryEmbedding(inv_freq, _yarn_attention_factor(factor, given), max(length, round(factor * original)))


def settle_context_length(config: PretrainedConfig) -> None:
    """Makes `max_position_embeddings` the length that YaRN extends the context to.

    Configurations may leave it at the length of the training, which is kept in the settings of the rotary embedding.
    """
    parameters = _parameters(config)
    if (parameters.get("rope_type") or parameters.get("type")) == "yarn":
        parameters.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    config.max_position_embeddings = rotary_embedding_of(config).context_length


def _parameters(config: PretrainedConfig) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _factor(given: Mapping[str, Any]) -> float:
    factor = given.get("factor")
    if not isinstance(factor, (int, float)) or factor < 1:
        raise ValueError(f"`factor` of the rotary embedding is {factor!r}; expected a number of at least 1.")
    return float(factor)


def _yarn_frequencies(
    inv_freq: np.ndarray, theta: float, factor: float, original_length: int, given: Mapping[str, Any]
) -> np.ndarray:
    """Divides frequencies by `factor` as far as they turn slowly (Peng et al. 2023, YaRN, "NTK-by-parts").

    Pairs that turn more than `beta_fast` times in the original context stay, those that turn less than `beta_slow`
    times are divided, and a ramp leads from one to the other.
    """
    pairs, rotary_dim = len(inv_freq), 2 * len(inv_freq)
    turns = given.get("beta_fast") or 32, given.get("beta_slow") or 1
    low, high = (
        rotary_dim * math.log(original_length / (count * 2 * math.pi)) / (2 * math.log(theta)) for count in turns
    )
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    ramp = np.clip((np.arange(pairs) - low) / ((high - low) or 0.001), 0, 1)
    return inv_freq * (1 - ramp) + inv_freq / factor * ramp


def _yarn_attention_factor(factor: float, given: Mapping[str, Any]) -> float:
    def of(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    weights = given.get("mscale"), given.get("mscale_all_dim")
    return of(weights[0]) / of(weights[1]) if all(weights) else of(1.0)
