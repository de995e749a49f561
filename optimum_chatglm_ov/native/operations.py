# SPDX-License-Identifier: Apache-2.0
"""The operations as graph nodes, and the layout of the caches."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

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


def cache_block_bytes(cache_precision: str, head_dim: int) -> int:
    """Bytes of the keys, or of the values, of `BLOCK_TOKENS` tokens of one head; i8 has one f32 scale a token."""
    token_bytes = {"bf16": 2 * head_dim, "i8": head_dim + 4, "f32": 4 * head_dim}
    return BLOCK_TOKENS * token_bytes[cache_precision]


def add_extension(registry: ov.Core | NodeFactory) -> None:
    """Makes the operations known to `registry`. Raises `NativeBuildError` without the native library."""
    path = extension_path()
    try:
        registry.add_extension(os.fspath(path))
    except RuntimeError as error:
        raise NativeBuildError(f"OpenVINO {ov.get_version()} does not load {path}: {error}") from error


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """What the native library has beside the operations. Raises `NativeBuildError` without it."""
    functions = ctypes.CDLL(os.fspath(extension_path()))
    functions.chatglm_attention_instruction_sets.restype = ctypes.c_char_p
    functions.chatglm_linear_instruction_sets.restype = ctypes.c_char_p
    functions.chatglm_linear_panel_bytes.restype = ctypes.c_int64
    functions.chatglm_linear_panel_bytes.argtypes = [ctypes.c_int64] * 5
    functions.chatglm_linear_pack.restype = None
    functions.chatglm_linear_pack.argtypes = [ctypes.c_int64] * 4 + [ctypes.c_void_p, ctypes.c_uint8]
    functions.chatglm_linear_pack.argtypes += [ctypes.c_void_p] * 4
    functions.chatglm_peak_operations.restype = ctypes.c_double
    functions.chatglm_peak_operations.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    return functions


@functools.lru_cache(maxsize=1)
def _factory() -> NodeFactory:
    factory = NodeFactory("opset13")
    add_extension(factory)
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


PANEL_COLUMNS = 32
"""Output features that the packed weights of a linear layer hold together."""


@dataclass(frozen=True)
class LinearFormat:
    """How a linear layer is computed.

    Attributes:
        in_features: width of the input.
        bits: of the weights, 8 or 4.
        group_size: input features whose weights share a scale and zero point; `in_features` for one in each row.
        activation_group_size: input features of a token that share a scale; a multiple of 32, divides `group_size`.
    """

    in_features: int
    bits: int
    group_size: int
    activation_group_size: int


def _panel_bytes(format: LinearFormat, out_features: int) -> int:
    sizes = format.in_features, out_features, format.bits, format.group_size, format.activation_group_size
    return library().chatglm_linear_panel_bytes(*sizes)


def takes_linear(format: LinearFormat, out_features: int) -> bool:
    """Whether the operations compute layers of this format with so many output features."""
    return _panel_bytes(format, out_features) > 0


def pack_linear(
    format: LinearFormat,
    integers: np.ndarray,
    is_signed: bool,
    scales: np.ndarray,
    zero_points: np.ndarray,
    bias: np.ndarray | None,
) -> ov.Tensor:
    """Weights in the order that the kernels read them: u8 `[out_features / 32, panel bytes]`.

    Args:
        format: what `takes_linear` takes.
        integers: as OpenVINO stores them, u8 `[out_features, in_features * bits / 8]`, low halves first.
        is_signed: whether they are two's complement.
        scales: f16 `[out_features, groups]`.
        zero_points: u8 `[out_features, groups]`, of signed integers plus 128 or 8.
        bias: f32 `[out_features]`.
    """
    rows = len(integers)
    packed = ov.Tensor(ov.Type.u8, ov.Shape([rows // PANEL_COLUMNS, _panel_bytes(format, rows)]))
    flip = 0 if not is_signed else 0x80 if format.bits == 8 else 0x88
    arrays = [np.ascontiguousarray(array) for array in (integers, scales, zero_points)]
    integers, *others = (array.ctypes.data for array in arrays)
    bias = None if bias is None else np.ascontiguousarray(bias)
    library().chatglm_linear_pack(
        format.in_features,
        rows,
        format.bits,
        format.group_size,
        integers,
        flip,
        *others,
        None if bias is None else bias.ctypes.data,
        packed.data.ctypes.data,
    )
    return packed


def _weights(packed: ov.Tensor) -> ov.Output:
    return ops.constant(packed, shared_memory=True).output(0)


def chatglm_linear(hidden_states: ov.Output, format: LinearFormat, weights: Sequence[ov.Tensor]) -> ov.Node:
    """Linear layers of one input f32 `[..., in_features]`: one output f32 `[..., out_features]` for each.

    `weights` are from `pack_linear`. Activations are rounded to 8 bits, as by OpenVINO's dynamic quantisation.
    """
    return _factory().create("ChatGLMLinear", [hidden_states, *map(_weights, weights)], asdict(format))


def chatglm_mlp(
    hidden_states: ov.Output,
    format: LinearFormat,
    first: Sequence[ov.Tensor],
    activation: str,
    down_format: LinearFormat,
    down: ov.Tensor,
) -> ov.Node:
    """`down(silu(gate) * up)`, "silu" with `first` = gate and up, or `down(gelu(up))`, "gelu" with up alone."""
    attributes = asdict(format) | {f"down_{name}": value for name, value in asdict(down_format).items()}
    inputs = [hidden_states, *map(_weights, [*first, down])]
    return _factory().create("ChatGLMMLP", inputs, attributes | {"activation": activation})
