# SPDX-License-Identifier: Apache-2.0
"""GLM-4-0414 and GLM-Z1 (`Glm4ForCausalLM` of transformers): GLM with norms behind attention and MLP, too."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import openvino as ov
from openvino import Node
from openvino import opset13 as ops

from ..checkpoint.weights import Weight
from .glm import Glm, GlmDecoder


class Glm4(Glm):
    """The architecture of `Glm4Config`."""

    norms = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")

    def build(self, weights: Mapping[str, Weight], prefix: np.ndarray | None = None) -> ov.Model:
        return _Decoder(self, weights, prefix).model(self.config.model_type)


class _Decoder(GlmDecoder):
    def layer(self, hidden_states: Node, i: int) -> Node:
        normed = self.rms_norm(hidden_states, f"layers.{i}.input_layernorm")
        attended = self.rms_norm(self.attention(normed, i), f"layers.{i}.post_self_attn_layernorm")
        hidden_states = ops.add(hidden_states, attended)
        normed = self.rms_norm(hidden_states, f"layers.{i}.post_attention_layernorm")
        return ops.add(hidden_states, self.rms_norm(self.gated_mlp(normed, i), f"layers.{i}.post_mlp_layernorm"))


ARCHITECTURE = Glm4
