# SPDX-License-Identifier: Apache-2.0
"""Attention as this package exports it, found in a graph by its structure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import openvino as ov
from openvino import Node, Output


class UnrecognisedError(Exception):
    """Some part of the graph is not what the pass knows; the message says which."""


@dataclass
class _Rotary:
    states: Node  # [B, H, L, D], before the rotation
    cos: Output
    sin: Output


@dataclass
class AttentionLayer:
    """What one layer computes its attention from."""

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


@dataclass
class AttentionPattern:
    """The attention of all layers of a model, which share masks and angles."""

    layers: list[AttentionLayer]
    angles: list[tuple[Node, np.ndarray]]
    """Positions `[B, L]` and the frequencies that turn with them, in the order of the channels."""
    visible_to_all: Node | None
    """Whether a key is visible to every query, bool; `None` in models where none is."""


def match_attention(model: ov.Model) -> AttentionPattern:
    """Finds the attention of `model`.

    Raises:
        UnrecognisedError: it is built otherwise.
        RuntimeError: a node has not what was asked of it.
    """
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() == "ScaledDotProductAttention"]
    if not nodes:
        raise UnrecognisedError("it has no ScaledDotProductAttention node")
    layers = [_match_layer(node) for node in nodes]
    mask = nodes[0].input_value(3)
    if any(node.input_value(3) != mask for node in nodes):
        raise UnrecognisedError("its layers have different attention masks")
    if any((layer.cos, layer.sin) != (layers[0].cos, layers[0].sin) for layer in layers):
        raise UnrecognisedError("its layers rotate by different angles")
    if len({bool(layer.prefix) for layer in layers}) != 1:
        raise UnrecognisedError("some of its layers have a prefix and others have none")
    angles = _match_angles(layers[0].cos.get_node(), layers[0].sin.get_node())
    visible_to_all = _match_visible_to_all(mask.get_node(), model, bool(layers[0].prefix))
    return AttentionPattern(layers, angles, visible_to_all)


def _source(node: Node, index: int = 0) -> Node:
    return node.input_value(index).get_node()


def _expect(node: Node, *types: str) -> Node:
    if node.get_type_name() not in types:
        raise UnrecognisedError(f"{node.get_friendly_name()} is {node.get_type_name()}, not {' or '.join(types)}")
    return node


def _constant(node: Node) -> np.ndarray:
    """Reads a constant, also one that the IR stores in half precision."""
    while node.get_type_name() == "Convert":
        node = _source(node)
    return _expect(node, "Constant").data


def _match_channels(node: Node) -> tuple[Node, int, int]:
    """Finds a slice of the last axis: (whole, start, stop)."""
    _expect(node, "Slice")
    start, stop, step, axis = (int(_constant(_source(node, i)).ravel()[0]) for i in range(1, 5))
    if step != 1 or axis not in (-1, 3):
        raise UnrecognisedError(f"{node.get_friendly_name()} is no slice of channels")
    return _source(node), start, stop


def _match_rotary(node: Node) -> _Rotary:
    """Finds `x * cos + concat(-x2, x1) * sin` over the first channels of a head, or over all."""
    rotated, states = node, None
    if node.get_type_name() == "Concat":  # the rest of the head passes through
        rotated = _source(node, 0)
        states, rotary_dim, _ = _match_channels(_source(node, 1))
    _expect(rotated, "Add")
    plain, turned = (_expect(_source(rotated, i), "Multiply") for i in (0, 1))
    if _source(plain).get_type_name() == "Slice" and states is not None:
        whole, start, stop = _match_channels(_source(plain))
        if whole != states or (start, stop) != (0, rotary_dim):
            raise UnrecognisedError(f"{node.get_friendly_name()} does not put a head together again")
    elif states is not None:
        raise UnrecognisedError(f"{node.get_friendly_name()} is no partial rotary embedding")
    x = _source(plain)
    halves = _expect(_source(turned), "Concat")
    negated = _expect(_source(halves, 0), "Multiply")
    second, half, rotary_dim = _match_channels(_source(negated))
    first, start, stop = _match_channels(_source(halves, 1))
    if not (second == first == x and start == 0 and stop == half and rotary_dim == 2 * half):
        raise UnrecognisedError(f"{turned.get_friendly_name()} is no half-split rotation")
    if float(_constant(_source(negated, 1)).ravel()[0]) != -1.0:
        raise UnrecognisedError(f"{negated.get_friendly_name()} is no negation")
    return _Rotary(x if states is None else states, plain.input_value(1), turned.input_value(1))


def _match_angles(cos: Node, sin: Node) -> list[tuple[Node, np.ndarray]]:
    """Finds positions `[B, L]` and the frequencies that turn with them, in the order of the channels."""
    angles = _source(_expect(cos, "Cos"))
    if _source(_expect(sin, "Sin")) != angles:
        raise UnrecognisedError("cosine and sine are of different angles")
    halves = [value.get_node() for value in _expect(angles, "Concat").input_values()]
    if len(halves) != 2 or halves[0] != halves[1]:
        raise UnrecognisedError(f"{angles.get_friendly_name()} does not give both halves of a head the same angles")
    parts = halves[:1]
    if halves[0].get_type_name() == "Concat":
        parts = [value.get_node() for value in halves[0].input_values()]
    found = []
    for part in parts:
        positions = _unwrap(_source(_expect(_source(_expect(part, "Multiply")), "Convert")))
        found.append((positions, _constant(_source(part, 1)).ravel().astype(np.float32)))
    if len({len(inv_freq) for _, inv_freq in found}) != 1:
        raise UnrecognisedError("the positions of a token turn different numbers of channels")
    return found


def _match_heads(node: Node) -> Node:
    """Finds the node of which `[B, L, H * D]` is made `[B, H, L, D]`."""
    if _constant(_source(_expect(node, "Transpose"), 1)).tolist() != [0, 2, 1, 3]:
        raise UnrecognisedError(f"{node.get_friendly_name()} does not split heads")
    return _expect(_source(node), "Reshape")


def _match_cache(node: Node) -> tuple[Node, np.ndarray | None]:
    """Finds a state variable with new tokens appended, heads repeated or not.

    Returns the new states `[B, G, L, D]` and the prefix `[1, G, P, D]` that the variable starts with, if any.
    """
    if node.get_type_name() == "Reshape":
        node = _source(_expect(_source(_expect(_source(node), "Broadcast")), "Unsqueeze"))
    _expect(node, "Concat")
    if node.get_attributes().get("axis") not in (2, -2):
        raise UnrecognisedError(f"{node.get_friendly_name()} does not append tokens")
    reordered = _expect(_source(node, 0), "Gather")
    variable = _expect(_source(reordered), "ReadValue")
    start = _constant(_source(_expect(_source(variable), "Broadcast")))
    if start.size > 1 and (start.ndim != 4 or start.shape[0] != 1):
        raise UnrecognisedError(f"state {variable.get_friendly_name()} starts with a tensor of shape {start.shape}")
    assignments = [
        target.get_node()
        for target in node.output(0).get_target_inputs()
        if target.get_node().get_type_name() == "Assign"
    ]
    if len(assignments) != 1:
        raise UnrecognisedError(f"{node.get_friendly_name()} is not what one state variable keeps")
    return _source(node, 1), start if start.size > 1 else None


def _match_layer(attention: Node) -> AttentionLayer:
    if attention.get_input_size() != 4 or attention.get_attributes().get("causal"):
        raise UnrecognisedError(
            f"{attention.get_friendly_name()} does not have a mask, and a scale of head_dim ** -0.5"
        )
    query = _match_rotary(_source(attention, 0))
    key_states, key_prefix = _match_cache(_source(attention, 1))
    value_states, value_prefix = _match_cache(_source(attention, 2))
    if (key_prefix is None) != (value_prefix is None):
        raise UnrecognisedError(f"{attention.get_friendly_name()} has a prefix of keys or of values alone")
    key = _match_rotary(key_states)
    if key.cos != query.cos or key.sin != query.sin:
        raise UnrecognisedError(f"{attention.get_friendly_name()} rotates queries and keys by different angles")
    consumers = [target.get_node() for target in attention.output(0).get_target_inputs()]
    if len(consumers) != 1 or consumers[0].get_type_name() != "Transpose":
        raise UnrecognisedError(f"{attention.get_friendly_name()} is not followed by a transpose")
    merged = [target.get_node() for target in consumers[0].output(0).get_target_inputs()]
    if len(merged) != 1 or merged[0].get_type_name() != "Reshape":
        raise UnrecognisedError(f"the heads of {attention.get_friendly_name()} are not merged")
    heads, head_dim = (attention.input(0).get_partial_shape()[i].get_length() for i in (1, 3))
    groups = key_states.output(0).get_partial_shape()[1].get_length()
    return AttentionLayer(
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
    """Checks that keys `0 .. total` are at or before queries `.. total`, which as the last ones need no beginning."""
    keys, queries = (_expect(_unwrap(_source(_expect(node, "LessEqual"), i)), "Range") for i in (0, 1))
    starts_at_zero = _constant(_unwrap(_source(keys))).ravel().tolist() == [0]
    steps = [_constant(_source(positions, 2)).ravel().tolist() for positions in (keys, queries)]
    if not starts_at_zero or steps != [[1], [1]] or _unwrap(_source(keys, 1)) != _unwrap(_source(queries, 1)):
        raise UnrecognisedError(f"{node.get_friendly_name()} is no causal rule")


def _match_visible_to_all(mask: Node, model: ov.Model, has_prefix: bool) -> Node | None:
    if has_prefix:
        mask = _source(_expect(mask, "Concat"), 1)  # behind zeros for the prefix
    visible = _expect(_source(_expect(mask, "Select")), "LogicalAnd")
    kept = _expect(_unwrap(_source(visible, 1)), "NotEqual")
    if _source(kept) != model.input("attention_mask").get_node():
        raise UnrecognisedError(f"{kept.get_friendly_name()} does not read attention_mask")
    if _constant(_source(kept, 1)).ravel().tolist() != [0]:
        raise UnrecognisedError(f"{kept.get_friendly_name()} does not hide what attention_mask has as 0")
    rule = _unwrap(_source(visible, 0))
    if rule.get_type_name() == "LogicalOr":
        _match_causal(_unwrap(_source(rule, 0)))
        return _expect(_unwrap(_source(rule, 1)), "Less")
    _match_causal(rule)
    return None
