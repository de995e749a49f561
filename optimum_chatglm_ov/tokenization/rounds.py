# SPDX-License-Identifier: Apache-2.0
"""What the tokenizers of ChatGLM and ChatGLM2 share: conversations are rounds of a question and an answer, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import BatchEncoding

from .base import ChatGLMTokenizer
from .messages import as_messages, check_roles


class RoundsTokenizer(ChatGLMTokenizer):
    """Builds prompts by a template alone; only the user asks."""

    roles = ("system", "user", "assistant")

    def build_prompt(self, query: str, history: Sequence[Any] | None = None) -> str:
        """Builds the original's prompt.

        ChatGLM: the query alone, or rounds from 0 when there is a history. ChatGLM2: rounds from 1, ending in `答：`.
        """
        messages = [*as_messages(history), {"role": "user", "content": query}]
        check_roles(messages, self.roles, type(self).__qualname__)
        return self._render(
            self._prepare_messages(messages, None),
            chat_template=self.default_chat_template,
            add_generation_prompt=True,
        )

    def build_chat_input(self, query: str, history: Sequence[Any] | None = None, role: str = "user") -> BatchEncoding:
        """Encodes `build_prompt`, `[1, L]`: `input_ids`, and of ChatGLM2 `attention_mask` and `position_ids`."""
        if role != "user":
            raise ValueError(f"{type(self).__qualname__} takes a query of role 'user' only; found {role!r}.")
        return self([self.build_prompt(query, history)], return_tensors="pt")
