# SPDX-License-Identifier: Apache-2.0
"""The pass from the portable stateful graph to the fused one, and what a fused graph says about its caches.

Before, in every layer: heads split, rotary embedding, state variables for keys and values reordered by `beam_idx`,
key and value heads repeated, `ScaledDotProductAttention` with an L x S mask. After: one `ChatGLMAttention` whose
caches are u8 inputs of the model, bound by `FusedAttentionState`. The pass finds the former by its structure; a model
it does not recognise completely is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import openvino as ov
from openvino import Node, Output, Type
from openvino import opset13 as ops

from .operations import (
    CACHE_PRECISIONS,
    MAX_HEAD_DIM,
    cache_block_bytes,
    chatglm_attention,
    chatglm_rotary,
)


BEAM_TABLE = "beam_table"


class _Unrecognised(Exception):
    """Some part of the graph is not what the pass knows; the message says which."""


@dataclass(frozen=True)
class CacheLayout:
    """The caches of a fused model: one key and one value input for each layer, all of one shape."""

    layers: tuple[tuple[str, str], ...]
    """Names of the key cache and value cache inputs."""
    num_key_value_heads: int
    head_dim: int
    cache_precision: str
    prefix_tokens: int = 0
    """Tokens of a P-Tuning prefix, the first in every row; the operation stores them itself."""

    def shape(self, rows: int, blocks: int) -> tuple[int, int, int, int]:
        """Shape of one cache, u8."""
        return rows, self.num_key_value_heads, blocks, cache_block_bytes(self.cache_precision, self.head_dim)


@dataclass
class _Rotary:
    states: Node  # [B, H, L, D], before the rotation
    cos: Output
    sin: Output


@dataclass
class _Layer:
    attention: Node  # ScaledDotProductAttention
    merged: Node  # [B, L, H * D]
    query: Node  # splits [B, L, H * D] into heads
    key: Node
    value: Node
    cos: Output
    sin: Output
    prefix: list[np.ndarray]  # keys and values [1, G, P, D], or nothing
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


def fuse_attention(model: ov.Model, cache_precision: str = "bf16") -> None:
    """Replaces the attention of every layer of `model`, in place; one that is fused already stays as it is.

    The fused model keeps its inputs and outputs and gains i32 `beam_table` `[B, capacity]` and u8 `key_cache.<i>`,
    `value_cache.<i>`; of its state only v1's prompt layout stays.

    Args:
        model: a stateful model of this package, of any weight format.
        cache_precision: "bf16", "i8" (one scale for each token and head) or "f32".

    Raises:
        NativeBuildError: the native library is not there and cannot be built.
        ValueError: an unknown cache precision, or attention that is not built as in this package; the model is as
            it was.
    """
    if cache_precision not in CACHE_PRECISIONS:
        raise ValueError(f"cache_precision must be one of {', '.join(CACHE_PRECISIONS)}, found {cache_precision!r}")
    if cache_layout(model) is not None:
        return
    try:
        nodes = [node for node in model.get_ordered_ops() if node.get_type_name() == "ScaledDotProductAttention"]
        if not nodes:
            raise _Unrecognised("it has no ScaledDotProductAttention node")
        layers = [_match_layer(node) for node in nodes]
        mask = nodes[0].input_value(3)
        if any(node.input_value(3) != mask for node in nodes):
            raise _Unrecognised("its layers have different attention masks")
        if any((layer.cos, layer.sin) != (layers[0].cos, layers[0].sin) for layer in layers):
            raise _Unrecognised("its layers rotate by different angles")
        if len({bool(layer.prefix) for layer in layers}) != 1:
            raise _Unrecognised("some of its layers have a prefix and others have none")
        angles = _match_angles(layers[0].cos.get_node(), layers[0].sin.get_node())
        visible_to_all = _match_visible_to_all(mask.get_node(), model, bool(layers[0].prefix))
    except (_Unrecognised, RuntimeError) as reason:  # RuntimeError: a node without what was asked of it
        raise ValueError(f"the model's attention cannot be fused: {reason}") from None
    _replace(model, layers, angles, visible_to_all, cache_precision)


def cache_layout(model: ov.Model) -> CacheLayout | None:
    """The caches of a fused model, `None` for any other."""
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() == "ChatGLMAttention"]
    if not nodes:
        return None
    layers = tuple(tuple(node.input_value(i).get_node().get_friendly_name() for i in (5, 6)) for node in nodes)
    attributes = nodes[0].get_attributes()
    return CacheLayout(
        layers,
        int(attributes["num_key_value_heads"]),
        int(attributes["head_dim"]),
        attributes["cache_precision"],
        nodes[0].input(11).get_shape()[0] if nodes[0].get_input_size() > 11 else 0,
    )


def _source(node: Node, index: int = 0) -> Node:
    return node.input_value(index).get_node()


def _expect(node: Node, *types: str) -> Node:
    if node.get_type_name() not in types:
        raise _Unrecognised(f"{node.get_friendly_name()} is {node.get_type_name()}, not {' or '.join(types)}")
    return node


def _constant(node: Node) -> np.ndarray:
    """The value of a constant, also of one that the IR stores in half precision."""
    while node.get_type_name() == "Convert":
        node = _source(node)
    return _expect(node, "Constant").data


def _match_channels(node: Node) -> tuple[Node, int, int]:
    """A slice of the last axis: (whole, start, stop)."""
    _expect(node, "Slice")
    start, stop, step, axis = (int(_constant(_source(node, i)).ravel()[0]) for i in range(1, 5))
    if step != 1 or axis not in (-1, 3):
        raise _Unrecognised(f"{node.get_friendly_name()} is no slice of channels")
    return _source(node), start, stop


def _match_rotary(node: Node) -> _Rotary:
    """`x * cos + concat(-x2, x1) * sin` over the first channels of a head, or over all."""
    rotated, states = node, None
    if node.get_type_name() == "Concat":  # the rest of the head passes through
        rotated = _source(node, 0)
        states, rotary_dim, _ = _match_channels(_source(node, 1))
    _expect(rotated, "Add")
    plain, turned = (_expect(_source(rotated, i), "Multiply") for i in (0, 1))
    if _source(plain).get_type_name() == "Slice" and states is not None:
        whole, start, stop = _match_channels(_source(plain))
        if whole != states or (start, stop) != (0, rotary_dim):
            raise _Unrecognised(f"{node.get_friendly_name()} does not put a head together again")
    elif states is not None:
        raise _Unrecognised(f"{node.get_friendly_name()} is no partial rotary embedding")
    x = _source(plain)
    halves = _expect(_source(turned), "Concat")
    negated = _expect(_source(halves, 0), "Multiply")
    second, half, rotary_dim = _match_channels(_source(negated))
    first, start, stop = _match_channels(_source(halves, 1))
    if not (second == first == x and start == 0 and stop == half and rotary_dim == 2 * half):
        raise _Unrecognised(f"{turned.get_friendly_name()} is no half-split rotation")
    if float(_constant(_source(negated, 1)).ravel()[0]) != -1.0:
        raise _Unrecognised(f"{negated.get_friendly_name()} is no negation")
    return _Rotary(x if states is None else states, plain.input_value(1), turned.input_value(1))


def _match_angles(cos: Node, sin: Node) -> list[tuple[Node, np.ndarray]]:
    """Positions `[B, L]` and the frequencies that turn with them, in the order of the channels."""
    angles = _source(_expect(cos, "Cos"))
    if _source(_expect(sin, "Sin")) != angles:
        raise _Unrecognised("cosine and sine are of different angles")
    halves = [value.get_node() for value in _expect(angles, "Concat").input_values()]
    if len(halves) != 2 or halves[0] != halves[1]:
        raise _Unrecognised(f"{angles.get_friendly_name()} does not give both halves of a head the same angles")
    parts = halves[:1]
    if halves[0].get_type_name() == "Concat":
        parts = [value.get_node() for value in halves[0].input_values()]
    found = []
    for part in parts:
        positions = _unwrap(_source(_expect(_source(_expect(part, "Multiply")), "Convert")))
        found.append((positions, _constant(_source(part, 1)).ravel().astype(np.float32)))
    if len({len(inv_freq) for _, inv_freq in found}) != 1:
        raise _Unrecognised("the positions of a token turn different numbers of channels")
    return found


def _match_heads(node: Node) -> Node:
    """`[B, H, L, D]` made of `[B, L, H * D]`: the node whose input that is."""
    if _constant(_source(_expect(node, "Transpose"), 1)).tolist() != [0, 2, 1, 3]:
        raise _Unrecognised(f"{node.get_friendly_name()} does not split heads")
    return _expect(_source(node), "Reshape")


def _match_cache(node: Node) -> tuple[Node, np.ndarray | None]:
    """State variable with new tokens appended, heads repeated or not.

    Returns the new states `[B, G, L, D]` and the prefix `[1, G, P, D]` that the variable starts with, if any.
    """
    if node.get_type_name() == "Reshape":
        node = _source(_expect(_source(_expect(_source(node), "Broadcast")), "Unsqueeze"))
    _expect(node, "Concat")
    if node.get_attributes().get("axis") not in (2, -2):
        raise _Unrecognised(f"{node.get_friendly_name()} does not append tokens")
    reordered = _expect(_source(node, 0), "Gather")
    variable = _expect(_source(reordered), "ReadValue")
    start = _constant(_source(_expect(_source(variable), "Broadcast")))
    if start.size > 1 and (start.ndim != 4 or start.shape[0] != 1):
        raise _Unrecognised(f"state {variable.get_friendly_name()} starts with a tensor of shape {start.shape}")
    assignments = [
        target.get_node()
        for target in node.output(0).get_target_inputs()
        if target.get_node().get_type_name() == "Assign"
    ]
    if len(assignments) != 1:
        raise _Unrecognised(f"{node.get_friendly_name()} is not what one state variable keeps")
    return _source(node, 1), start if start.size > 1 else None


def _match_layer(attention: Node) -> _Layer:
    if attention.get_input_size() != 4 or attention.get_attributes().get("causal"):
        raise _Unrecognised(f"{attention.get_friendly_name()} does not have a mask, and a scale of head_dim ** -0.5")
    query = _match_rotary(_source(attention, 0))
    key_states, key_prefix = _match_cache(_source(attention, 1))
    value_states, value_prefix = _match_cache(_source(attention, 2))
    if (key_prefix is None) != (value_prefix is None):
        raise _Unrecognised(f"{attention.get_friendly_name()} has a prefix of keys or of values alone")
    key = _match_rotary(key_states)
    if key.cos != query.cos or key.sin != query.sin:
        raise _Unrecognised(f"{attention.get_friendly_name()} rotates queries and keys by different angles")
    consumers = [target.get_node() for target in attention.output(0).get_target_inputs()]
    if len(consumers) != 1 or consumers[0].get_type_name() != "Transpose":
        raise _Unrecognised(f"{attention.get_friendly_name()} is not followed by a transpose")
    merged = [target.get_node() for target in consumers[0].output(0).get_target_inputs()]
    if len(merged) != 1 or merged[0].get_type_name() != "Reshape":
        raise _Unrecognised(f"the heads of {attention.get_friendly_name()} are not merged")
    heads, head_dim = (attention.input(0).get_partial_shape()[i].get_length() for i in (1, 3))
    groups = key_states.output(0).get_partial_shape()[1].get_length()
    if head_dim % 16 or head_dim > MAX_HEAD_DIM:
        raise _Unrecognised(f"head_dim {head_dim} is not a multiple of 16 up to {MAX_HEAD_DIM}")
    return _Layer(
        attention,
        merged[0],
        _match_heads(query.states),
        _match_heads(key.states),
        _match_heads(value_states),
        query.cos,
        query.sin,
        [] if key_prefix is None else [key_prefix, value_prefix],
        heads,
        groups,
        head_dim,
    )


def _unwrap(node: Node) -> Node:
    while node.get_type_name() in ("Unsqueeze", "Reshape"):
        node = _source(node)
    return node


def _match_causal(node: Node) -> None:
    """Keys `0 .. total` at or before queries `.. total`, which as the last ones need no beginning."""
    keys, queries = (_expect(_unwrap(_source(_expect(node, "LessEqual"), i)), "Range") for i in (0, 1))
    starts_at_zero = _constant(_unwrap(_source(keys))).ravel().tolist() == [0]
    steps = [_constant(_source(positions, 2)).ravel().tolist() for positions in (keys, queries)]
    if not starts_at_zero or steps != [[1], [1]] or _unwrap(_source(keys, 1)) != _unwrap(_source(queries, 1)):
        raise _Unrecognised(f"{node.get_friendly_name()} is no causal rule")


def _match_visible_to_all(mask: Node, model: ov.Model, has_prefix: bool) -> Node | None:
    if has_prefix:
        mask = _source(_expect(mask, "Concat"), 1)  # behind zeros for the prefix
    visible = _expect(_source(_expect(mask, "Select")), "LogicalAnd")
    kept = _expect(_unwrap(_source(visible, 1)), "NotEqual")
    if _source(kept) != model.input("attention_mask").get_node():
        raise _Unrecognised(f"{kept.get_friendly_name()} does not read attention_mask")
    if _constant(_source(kept, 1)).ravel().tolist() != [0]:
        raise _Unrecognised(f"{kept.get_friendly_name()} does not hide what attention_mask has as 0")
    rule = _unwrap(_source(visible, 0))
    if rule.get_type_name() == "LogicalOr":
        _match_causal(_unwrap(_source(rule, 0)))
        return _expect(_unwrap(_source(rule, 1)), "Less")
    _match_causal(rule)
    return None


def _parameter(name: str, shape: list[int], element_type: Type) -> Node:
    parameter = ops.parameter(ov.PartialShape(shape), element_type, name=name)
    parameter.output(0).set_names({name})
    return parameter


def _replace(
    model: ov.Model,
    layers: list[_Layer],
    angles: list[tuple[Node, np.ndarray]],
    visible_to_all: Node | None,
    cache_precision: str,
) -> None:
    def axis(value: int) -> Node:
        return ops.constant(np.array([value], dtype=np.int64))

    input_ids, attention_mask = (model.input(name).get_node() for name in ("input_ids", "attention_mask"))
    batch, new = (ops.gather(ops.shape_of(input_ids, "i32"), axis(i), axis(0)) for i in (0, 1))
    past = ops.subtract(ops.gather(ops.shape_of(attention_mask, "i32"), axis(1), axis(0)), new)
    mask = ops.convert(attention_mask, "i32")
    if visible_to_all is None:
        context_length = ops.broadcast(ops.constant(np.int32(0)), batch)
    else:
        # Positions never decrease along a row, so these keys are the first ones.
        context_length = ops.reduce_sum(ops.convert(visible_to_all, "i32"), axis(1))
    if layers[0].prefix:
        prefix_tokens = ops.constant(np.array([layers[0].prefix[0].shape[2]], dtype=np.int32))
        past = ops.add(past, prefix_tokens)
        context_length = ops.add(context_length, prefix_tokens)
        ones = ops.broadcast(ops.constant(np.int32(1)), ops.concat([batch, prefix_tokens], axis=0))
        mask = ops.concat([ones, mask], axis=1)
    positions = ops.concat([ops.unsqueeze(ops.convert(node, "i32"), axis(0)) for node, _ in angles], axis=0)
    rotary = chatglm_rotary(positions.output(0), np.concatenate([inv_freq for _, inv_freq in angles]))
    beam_table = _parameter(BEAM_TABLE, [-1, -1], Type.i32)
    parameters = [beam_table]
    for i, layer in enumerate(layers):
        block = cache_block_bytes(cache_precision, layer.head_dim)
        caches = [
            _parameter(f"{kind}_cache.{i}", [-1, layer.num_key_value_heads, -1, block], Type.u8)
            for kind in ("key", "value")
        ]
        parameters += caches
        # Read now: the layer before may have just been replaced.
        inputs = [split.input_value(0) for split in (layer.query, layer.key, layer.value)]
        inputs += rotary.outputs()
        inputs += [node.output(0) for node in (*caches, past, beam_table, mask, context_length)]
        for prefix in layer.prefix:
            rows = prefix[0].transpose(1, 0, 2).reshape(prefix.shape[2], -1).astype(np.float32)
            inputs.append(ops.constant(rows).output(0))
        node = chatglm_attention(
            inputs,
            layer.num_attention_heads,
            layer.num_key_value_heads,
            layer.head_dim,
            layer.head_dim**-0.5,
            cache_precision,
        )
        node.set_friendly_name(layer.attention.get_friendly_name())
        for target in list(layer.merged.output(0).get_target_inputs()):
            target.replace_source_output(node.output(0))
    _remove_unread_state(model)
    model.add_parameters(parameters)
    model.validate_nodes_and_infer_types()


def _remove_unread_state(model: ov.Model) -> None:
    """Drops the state variables whose value no result, and no state that a result needs, depends on."""
    needed: dict[str, Node] = {}
    waiting: list[Node] = list(model.get_results())
    unread = {_variable_id(sink): sink for sink in model.get_sinks()}
    while waiting:
        node = waiting.pop()
        if node.get_name() in needed:
            continue
        needed[node.get_name()] = node
        waiting += [output.get_node() for output in node.input_values()]
        if node.get_type_name() == "ReadValue" and _variable_id(node) in unread:
            waiting.append(unread.pop(_variable_id(node)))
    for variable, assignment in unread.items():
        model.remove_sink(assignment)
        model.remove_variable(model.get_variable_by_id(variable))


def _variable_id(node: Node) -> str:
    return node.get_attributes()["variable_id"]
