# SPDX-License-Identifier: Apache-2.0
"""ChatGLM2, ChatGLM3, GLM-4 and CodeGeeX2/4 (`ChatGLMForConditionalGeneration` of chatglm2-6b and later)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import openvino as ov
from openvino import Node
from openvino import opset13 as ops

from ..checkpoint.checkpoint import Weight
from ..configuration import ChatGLMConfig
from . import blocks
from .blocks import Graph


# chatglm3-6b-128k was trained on this many tokens before its queries were scaled for longer contexts.
_QUERY_LOG_SCALING_LENGTH = 2048


def tensor_shapes(config: ChatGLMConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the checkpoint, by canonical name."""
    hidden, head_dim = config.hidden_size, config.head_dim
    query = config.num_attention_heads * head_dim
    qkv = query + 2 * config.num_key_value_heads * head_dim
    norms = ("weight",) if config.rmsnorm else ("weight", "bias")
    linears = {
        "self_attn.qkv_proj": (qkv, hidden, config.add_bias_linear or config.add_qkv_bias),
        "self_attn.o_proj": (hidden, query, config.add_bias_linear),
        "mlp.gate_up_proj": (2 * config.intermediate_size, hidden, config.add_bias_linear),
        "mlp.down_proj": (hidden, config.intermediate_size, config.add_bias_linear),
    }
    shapes = {"embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"layers.{i}.{norm}.{kind}": (hidden,) for kind in norms}
        for module, (rows, columns, has_bias) in linears.items():
            shapes[f"layers.{i}.{module}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"layers.{i}.{module}.bias"] = (rows,)
    if config.post_layer_norm:
        shapes |= {f"norm.{kind}": (hidden,) for kind in norms}
    return shapes | {"lm_head.weight": (config.vocab_size, hidden)}


def key_channels(config: ChatGLMConfig) -> np.ndarray:
    """Which channel of the checkpoint's heads each channel of the graph's queries and keys is, `[head_dim]`.

    Only the first half of a head rotates; its interleaved pairs are reordered to half-split ones.
    """
    channels = np.arange(config.head_dim)
    rotary_dim = config.head_dim // 2
    return np.concatenate((blocks.half_split_order(channels[:rotary_dim]), channels[rotary_dim:]))


def build(config: ChatGLMConfig, weights: Mapping[str, Weight], prefix: np.ndarray | None = None) -> ov.Model:
    """The stateful graph.

    Args:
        config: the configuration.
        weights: tensors by canonical name; constants of the graph share their memory.
        prefix: keys and values of a P-Tuning v2 prefix, f32 `[layers, 2, G, P, D]`.
    """
    return _Assembly(config, weights, prefix).model()


class _Assembly:
    def __init__(self, config: ChatGLMConfig, weights: Mapping[str, Weight], prefix: np.ndarray | None):
        self.config = config
        self.weights = weights
        self.prefix = prefix
        self.graph = Graph()
        self.rotary_dim = config.head_dim // 2
        inv_freq = config.rope_theta ** -(np.arange(0, self.rotary_dim, 2, dtype=np.float64) / self.rotary_dim)
        self.rotary = blocks.rotary_embedding(self.graph.position_ids, inv_freq / config.rope_position_scale)
        self.mask = blocks.causal_mask(self.graph, 0 if prefix is None else prefix.shape[3])
        self.query_scale = (
            blocks.query_log_scale(self.graph, _QUERY_LOG_SCALING_LENGTH) if config.query_log_scaling else None
        )

    def model(self) -> ov.Model:
        table = self.graph.weight(self.weights["embed_tokens.weight"], "embed_tokens.weight")
        hidden_states = blocks.embedding(self.graph.input_ids, table)
        for i in range(self.config.num_hidden_layers):
            hidden_states = self.layer(hidden_states, i)
        if self.config.post_layer_norm:
            hidden_states = self.norm(hidden_states, "norm")
        logits = blocks.linear(
            hidden_states, self.graph.weight(self.weights["lm_head.weight"], "lm_head.weight"), None, "lm_head"
        )
        return self.graph.model(logits, "chatglm2")

    def layer(self, hidden_states: Node, i: int) -> Node:
        normed = self.norm(hidden_states, f"layers.{i}.input_layernorm")
        residual = normed if self.config.apply_residual_connection_post_layernorm else hidden_states
        hidden_states = ops.add(residual, self.attention(normed, i))
        normed = self.norm(hidden_states, f"layers.{i}.post_attention_layernorm")
        residual = normed if self.config.apply_residual_connection_post_layernorm else hidden_states
        return ops.add(residual, self.mlp(normed, i))

    def attention(self, hidden_states: Node, i: int) -> Node:
        config, name = self.config, f"layers.{i}.self_attn"
        heads, groups, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        query, key, value = (
            self.linear(hidden_states, f"{name}.qkv_proj", rows, f"{name}.{part}_proj")
            for part, rows in zip("qkv", self.qkv_rows())
        )
        if self.query_scale is not None:
            query = ops.multiply(query, self.query_scale)
        query = blocks.apply_rotary(
            blocks.split_heads(query, heads, head_dim), *self.rotary, self.rotary_dim, head_dim
        )
        key = blocks.apply_rotary(blocks.split_heads(key, groups, head_dim), *self.rotary, self.rotary_dim, head_dim)
        value = blocks.split_heads(value, groups, head_dim)
        key, value = (
            blocks.repeat_key_value(
                blocks.key_value_cache(
                    self.graph,
                    states,
                    f"past_key_values.{i}.{kind}present.{i}.{kind}",
                    groups,
                    head_dim,
                    None if self.prefix is None else self.prefix[i, index],
                ),
                groups,
                heads,
                head_dim,
            )
            for index, (kind, states) in enumerate((("key", key), ("value", value)))
        )
        return self.linear(blocks.attention(query, key, value, self.mask), f"{name}.o_proj")

    def qkv_rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | slice]:
        """Rows of the fused projection that are query, key and value, rotary pairs reordered to half-split.

        With `multi_query_attention` the rows are all queries, all keys, all values; without it, per head query, key
        and value.
        """
        config = self.config
        heads, groups, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        rotated = key_channels(config)
        if config.multi_query_attention:
            first_key = heads * head_dim
            first_value = first_key + groups * head_dim
            query = np.arange(heads)[:, None] * head_dim + rotated
            key = first_key + np.arange(groups)[:, None] * head_dim + rotated
            return query.ravel(), key.ravel(), slice(first_value, None)
        first = np.arange(heads)[:, None] * 3 * head_dim
        return (
            (first + rotated).ravel(),
            (first + head_dim + rotated).ravel(),
            (first + 2 * head_dim + np.arange(head_dim)).ravel(),
        )

    def mlp(self, hidden_states: Node, i: int) -> Node:
        """SwiGLU (Shazeer 2020): the first half of the fused projection is the gate."""
        name, size = f"layers.{i}.mlp", self.config.intermediate_size
        gate = self.linear(hidden_states, f"{name}.gate_up_proj", slice(0, size), f"{name}.gate_proj")
        up = self.linear(hidden_states, f"{name}.gate_up_proj", slice(size, None), f"{name}.up_proj")
        return self.linear(ops.multiply(ops.swish(gate), up), f"{name}.down_proj")

    def linear(
        self, hidden_states: Node, module: str, rows: slice | np.ndarray = slice(None), name: str | None = None
    ) -> Node:
        name = name or module
        bias = f"{module}.bias"
        return blocks.linear(
            hidden_states,
            self.graph.weight(self.weights[f"{module}.weight"].rows(rows), f"{name}.weight"),
            self.graph.weight(self.weights[bias].rows(rows), f"{name}.bias") if bias in self.weights else None,
            name,
        )

    def norm(self, hidden_states: Node, module: str) -> Node:
        eps = self.config.layernorm_epsilon
        scale = self.graph.weight(self.weights[f"{module}.weight"], f"{module}.weight")
        if self.config.rmsnorm:
            return blocks.rms_norm(hidden_states, scale, eps)
        return blocks.layer_norm(
            hidden_states, scale, self.graph.weight(self.weights[f"{module}.bias"], f"{module}.bias"), eps
        )
