# SPDX-License-Identifier: Apache-2.0
"""The `-hf` checkpoints of GLM-4 and GLM-Edge (`GlmForCausalLM` of transformers)."""

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
from .modules import Module
from .rope import rotary_embedding_of, settle_context_length


class Glm(Architecture):
    """The architecture of `GlmConfig`."""

    norms = ("input_layernorm", "post_attention_layernorm")

    def modules(self) -> tuple[Module, ...]:
        config = self.config
        hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
        query, key = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        layer = "layers.{i}"
        modules: tuple[Module, ...] = (
            Module("embed_tokens", "model.embed_tokens", (vocab, hidden)),
            *(Module(f"{layer}.{norm}", f"model.{layer}.{norm}", (hidden,)) for norm in self.norms),
            *(
                Module(f"{layer}.{name}", f"model.{layer}.{name}", shape, bias)
                for name, shape, bias in (
                    ("self_attn.q_proj", (query, hidden), config.attention_bias),
                    ("self_attn.k_proj", (key, hidden), config.attention_bias),
                    ("self_attn.v_proj", (key, hidden), config.attention_bias),
                    ("self_attn.o_proj", (hidden, query), False),
                    ("mlp.gate_up_proj", (2 * inner, hidden), False),
                    ("mlp.down_proj", (hidden, inner), False),
                )
            ),
            Module("norm", "model.norm", (hidden,)),
        )
        return modules if config.tie_word_embeddings else (*modules, Module("lm_head", "lm_head", (vocab, hidden)))

    def settle_config(self) -> None:
        config = self.config
        for key, expected in (("hidden_act", ("silu", "swish")), ("quantization_config", (None,))):
            if getattr(config, key, None) not in expected:
                raise ValueError(
                    f"`{key}` is {getattr(config, key)!r}, which {config.model_type} is not exported with; expected "
                    f"{' or '.join(map(repr, expected))}."
                )
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        if not groups or heads % groups:
            raise ValueError(f"`num_attention_heads`={heads} is not a multiple of `num_key_value_heads`={groups}.")
        if not config.head_dim:
            raise ValueError(f"`head_dim` is {config.head_dim!r}; expected the number of channels of a head.")
        settle_context_length(config)

    def key_channels(self) -> np.ndarray:
        """Reorders interleaved rotary pairs to half-split ones; the channels behind them stay."""
        return blocks.half_split_channels(self.config.head_dim, rotary_embedding_of(self.config).rotary_dim)

    def build(self, weights: Mapping[str, Weight], prefix: np.ndarray | None = None) -> ov.Model:
        return GlmDecoder(self, weights, prefix).model(self.config.model_type)


class GlmDecoder(Decoder):
    """The graph of `GlmForCausalLM`."""

    def __init__(self, architecture: Architecture, weights: Mapping[str, Weight], prefix: np.ndarray | None):
        super().__init__(architecture, weights, prefix)
        embedding = rotary_embedding_of(self.config)
        self.rotary_dim, self.attention_factor = embedding.rotary_dim, embedding.attention_factor
        if prefix is not None:  # what `query_scale` has twice, keys of a prefix, which do not turn, have not at all
            self.prefix = prefix.copy()
            self.prefix[:, 0, ..., : self.rotary_dim] /= self.attention_factor
        self.rotary = blocks.rotary_embedding(self.graph.position_ids, embedding.inv_freq)
        self.mask = blocks.causal_mask(self.graph, 0 if prefix is None else prefix.shape[3])

    def layer(self, hidden_states: Node, i: int) -> Node:
        normed = self.rms_norm(hidden_states, f"layers.{i}.input_layernorm")
        hidden_states = ops.add(hidden_states, self.attention(normed, i))
        normed = self.rms_norm(hidden_states, f"layers.{i}.post_attention_layernorm")
        return ops.add(hidden_states, self.gated_mlp(normed, i))

    def attention(self, hidden_states: Node, i: int) -> Node:
        """Computes attention with grouped queries; the first channels of a head rotate."""
        name, config = f"layers.{i}.self_attn", self.config
        heads, groups, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        query = self.linear(hidden_states, f"{name}.q_proj", self.rotated_rows(heads))
        if self.attention_factor != 1:
            query = ops.multiply(query, blocks.f32(self.query_scale()))
        key = self.linear(hidden_states, f"{name}.k_proj", self.rotated_rows(groups))
        query, key = (
            blocks.apply_rotary(blocks.split_heads(states, count, head_dim), *self.rotary, self.rotary_dim, head_dim)
            for states, count in ((query, heads), (key, groups))
        )
        value = blocks.split_heads(self.linear(hidden_states, f"{name}.v_proj"), groups, head_dim)
        return self.linear(self.cached_attention(query, key, value, self.mask, i), f"{name}.o_proj")

    def rotated_rows(self, heads: int) -> np.ndarray:
        """Returns the rows of a projection to `heads` heads, rotary pairs reordered to half-split."""
        return (np.arange(heads)[:, None] * self.config.head_dim + self.key_channels).ravel()

    def query_scale(self) -> np.ndarray:
        """Computes the factor of each channel of the queries, f32 `[H * D]`.

        The original multiplies the rotated channels of queries and keys by the attention factor of YaRN each; here
        queries have it twice and keys stay, which gives the same products.
        """
        scale = np.ones(self.config.head_dim, dtype=np.float32)
        scale[: self.rotary_dim] = self.attention_factor**2
        return np.tile(scale, self.config.num_attention_heads)

    def norm(self, hidden_states: Node, module: str) -> Node:
        return self.rms_norm(hidden_states, module)


ARCHITECTURE = Glm
