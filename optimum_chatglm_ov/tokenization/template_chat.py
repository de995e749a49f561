# SPDX-License-Identifier: Apache-2.0
"""Conversations with the tokenizers of transformers, whose checkpoints bring a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..architectures.families import MODEL_TYPES_OF_TRANSFORMERS
from .messages import as_messages


_ASSISTANT = "<|assistant|>"
_END_OF_THOUGHT = "</think>"


def chat_tokenizer(tokenizer: Any, model: Any) -> Any:
    """`tokenizer` as `chat()` of `model` uses it: wrapped where the model's is one of transformers."""
    if model.config.model_type not in MODEL_TYPES_OF_TRANSFORMERS:
        return tokenizer
    ids = model.generation_config.eos_token_id
    return TemplateChat(tokenizer, ids if isinstance(ids, list) else [] if ids is None else [ids])


class TemplateChat:
    """A tokenizer of transformers, as `chat()` asks those of this package.

    Its template is that of GLM-4: an answer has metadata (none, or the name of a function), a line break and content.

    Args:
        tokenizer: the checkpoint's own, with a chat template.
        turn_end_ids: the ids that end a turn.
    """

    chatglm_generation = "glm4"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turn_end_ids: Sequence[int]):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"`tokenizer` is a {type(tokenizer).__name__} without a chat template; expected the tokenizer of the "
                "checkpoint, with `chat_template`. Load it with `AutoTokenizer.from_pretrained(...)`."
            )
        self.tokenizer = tokenizer
        self.turn_end_ids = list(turn_end_ids)
        self.pad_token_id = tokenizer.pad_token_id
        self._begun = ""

    def build_chat_input(self, query: str, history: list[Any] | None = None, role: str = "user") -> BatchEncoding:
        """The prompt of one more turn, int64 tensors `[1, L]`; functions are `tools` of a leading system message."""
        messages = [*as_messages(history or []), {"role": role, "content": query}]
        tools = messages[0].get("tools") if messages[0]["role"] == "system" else None
        text = self.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
        self._begun = text.rpartition(_ASSISTANT)[2]
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")

    def decode(self, token_ids: Sequence[int] | torch.Tensor) -> str:
        """The text of an answer, with what the template begins it with, and without a thought that has ended."""
        text = self._begun + self.tokenizer.decode(token_ids)
        _, ended, answer = text.partition(_END_OF_THOUGHT)
        return "\n" + answer.lstrip("\n") if ended else text
