# SPDX-License-Identifier: Apache-2.0
"""The tensors that a call is given: their forms, and what is no call of this model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..architectures.registry import architecture_of
from ..configuration import ChatGLMConfig


def check_input_ids(input_ids: torch.LongTensor, config: ChatGLMConfig) -> None:
    """
    Raises:
        ValueError: no integer tensor `[batch, tokens]`, or an id that is not in the vocabulary.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ValueError(f"`input_ids` is {_description(input_ids)}; expected an integer tensor [batch, tokens].")
    if not input_ids.numel():
        raise ValueError(f"`input_ids` is {_description(input_ids)}; expected at least one token.")
    for token in (input_ids.min().item(), input_ids.max().item()):
        if not 0 <= token < config.vocab_size:
            raise ValueError(
                f"`input_ids` holds {token}, but the vocabulary of this model ends at {config.vocab_size - 1}. Take "
                "the tokenizer of this model, and one of its ids as `pad_token_id`."
            )


def check_prompt(input_ids: torch.LongTensor, config: ChatGLMConfig) -> None:
    """
    Raises:
        ValueError: it is no prompt of this model's architecture.
    """
    error = architecture_of(config).prompt_error(input_ids)
    if error is not None:
        raise ValueError(error)


def two_dimensional_mask(attention_mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """The mask `[batch, length]`, also of chatglm-6b's own, boolean `[batch, 1, tokens, length]`, True = hidden.

    Raises:
        ValueError: it has another shape.
    """
    if attention_mask is None:
        return None
    mask = attention_mask
    if isinstance(mask, torch.Tensor) and mask.dim() == 4:
        mask = (~mask[:, 0].bool().all(dim=1)).long()
    if not isinstance(mask, torch.Tensor) or mask.shape != (batch, length):
        raise ValueError(
            f"`attention_mask` is {_description(attention_mask)}; expected a tensor [{batch}, {length}]: the rows of "
            "`input_ids`, and the past and the new tokens of each."
        )
    return mask


def two_dimensional_positions(
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    batch: int,
    new_tokens: int,
    past_length: int,
    config: ChatGLMConfig,
) -> tuple[torch.Tensor | None, np.ndarray | None]:
    """Positions `[batch, new_tokens or more]`, of which the last count; `None`: as the mask says.

    chatglm-6b's own `[batch, 2, new_tokens]` become what they say of a prompt: i32 `[batch, 2]`, context length and
    position of the mask token, the second of what is returned.

    Raises:
        ValueError: they have another shape.
    """
    if position_ids is None:
        return None, None
    shape = tuple(position_ids.shape) if isinstance(position_ids, torch.Tensor) else ()
    architecture = architecture_of(config)
    if architecture.has_two_positions and shape == (batch, 2, new_tokens):
        if past_length:
            return None, None  # the prompt has said it
        kept = torch.ones(batch, new_tokens, dtype=torch.long) if attention_mask is None else attention_mask
        return None, architecture.prompt_layout(position_ids, kept)
    if len(shape) == 2 and shape[0] in (1, batch) and new_tokens <= shape[1] <= past_length + new_tokens:
        return position_ids.expand(batch, -1), None
    raise ValueError(f"`position_ids` is {_description(position_ids)}; expected a tensor [{batch}, {new_tokens}].")


def _description(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"a {type(value).__name__}"
