# SPDX-License-Identifier: Apache-2.0
"""ChatGLM architectures as OpenVINO graphs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import openvino as ov

from ..checkpoint.checkpoint import Weight
from ..configuration import ChatGLMConfig
from . import chatglm, chatglm2


ARCHITECTURES = {"chatglm": chatglm, "chatglm2": chatglm2}


def tensor_shapes(config: ChatGLMConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the architecture of `config` needs, by canonical name."""
    return ARCHITECTURES[config.architecture].tensor_shapes(config)


def key_channels(config: ChatGLMConfig) -> np.ndarray:
    """Channel of the checkpoint's heads that each channel of the graph's cached keys holds, int64 `[head_dim]`."""
    return ARCHITECTURES[config.architecture].key_channels(config)


def build_model(config: ChatGLMConfig, weights: Mapping[str, Weight], prefix: np.ndarray | None = None) -> ov.Model:
    """The stateful OpenVINO model of `config`.

    Inputs: i64 `input_ids` `[B, L]`, `attention_mask` `[B, past + L]`, `position_ids` `[B, L]`, i32 `beam_idx` `[B]`.
    Output: f32 `logits` `[B, L, vocab_size]`.

    Args:
        config: configuration of the checkpoint.
        weights: tensors by canonical name (see `tensor_shapes`); the graph's constants share their memory.
        prefix: keys and values of a P-Tuning v2 prefix, f32 `[layers, 2, num_key_value_heads, P, head_dim]`.
    """
    return ARCHITECTURES[config.architecture].build(config, weights, prefix)
