# SPDX-License-Identifier: Apache-2.0
"""The blocks that the ChatGLM architectures are assembled from, as functions on OpenVINO nodes.

Shapes in docstrings: B batch, L new tokens, S cached and new tokens, H attention heads, G key/value heads, D head_dim.
All activations are f32 in the graph; the plugin chooses the precision it computes in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import openvino as ov
import torch
from openvino import Node, Type
from openvino import opset13 as ops

from ..checkpoint.weights import Weight


@dataclass
class Graph:
    """A graph in the making: the four inputs every ChatGLM graph has, its state, and the memory of its constants."""

    input_ids: Node = field(default_factory=lambda: _parameter("input_ids", Type.i64, 2))
    attention_mask: Node = field(default_factory=lambda: _parameter("attention_mask", Type.i64, 2))
    position_ids: Node = field(default_factory=lambda: _parameter("position_ids", Type.i64, 2))
    beam_idx: Node = field(default_factory=lambda: _parameter("beam_idx", Type.i32, 1))
    assignments: list[Node] = field(default_factory=list)
    memory: list[np.ndarray] = field(default_factory=list)

    def weight(self, tensor: Weight, name: str) -> Node:
        """Makes a checkpoint tensor an f32 node: a constant as it is stored, converted (scaled, if quantised)."""
        if tensor.scale is None:
            node = self.constant(tensor.data, name)
            return node if node.get_element_type() == Type.f32 else ops.convert(node, "f32")
        if tensor.bits == 4:
            # OpenVINO keeps the even column in the low half of a byte, these checkpoints in the high half
            swapped = ((tensor.data << 4) | ((tensor.data >> 4) & 15)).numpy()
            integers = self._shared(swapped, [swapped.shape[0], 2 * swapped.shape[1]], Type.i4, name)
        else:
            integers = self.constant(tensor.data, name)
        scale = self.constant(tensor.scale[:, None], f"{name}/scale")
        return ops.convert(ops.multiply(ops.convert(integers, "f16"), scale), "f32")

    def constant(self, data: torch.Tensor, name: str) -> Node:
        """Makes a constant that shares the memory of `data` (fp16, bf16, fp32 or int8), which may be a mapped file."""
        data = data.contiguous()
        if data.dtype == torch.bfloat16:  # numpy has no bfloat16
            return self._shared(data.view(torch.int16).numpy(), list(data.shape), Type.bf16, name)
        return self._shared(data.numpy(), list(data.shape), Type(data.numpy().dtype), name)

    def _shared(self, array: np.ndarray, shape: list[int], element_type: Type, name: str) -> Node:
        self.memory.append(array)  # a constant made from an ov.Tensor does not keep the array alive
        node = ops.constant(ov.Tensor(array, ov.Shape(shape), element_type), shared_memory=True)
        node.set_friendly_name(name)
        return node

    def model(self, logits: Node, name: str) -> ov.Model:
        """Finishes the model, with `logits` `[B, L, vocab]` as its only output."""
        logits.output(0).set_names({"logits"})
        result = ops.result(logits.output(0), name="logits")
        parameters = [self.input_ids, self.attention_mask, self.position_ids, self.beam_idx]
        model = ov.Model([result], self.assignments, parameters, name)
        model.memory = self.memory
        return model


def _parameter(name: str, element_type: Type, rank: int) -> Node:
    parameter = ops.parameter(ov.PartialShape([-1] * rank), element_type, name=name)
    parameter.output(0).set_names({name})
    return parameter


def i64(*values: int) -> Node:
    """Makes a constant 1-D i64 tensor."""
    return ops.constant(np.array(values, dtype=np.int64))


def f32(values: float | np.ndarray) -> Node:
    """Makes a constant f32 tensor."""
    return ops.constant(np.asarray(values, dtype=np.float32))


def embedding(input_ids: Node, table: Node) -> Node:
    """Looks up rows `input_ids` `[B, L]` of `table` `[vocab, hidden]` -> `[B, L, hidden]`."""
    return ops.gather(table, input_ids, i64(0), name="embed_tokens")


def linear(hidden_states: Node, matrix: Node, bias: Node | None, name: str) -> Node:
    """Computes `hidden_states @ matrix^T + bias`: `[B, L, in]` -> `[B, L, out]`."""
    output = ops.matmul(hidden_states, matrix, transpose_a=False, transpose_b=True)
    if bias is not None:
        output = ops.add(output, bias)
    output.set_friendly_name(name)
    return output


def rms_norm(hidden_states: Node, scale: Node, eps: float) -> Node:
    """Computes the root mean square norm over the last axis (Zhang & Sennrich 2019), in the form the plugin fuses."""
    variance = ops.reduce_mean(ops.power(hidden_states, f32(2.0)), i64(-1), keep_dims=True)
    inverse = ops.divide(f32(1.0), ops.sqrt(ops.add(variance, f32(eps))))
    return ops.multiply(ops.multiply(hidden_states, inverse), scale)


def layer_norm(hidden_states: Node, scale: Node, bias: Node, eps: float) -> Node:
    """Computes the layer norm over the last axis with scale and bias."""
    normed = ops.mvn(hidden_states, i64(-1), normalize_variance=True, eps=eps, eps_mode="inside_sqrt")
    return ops.add(ops.multiply(normed, scale), bias)


def swiglu(gate: Node, up: Node) -> Node:
    """Computes `swish(gate) * up` (Shazeer 2020)."""
    return ops.multiply(ops.swish(gate), up)


def half_split_channels(head_dim: int, rotary_dim: int) -> np.ndarray:
    """Orders the channels of a head half-split; the first `rotary_dim` rotate in pairs (0, 1), (2, 3), ...

    Of the pairs, the first of each come first, then the second of each; the channels that do not rotate stay.
    """
    channels = np.arange(head_dim)
    return np.concatenate((channels[0:rotary_dim:2], channels[1:rotary_dim:2], channels[rotary_dim:]))


def rotary_embedding(positions: Node, inv_freq: np.ndarray) -> tuple[Node, Node]:
    """Computes cosine and sine `[B, 1, L, 2 * len(inv_freq)]` of angles of `positions` `[B, L]` (Su et al. 2021)."""
    angles = rotary_angles(positions, inv_freq)
    return cos_and_sin(ops.concat([angles, angles], axis=-1))


def rotary_angles(positions: Node, inv_freq: np.ndarray) -> Node:
    """Multiplies `positions` `[B, L]` by each frequency -> f32 `[B, 1, L, len(inv_freq)]`."""
    positions = ops.convert(ops.unsqueeze(positions, i64(1, 3)), "f32")
    return ops.multiply(positions, f32(inv_freq.reshape(1, 1, 1, -1)))


def cos_and_sin(angles: Node) -> tuple[Node, Node]:
    """Computes the pair (cos, sin) of `angles`."""
    return ops.cos(angles), ops.sin(angles)


def apply_rotary(states: Node, cos: Node, sin: Node, rotary_dim: int, head_dim: int) -> Node:
    """Rotates the first `rotary_dim` channels of `states` `[B, H, L, D]`, half-split pairs (d, d + rotary_dim / 2)."""
    rotated = states if rotary_dim == head_dim else _channels(states, 0, rotary_dim)
    half = rotary_dim // 2
    turned = ops.concat(
        [ops.multiply(_channels(rotated, half, rotary_dim), f32(-1.0)), _channels(rotated, 0, half)], -1
    )
    rotated = ops.add(ops.multiply(rotated, cos), ops.multiply(turned, sin))
    if rotary_dim == head_dim:
        return rotated
    return ops.concat([rotated, _channels(states, rotary_dim, head_dim)], axis=-1)


def _channels(states: Node, start: int, stop: int) -> Node:
    return ops.slice(states, i64(start), i64(stop), i64(1), i64(-1))


def split_heads(states: Node, num_heads: int, head_dim: int) -> Node:
    """Splits `[B, L, H * D]` -> `[B, H, L, D]`."""
    return ops.transpose(ops.reshape(states, i64(0, 0, num_heads, head_dim), special_zero=True), i64(0, 2, 1, 3))


def merge_heads(states: Node) -> Node:
    """Merges `[B, H, L, D]` -> `[B, L, H * D]`."""
    return ops.reshape(ops.transpose(states, i64(0, 2, 1, 3)), i64(0, 0, -1), special_zero=True)


def state(graph: Graph, initial: Node, name: str, element_type: Type, shape: list[int]) -> tuple[Node, str]:
    """Reads a state variable at the start of a call, its rows reordered by `beam_idx`."""
    variable = ops.read_value(initial, name, variable_type=element_type, variable_shape=ov.PartialShape(shape))
    return ops.gather(variable, graph.beam_idx, ops.constant(np.int64(0))), name


def key_value_cache(
    graph: Graph, states: Node, name: str, num_key_value_heads: int, head_dim: int, prefix: np.ndarray | None
) -> Node:
    """Appends `states` `[B, G, L, D]` to the state variable `name` and returns the whole `[B, G, S, D]`.

    The variable starts empty or, with P-Tuning v2, as `prefix` `[G, P, D]` in every row of the batch.
    """
    batch = ops.gather(ops.shape_of(graph.input_ids), i64(0), i64(0))
    if prefix is None:
        start = ops.broadcast(f32(0.0), ops.concat([batch, i64(num_key_value_heads, 0, head_dim)], axis=0))
    else:
        start = ops.broadcast(f32(prefix[None]), ops.concat([batch, i64(*prefix.shape)], axis=0))
    past, variable_id = state(graph, start, name, Type.f32, [-1, num_key_value_heads, -1, head_dim])
    present = ops.concat([past, states], axis=2)
    graph.assignments.append(ops.assign(present, variable_id))
    return present


def repeat_key_value(states: Node, num_key_value_heads: int, num_heads: int, head_dim: int) -> Node:
    """Repeats `[B, G, S, D]` -> `[B, H, S, D]`: query head i reads group i // (H / G)."""
    repeats = num_heads // num_key_value_heads
    if repeats == 1:
        return states
    target = i64(1, 1, repeats, 1, 1)
    states = ops.broadcast(ops.unsqueeze(states, i64(2)), target, broadcast_spec="BIDIRECTIONAL")
    return ops.reshape(states, i64(0, num_heads, -1, head_dim), special_zero=True)


def cached_length(graph: Graph) -> tuple[Node, Node, Node]:
    """Counts, as i64 `[1]`: tokens in the cache before this call, new tokens L, and their sum S."""
    total = ops.gather(ops.shape_of(graph.attention_mask), i64(1), i64(0))
    new = ops.gather(ops.shape_of(graph.input_ids), i64(1), i64(0))
    return ops.subtract(total, new), new, total


def _arange(start: Node, stop: Node) -> Node:
    scalar = i64()
    return ops.range(
        ops.reshape(start, scalar, False), ops.reshape(stop, scalar, False), ops.constant(np.int64(1)), "i64"
    )


def causal_mask(graph: Graph, prefix_tokens: int = 0, visible_to_all: Node | None = None) -> Node:
    """Makes an additive mask f32 `[B, 1, L, prefix_tokens + S]`: 0 where a query sees a key, else the lowest f32.

    A query sees the keys at its own index and before it, and those that `visible_to_all` (boolean `[B, S]`) marks, as
    far as `attention_mask` does not hide them as padding; and all of `prefix_tokens`.
    """
    past, _, total = cached_length(graph)
    queries = ops.unsqueeze(_arange(past, total), i64(1))
    keys = ops.unsqueeze(_arange(i64(0), total), i64(0))
    visible = ops.unsqueeze(ops.less_equal(keys, queries), i64(0, 1))  # [1, 1, L, S]
    if visible_to_all is not None:
        visible = ops.logical_or(visible, ops.unsqueeze(visible_to_all, i64(1, 2)))
    kept = ops.not_equal(graph.attention_mask, ops.constant(np.int64(0)))
    visible = ops.logical_and(visible, ops.unsqueeze(kept, i64(1, 2)))
    mask = ops.select(visible, f32(0.0), f32(np.finfo(np.float32).min))
    if prefix_tokens:
        mask = ops.concat([_prefix_mask(graph, mask, prefix_tokens), mask], axis=-1)
    return mask


def _prefix_mask(graph: Graph, mask: Node, prefix_tokens: int) -> Node:
    """Makes zeros f32 `[B, 1, L, prefix_tokens]`, kept in a state.

    The state holds nothing new, but without one the conversion to PagedAttention (openvino-genai's default) would drop
    the prefix and go on; with it, it is refused.
    """
    batch = ops.gather(ops.shape_of(graph.input_ids), i64(0), i64(0))
    start = ops.broadcast(f32(0.0), ops.concat([batch, i64(1)], axis=0))
    visible, variable_id = state(graph, start, "prefix_mask", Type.f32, [-1, 1])
    graph.assignments.append(ops.assign(visible, variable_id))
    length = ops.gather(ops.shape_of(mask), i64(2), i64(0))
    shape = ops.concat([batch, i64(1), length, i64(prefix_tokens)], axis=0)
    return ops.broadcast(ops.unsqueeze(visible, i64(1, 2)), shape)


def query_log_scale(positions: Node, training_length: int) -> Node:
    """Computes f32 `[B, L, 1]` `max(1, ln(i + 65) / ln(training_length))`, the factor of a query at position i.

    Length extrapolation of chatglm3-6b-128k; the 65 is 1 + 64 of the original `CoreAttention`, which counts padding,
    too. PagedAttention, which openvino-genai makes of the graph, has positions alone.
    """
    index = ops.convert(ops.unsqueeze(positions, i64(2)), "f32")
    factor = ops.divide(ops.log(ops.add(index, f32(65.0))), f32(math.log(training_length)))
    return ops.maximum(factor, f32(1.0))


def attention(query: Node, key: Node, value: Node, mask: Node) -> Node:
    """Computes scaled dot-product attention, scale 1 / sqrt(D): `[B, H, L, D]` -> `[B, L, H * D]`."""
    return merge_heads(ops.scaled_dot_product_attention(query, key, value, mask, causal=False))
