# SPDX-License-Identifier: Apache-2.0
"""ChatGLM2, ChatGLM3, GLM-4 and CodeGeeX2/4 (`ChatGLMForConditionalGeneration` of chatglm2-6b and later)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import openvino as ov
from openvino import Node
from openvino import opset13 as ops

from ..checkpoint.weights import Weight
from . import blocks
from .architecture import Architecture
from .decoder import Decoder
from .modules import Module, prefix_encoder


# chatglm3-6b-128k was trained on this many tokens before its queries were scaled for longer contexts.
_QUERY_LOG_SCALING_LENGTH = 2048


class ChatGLM2(Architecture):
    """The architecture of `ChatGLMConfig(architecture="chatglm2")`."""

    def modules(self) -> tuple[Module, ...]:
        config = self.config
        hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
        query = config.num_attention_heads * config.head_dim
        qkv = query + 2 * config.num_key_value_heads * config.head_dim
        norm_bias, bias = not config.rmsnorm, config.add_bias_linear
        layer = "transformer.encoder.layers.{i}"
        modules: tuple[Module, ...] = (
            Module("embed_tokens", "transformer.embedding.word_embeddings", (vocab, hidden)),
            Module("layers.{i}.input_layernorm", f"{layer}.input_layernorm", (hidden,), norm_bias),
            Module(
                "layers.{i}.self_attn.qkv_proj",
                f"{layer}.self_attention.query_key_value",
                (qkv, hidden),
                bias or config.add_qkv_bias,
            ),
            Module("layers.{i}.self_attn.o_proj", f"{layer}.self_attention.dense", (hidden, query), bias),
            Module("layers.{i}.post_attention_layernorm", f"{layer}.post_attention_layernorm", (hidden,), norm_bias),
            Module("layers.{i}.mlp.gate_up_proj", f"{layer}.mlp.dense_h_to_4h", (2 * inner, hidden), bias),
            Module("layers.{i}.mlp.down_proj", f"{layer}.mlp.dense_4h_to_h", (hidden, inner), bias),
        )
        if config.post_layer_norm:
            modules += (Module("norm", "transformer.encoder.final_layernorm", (hidden,), norm_bias),)
        return (*modules, Module("lm_head", "transformer.output_layer", (vocab, hidden)))

    def prefix_modules(self) -> tuple[Module, ...]:
        return prefix_encoder(self.config, "transformer.prefix_encoder")

    def key_channels(self) -> np.ndarray:
        """Reorders interleaved pairs to half-split ones in the first half of a head, which alone rotates."""
        return blocks.half_split_channels(self.config.head_dim, self.config.head_dim // 2)

    def build(self, weights: Mapping[str, Weight], prefix: np.ndarray | None = None) -> ov.Model:
        return _Decoder(self, weights, prefix).model("chatglm2", has_final_norm=self.config.post_layer_norm)


class _Decoder(Decoder):
    def __init__(self, architecture: Architecture, weights: Mapping[str, Weight], prefix: np.ndarray | None):
        super().__init__(architecture, weights, prefix)
        config = self.config
        self.rotary_dim = config.head_dim // 2
        inv_freq = config.rope_theta ** -(np.arange(0, self.rotary_dim, 2, dtype=np.float64) / self.rotary_dim)
        self.rotary = blocks.rotary_embedding(self.graph.position_ids, inv_freq / config.rope_position_scale)
        self.mask = blocks.causal_mask(self.graph, 0 if prefix is None else prefix.shape[3])
        self.query_scale = None
        if config.query_log_scaling:
            self.query_scale = blocks.query_log_scale(self.graph.position_ids, _QUERY_LOG_SCALING_LENGTH)

    def layer(self, hidden_states: Node, i: int) -> Node:
        normed = self.norm(hidden_states, f"layers.{i}.input_layernorm")
        residual = normed if self.config.apply_residual_connection_post_layernorm else hidden_states
        hidden_states = ops.add(residual, self.attention(normed, i))
        normed = self.norm(hidden_states, f"layers.{i}.post_attention_layernorm")
        residual = normed if self.config.apply_residual_connection_post_layernorm else hidden_states
        return ops.add(residual, self.gated_mlp(normed, i))

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
        return self.linear(self.cached_attention(query, key, value, self.mask, i), f"{name}.o_proj")

    def qkv_rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | slice]:
        """Returns the rows of the fused projection that are query, key and value, rotary pairs half-split.

        With `multi_query_attention` the rows are all queries, all keys, all values; without it, per head query, key
        and value.
        """
        config = self.config
        heads, groups, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        rotated = self.key_channels
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

    def norm(self, hidden_states: Node, module: str) -> Node:
        norm = self.rms_norm if self.config.rmsnorm else self.layer_norm
        return norm(hidden_states, module)


ARCHITECTURE = ChatGLM2
