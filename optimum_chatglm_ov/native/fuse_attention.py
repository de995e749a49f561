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
from openvino import Node, Type
from openvino import opset13 as ops

from .attention_patterns import AttentionPattern, UnrecognisedError, match_attention
from .library import cache_block_bytes, max_head_dim
from .operations import CACHE_PRECISIONS, AttentionInput, chatglm_attention, chatglm_rotary


BEAM_TABLE = "beam_table"


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
        """Returns the shape of one cache, u8."""
        return rows, self.num_key_value_heads, blocks, cache_block_bytes(self.cache_precision, self.head_dim)


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
        pattern = match_attention(model)
    except (UnrecognisedError, RuntimeError) as reason:
        raise ValueError(f"the model's attention cannot be fused: {reason}") from None
    largest = max_head_dim()
    for layer in pattern.layers:
        if layer.head_dim % 16 or layer.head_dim > largest:
            raise ValueError(
                f"the model's attention cannot be fused: head_dim {layer.head_dim} is not a multiple of 16 up to "
                f"{largest}"
            )
    _replace(model, pattern, cache_precision)


def cache_layout(model: ov.Model) -> CacheLayout | None:
    """Reads the caches of a fused model off its inputs; `None` for any other model."""
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() == "ChatGLMAttention"]
    if not nodes:
        return None
    caches = AttentionInput.KEY_CACHE, AttentionInput.VALUE_CACHE
    layers = tuple(tuple(node.input_value(i).get_node().get_friendly_name() for i in caches) for node in nodes)
    attributes = nodes[0].get_attributes()
    has_prefix = nodes[0].get_input_size() > AttentionInput.PREFIX_KEYS
    return CacheLayout(
        layers,
        int(attributes["num_key_value_heads"]),
        int(attributes["head_dim"]),
        attributes["cache_precision"],
        nodes[0].input(AttentionInput.PREFIX_KEYS).get_shape()[0] if has_prefix else 0,
    )


def _parameter(name: str, shape: list[int], element_type: Type) -> Node:
    parameter = ops.parameter(ov.PartialShape(shape), element_type, name=name)
    parameter.output(0).set_names({name})
    return parameter


def _replace(model: ov.Model, pattern: AttentionPattern, cache_precision: str) -> None:
    layers, angles, visible_to_all = pattern.layers, pattern.angles, pattern.visible_to_all

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
