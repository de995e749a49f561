# SPDX-License-Identifier: Apache-2.0
"""The native operations as graph nodes."""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino.utils.node_factory import NodeFactory

from .library import add_extension, functions, panel_columns
from .memory import aligned_bytes


CACHE_PRECISIONS = ("bf16", "i8", "f32")


class AttentionInput(enum.IntEnum):
    """Inputs of `ChatGLMAttention`, the last two of which only a model with P-Tuning has."""

    QUERY = 0
    KEY = 1
    VALUE = 2
    COS = 3
    SIN = 4
    KEY_CACHE = 5
    VALUE_CACHE = 6
    PAST_LENGTH = 7
    BEAM_TABLE = 8
    ATTENTION_MASK = 9
    CONTEXT_LENGTH = 10
    PREFIX_KEYS = 11
    PREFIX_VALUES = 12


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
    """Makes the operation of its inputs, in the order of `AttentionInput`:

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
    """Computes cosines and sines, f32 `[B, L, 2 * len(inv_freq)]`, of i32 `positions` `[P, B, L]`.

    `inv_freq` are the frequencies of all pairs of channels, shared evenly by the P positions.
    """
    frequencies = ops.constant(np.asarray(inv_freq, dtype=np.float32))
    return _factory().create("ChatGLMRotary", [positions, frequencies.output(0)])


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
    return functions().chatglm_linear_panel_bytes(*sizes)


def takes_linear(format: LinearFormat, out_features: int) -> bool:
    """Tells whether the operations compute layers of this format with so many output features."""
    return _panel_bytes(format, out_features) > 0


def pack_linear(
    format: LinearFormat,
    integers: np.ndarray,
    is_signed: bool,
    scales: np.ndarray,
    zero_points: np.ndarray,
    bias: np.ndarray | None,
) -> np.ndarray:
    """Packs weights in the order that the kernels read them: u8 `[out_features / 32, panel bytes]`.

    Args:
        format: what `takes_linear` takes.
        integers: as OpenVINO stores them, u8 `[out_features, in_features * bits / 8]`, low halves first.
        is_signed: whether they are two's complement.
        scales: f16 `[out_features, groups]`.
        zero_points: u8 `[out_features, groups]`, of signed integers plus 128 or 8.
        bias: f32 `[out_features]`.
    """
    rows = len(integers)
    packed = aligned_bytes([rows // panel_columns(), _panel_bytes(format, rows)])
    flip = 0 if not is_signed else 0x80 if format.bits == 8 else 0x88
    arrays = [np.ascontiguousarray(array) for array in (integers, scales, zero_points)]
    integers, *others = (array.ctypes.data for array in arrays)
    bias = None if bias is None else np.ascontiguousarray(bias)
    functions().chatglm_linear_pack(
        format.in_features,
        rows,
        format.bits,
        format.group_size,
        integers,
        flip,
        *others,
        None if bias is None else bias.ctypes.data,
        packed.ctypes.data,
    )
    return packed


def _weights(packed: np.ndarray) -> ov.Output:
    return ops.constant(packed, shared_memory=True).output(0)


def chatglm_linear(hidden_states: ov.Output, format: LinearFormat, weights: Sequence[np.ndarray]) -> ov.Node:
    """Computes linear layers of one input f32 `[..., in_features]`: one output f32 `[..., out_features]` for each.

    `weights` are from `pack_linear`. How activations are rounded depends on the CPU: `cpp/linear/linear.hpp`.
    """
    return _factory().create("ChatGLMLinear", [hidden_states, *map(_weights, weights)], asdict(format))


def chatglm_mlp(
    hidden_states: ov.Output,
    format: LinearFormat,
    first: Sequence[np.ndarray],
    activation: str,
    down_format: LinearFormat,
    down: np.ndarray,
) -> ov.Node:
    """Computes `down(silu(gate) * up)`, "silu" with `first` = gate and up, or `down(gelu(up))`, "gelu" with up."""
    attributes = asdict(format) | {f"down_{name}": value for name, value in asdict(down_format).items()}
    inputs = [hidden_states, *map(_weights, [*first, down])]
    return _factory().create("ChatGLMMLP", inputs, attributes | {"activation": activation})
