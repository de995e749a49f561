# SPDX-License-Identifier: Apache-2.0
"""What `generate` is asked for: what this model cannot do, and what must hold before anything is computed."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import Cache, GenerationConfig

from ..configuration import ChatGLMConfig
from .cache import FusedCache, held_length
from .engine import Engine
from .inputs import check_context


def check_custom_generate(custom_generate: Any) -> None:
    """Refuses code of others.

    Raises:
        ValueError: it names a folder or repository, whose code would be run.
    """
    if isinstance(custom_generate, (str, os.PathLike)):
        raise ValueError(
            f"`custom_generate` is {str(custom_generate)!r}: no code of a folder or repository is ever run. Give a "
            "function of your own."
        )


def longest_output(
    prompt_length: int, asked_length: int, settings: GenerationConfig, config: ChatGLMConfig
) -> int | None:
    """Returns the `max_length` that takes the place of a checkpoint's own beyond the context length; else `None`.

    Args:
        prompt_length: tokens of the prompt.
        asked_length: `max_length` as the caller asked for it, 0 if not.
        settings: of the generation.
        config: of the model.

    Raises:
        ContextLengthError: a length that was asked for is beyond the context length.
    """
    if settings.max_new_tokens is not None:
        check_context(prompt_length + settings.max_new_tokens, config)
        return None
    check_context(max(prompt_length, asked_length), config)
    return config.max_position_embeddings if (settings.max_length or 0) > config.max_position_embeddings else None


def check_rollback(engine: Engine | None, name: str) -> None:
    """Refuses assisted generation with a model whose cache only grows.

    Raises:
        ValueError: the model `name` cannot take drafted tokens back; `None` is the engine of optimum-intel's models.
    """
    if engine is None or not engine.can_crop:
        raise ValueError(
            "Assisted generation (`assistant_model`, `prompt_lookup_num_tokens`) takes tokens back, and the "
            f"key/value cache inside this {name} cannot. Load it as "
            '`OVChatGLMForCausalLM.from_pretrained(..., attention="native")`.'
        )


def check_continuation(
    engine: Engine, past_key_values: Any, input_ids: torch.Tensor | None, settings: GenerationConfig
) -> None:
    """Checks that the engine holds what `past_key_values` stand for, and that `input_ids` go on from it.

    Raises:
        ValueError: the engine does not, or they do not.
    """
    if not isinstance(past_key_values, Cache):
        raise ValueError(
            f"`past_key_values` is a {type(past_key_values).__name__}; `generate` goes on from the `FusedCache` "
            "that a model with fused attention returns. Leave it out."
        )
    past_length = held_length(engine, past_key_values)
    if input_ids is None or input_ids.shape[-1] <= past_length:
        raise ValueError(
            f"`past_key_values` hold {past_length} tokens; expected `input_ids` of the whole sequence, those "
            "tokens and new ones. Pass more, or `crop()` the cache first."
        )
    if (settings.num_beams or 1) > 1:
        raise ValueError("A beam search cannot go on from `past_key_values`. Leave them out.")
    rows = input_ids.shape[0] * (settings.num_return_sequences or 1)
    if rows != engine.batch_size:
        raise ValueError(
            f"`past_key_values` hold {engine.batch_size} sequences (each beam is one), but {rows} were "
            "asked for (rows of `input_ids`, times `num_return_sequences`). Leave `past_key_values` out."
        )


def mark_beams(past_key_values: Any, prompt_length: int, settings: GenerationConfig) -> None:
    """Notes in the cache that a beam search returned that its rows are beams from the end of the prompt on."""
    if (settings.num_beams or 1) > 1 and isinstance(past_key_values, FusedCache):
        if past_key_values.get_seq_length() > prompt_length:
            past_key_values.beams_from = prompt_length
