# SPDX-License-Identifier: Apache-2.0
"""Tiny models of transformers' own classes with random weights, and what these compute from them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Glm4Config, GlmConfig, PreTrainedModel


_SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": [1, 2],
}
_MULTI_HEAD = {"num_key_value_heads": 4, "head_dim": 16, "partial_rotary_factor": 1.0}
_TIED = {"tie_word_embeddings": True, "attention_bias": False}
# transformers 4 takes the factor that the two lengths have, and version 5 the one that is named
_YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "glm": (GlmConfig, {"rope_theta": 5000.0}),
    "glm-multi-head-tied": (GlmConfig, _MULTI_HEAD | _TIED),
    "glm4": (Glm4Config, {"attention_bias": False}),
    "glm4-yarn-one-group": (Glm4Config, _YARN | {"num_key_value_heads": 1, "partial_rotary_factor": 1.0}),
}
TORCH_MODELS = tuple(CONFIGS)


def config(name: str, **changes: Any) -> Any:
    """The configuration of the model `name`, but for `changes`."""
    config_class, values = CONFIGS[name]
    return config_class(**{**_SIZES, **values, **changes})


@functools.cache
def torch_model(name: str) -> PreTrainedModel:
    """The model `name` in float32."""
    return random_model(config(name))


def random_model(config: Any) -> PreTrainedModel:
    """A model whose weights are random, always the same, and large enough for distributions with a clear best."""
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            is_norm = parameter.ndim == 1 and (parameter == 1).all()
            parameter.normal_(float(is_norm), 0.3 if parameter.ndim == 1 else 0.15, generator=generator)
    return model


@functools.cache
def reference_arrays(name: str) -> dict[str, np.ndarray]:
    """What the model computes, under the names that the recorded results of other models have."""
    model = torch_model(name)
    single = torch.randint(3, 300, (1, 21), generator=torch.Generator().manual_seed(1))
    batch = torch.randint(3, 300, (3, 13), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(batch)
    for row, padding in enumerate((0, 4, 9)):
        batch[row, :padding], mask[row, :padding] = 0, 0
    long = torch.randint(3, 300, (1, 200), generator=torch.Generator().manual_seed(3))
    arrays = {"single_input_ids": single, "single_attention_mask": torch.ones_like(single)}
    arrays |= {"batch_input_ids": batch, "batch_attention_mask": mask, "history_input_ids": long}
    greedy, beams = {"do_sample": False}, {"do_sample": False, "num_beams": 3, "max_new_tokens": 16}
    details = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    with torch.no_grad():
        arrays["history_logits_last"] = model(long).logits[:, -1:]
        for case in ("single", "batch"):
            inputs = {key: arrays[f"{case}_{key}"] for key in ("input_ids", "attention_mask")}
            positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            arrays[f"{case}_logits"] = model(**inputs, position_ids=positions).logits
            arrays[f"greedy_{case}"] = model.generate(**inputs, **greedy, max_new_tokens=24)
            found = model.generate(**inputs, **greedy, **details, min_new_tokens=6, max_new_tokens=6)
            arrays[f"step_{case}_tokens"] = found.sequences[:, -6:].T
            arrays[f"step_{case}_logits"] = torch.stack(found.logits)
            found = model.generate(**inputs, **beams, **details)
            arrays[f"beam_{case}"], arrays[f"beam_{case}_scores"] = found.sequences, found.sequences_scores
    return {key: value.numpy() for key, value in arrays.items()}
