# SPDX-License-Identifier: Apache-2.0
"""What the graphs of all architectures have in common: weights by name, caches, ends."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import openvino as ov
from openvino import Node

from ..checkpoint.weights import Weight
from . import blocks
from .architecture import Architecture
from .blocks import Graph


class Decoder:
    """The graph of one model in the making; an architecture's own class says how its layers compute.

    Args:
        architecture: what the graph is of.
        weights: tensors by canonical name; constants of the graph share their memory.
        prefix: keys and values of a P-Tuning v2 prefix, f32 `[layers, 2, G, P, D]`.
    """

    def __init__(self, architecture: Architecture, weights: Mapping[str, Weight], prefix: np.ndarray | None = None):
        self.config = architecture.config
        self.key_channels = architecture.key_channels()
        self.weights = weights
        self.prefix = prefix
        self.graph = Graph()

    def layer(self, hidden_states: Node, i: int) -> Node:
        """Computes layer `i`: `[B, L, hidden]` -> `[B, L, hidden]`."""
        raise NotImplementedError

    def norm(self, hidden_states: Node, module: str) -> Node:
        """Computes the norm `module` of `[B, L, hidden]`."""
        raise NotImplementedError

    def model(self, name: str, has_final_norm: bool = True) -> ov.Model:
        """Finishes the model: embedding, layers, norm and output layer, which may be the embedding's own table."""
        table = self.weight("embed_tokens.weight")
        hidden_states = blocks.embedding(self.graph.input_ids, table)
        for i in range(self.config.num_hidden_layers):
            hidden_states = self.layer(hidden_states, i)
        if has_final_norm:
            hidden_states = self.norm(hidden_states, "norm")
        if not self.config.tie_word_embeddings:
            table = self.weight("lm_head.weight")
        return self.graph.model(blocks.linear(hidden_states, table, None, "lm_head"), name)

    def weight(self, tensor: str, rows: slice | np.ndarray = slice(None), name: str | None = None) -> Node:
        """Returns the tensor of that canonical name, or some of its rows, f32, as `name`."""
        return self.graph.weight(self.weights[tensor].rows(rows), name or tensor)

    def linear(
        self, hidden_states: Node, module: str, rows: slice | np.ndarray = slice(None), name: str | None = None
    ) -> Node:
        """Computes the linear layer `module`, or some of its outputs, as `name`: `[B, L, in]` -> `[B, L, out]`."""
        name = name or module
        matrix = self.weight(f"{module}.weight", rows, f"{name}.weight")
        has_bias = f"{module}.bias" in self.weights
        bias = self.weight(f"{module}.bias", rows, f"{name}.bias") if has_bias else None
        return blocks.linear(hidden_states, matrix, bias, name)

    def rms_norm(self, hidden_states: Node, module: str) -> Node:
        """Computes the root mean square norm `module` of `[B, L, hidden]`."""
        return blocks.rms_norm(hidden_states, self.weight(f"{module}.weight"), self.config.rms_norm_eps)

    def layer_norm(self, hidden_states: Node, module: str) -> Node:
        """Computes the layer norm `module` of `[B, L, hidden]`."""
        scale, bias = (self.weight(f"{module}.{kind}") for kind in ("weight", "bias"))
        return blocks.layer_norm(hidden_states, scale, bias, self.config.rms_norm_eps)

    def gated_mlp(self, hidden_states: Node, i: int) -> Node:
        """Computes SwiGLU (Shazeer 2020); the first half of the merged projection is the gate."""
        name, size = f"layers.{i}.mlp", self.config.intermediate_size
        gate = self.linear(hidden_states, f"{name}.gate_up_proj", slice(0, size), f"{name}.gate_proj")
        up = self.linear(hidden_states, f"{name}.gate_up_proj", slice(size, None), f"{name}.up_proj")
        return self.linear(blocks.swiglu(gate, up), f"{name}.down_proj")

    def cached_attention(self, query: Node, key: Node, value: Node, mask: Node, i: int) -> Node:
        """Computes attention of layer `i` over cached and new keys: `[B, H or G, L, D]` -> `[B, L, H * D]`.

        Query head j reads key/value head j // (H / G).
        """
        config = self.config
        heads, groups, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
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
        return blocks.attention(query, key, value, mask)
