# SPDX-License-Identifier: Apache-2.0
"""The operations as graph nodes, and the layout of the caches."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino.utils.node_factory import NodeFactory

from .build import NativeBuildError, extension_path


BLOCK_TOKENS = 32
"""Tokens of one cache block; a cache is u8 `[rows, num_key_value_heads, blocks, cache_block_bytes]`."""

MAX_HEAD_DIM = 512
"""The largest `head_dim` of the operation, which must also be a multiple of 16."""

CACHE_PRECISIONS = ("bf16", "i8", "f32")

KV_CACHE_PRECISIONS = {"bf16": "bf16", "f16": "bf16", "u8": "i8", "f32": "f32"}
"""The cache precision for each value of OpenVINO's property `KV_CACHE_PRECISION` that the operation serves."""


def cache_block_bytes(cache_precision: str, head_dim: int) -> int:
    """Bytes of the keys, or of the values, of `BLOCK_TOKENS` tokens of one head; i8 has one f32 scale a token."""
    token_bytes = {"bf16": 2 * head_dim, "i8": head_dim + 4, "f32": 4 * head_dim}
    return BLOCK_TOKENS * token_bytes[cache_precision]


@functools.lru_cache(maxsize=1)
def _factory() -> NodeFactory:
    factory = NodeFactory("opset13")
    path = extension_path()
    try:
        factory.add_extension(os.fspath(path))
    except RuntimeError as error:
        raise NativeBuildError(f"OpenVINO {ov.get_version()} does not load {path}: {error}") from error
    return factory


def chatglm_attention(
    inputs: Sequence[ov.Output],
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    scale: float,
    cache_precision: str = "bf16",
) -> ov.Node:
    """The operation on its inputs, in this order:

    query `[B, L, num_attention_heads * head_dim]`, key and value `[B, L, num_key_value_heads * head_dim]`, f32 or
    bf16; cos and sin f32 `[B or 1, (1,) L, rotary_dim]`; key_cache and value_cache u8, written in place; past_length
    i32 `[1]`; beam_table i32 `[B, at least past]`; attention_mask i32 `[B, past + L]`; context_length i32 `[B]`.
    With P-Tuning also the keys and the values of the prefix, f32 `[prefix tokens, num_key_value_heads * head_dim]`,
    which past_length and attention_mask count. The output has query's shape; a query that sees no key gives zeros.
    Raises `NativeBuildError` without the native library and `RuntimeError` when an input does not fit.
    """
    attributes = {
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "scale": float(scale),
        "cache_precision": cache_precision,
    }
    return _factory().create("ChatGLMAttention", list(inputs), attributes)


def chatglm_rotary(positions: ov.Output, inv_freq: Sequence[float]) -> ov.Node:
    """Cosines and sines, f32 `[B, L, 2 * len(inv_freq)]`, of i32 `positions` `[P, B, L]`.

    `inv_freq` are the frequencies of all pairs of channels, shared evenly by the P positions.
    """
    frequencies = ops.constant(np.asarray(inv_freq, dtype=np.float32))
    return _factory().create("ChatGLMRotary", [positions, frequencies.output(0)])
