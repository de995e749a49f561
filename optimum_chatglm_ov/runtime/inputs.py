# SPDX-License-Identifier: Apache-2.0
"""The tensors that a call is given: their forms, and what is no call of this model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from ..architectures.registry import architecture_of
from ..configuration import ChatGLMConfig
from ..errors import ContextLengthError


# What transformers' generation hands to `forward` besides its own arguments, and has no meaning here.
_ARGUMENTS_OF_GENERATION = {"cache_position", "return_dict", "use_cache"}
# What callers of any model may name, as long as they ask for nothing with it.
_ARGUMENTS_OF_OTHER_MODELS = {"inputs_embeds", "labels", "output_attentions", "output_hidden_states", "token_type_ids"}


@dataclass(frozen=True)
class Call:
    """The arrays of one call.

    Attributes:
        input_ids, position_ids: int64 `[batch, new_tokens]`.
        attention_mask: int64 `[batch, past + new_tokens]`.
        prompt_layout: i32 `[batch, 2]`, context length and position of the mask token of a chatglm-6b prompt; `None`
            where the graph finds them in the ids.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    position_ids: np.ndarray
    prompt_layout: np.ndarray | None = None

    def distinct_rows(self) -> tuple[Call, np.ndarray | None]:
        """Takes equal rows only once: the call, and for each row here the row there; `None` if all differ."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays = {name: array for name, array in arrays.items() if array is not None}
        rows = np.concatenate([array.astype(np.int64) for array in arrays.values()], axis=1)
        _, first, copies = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        if len(first) == len(rows):
            return self, None
        return Call(**{name: array[first] for name, array in arrays.items()}), copies.reshape(-1)


def prepare_call(
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_length: int,
    config: ChatGLMConfig,
    prompt_layout: np.ndarray | None = None,
) -> Call:
    """Prepares the arrays of a call, whose new tokens follow `past_length` others.

    Positions that are not given count the tokens that the mask shows; padding has position 1. A `prompt_layout` that
    `position_ids` tell comes before the one given.

    Raises:
        ValueError: a tensor has another shape.
    """
    batch, new_tokens = input_ids.shape
    mask = two_dimensional_mask(attention_mask, batch, past_length + new_tokens)
    positions, layout = two_dimensional_positions(position_ids, mask, batch, new_tokens, past_length, config)
    mask = np.ones((batch, past_length + new_tokens), np.int64) if mask is None else mask.cpu().numpy()
    if positions is None:
        positions = np.cumsum(mask, axis=1) - 1
        positions[mask == 0] = 1
    else:
        positions = positions.cpu().numpy()
    return Call(
        input_ids.cpu().numpy(),
        mask,
        positions[:, -new_tokens:],
        prompt_layout if layout is None else layout,
    )


def check_arguments(function: str, kwargs: dict[str, Any]) -> None:
    """Refuses arguments of other models, unless they ask for nothing.

    Raises:
        TypeError: `kwargs` ask `function` for what this model does not compute.
    """
    unknown = [
        name
        for name, value in kwargs.items()
        if name not in _ARGUMENTS_OF_GENERATION
        and not (name in _ARGUMENTS_OF_OTHER_MODELS and (value is None or value is False))
    ]
    if unknown:
        raise TypeError(
            f"{function}() does not know the argument(s) {unknown}: it computes the logits of `input_ids`, and "
            "nothing else. Leave them out."
        )


def check_context(length: int, config: ChatGLMConfig) -> None:
    """Checks that a sequence fits into the context.

    Raises:
        ContextLengthError: `length` tokens are more than the context length.
    """
    if length > config.max_position_embeddings:
        raise ContextLengthError(
            f"{length} tokens (prompt and new ones) were asked for, but the context length of this model is "
            f"{config.max_position_embeddings}. Shorten the prompt or the history, or lower "
            "`max_new_tokens`/`max_length`."
        )


def check_input_ids(input_ids: torch.LongTensor, config: ChatGLMConfig) -> None:
    """Checks form and values of token ids.

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
    """Checks that a new sequence begins as the architecture needs it.

    Raises:
        ValueError: it is no prompt of this model's architecture.
    """
    error = architecture_of(config).prompt_error(input_ids)
    if error is not None:
        raise ValueError(error)


def two_dimensional_mask(attention_mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """Makes the mask `[batch, length]`, also of chatglm-6b's own, boolean `[batch, 1, tokens, length]`, True = hidden.

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
    """Makes positions `[batch, new_tokens or more]`, of which the last count; `None`: as the mask says.

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
