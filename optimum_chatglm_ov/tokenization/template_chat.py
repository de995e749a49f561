# SPDX-License-Identifier: Apache-2.0
"""Conversations with the tokenizers of transformers, whose checkpoints bring a chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchEncoding, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from ..architectures.families import MODEL_TYPES_OF_TRANSFORMERS
from .fast.glm4 import byte_level_name
from .messages import ToolCall, as_messages, check_roles, plain_messages, tool_schemas, wrapped_functions
from .thoughts import without_thought


GENERATION = "glm4"
"""Whose messages and calls the templates write."""

_ASSISTANT = "<|assistant|>"
_BYTES = {byte_level_name(bytes([byte])): byte for byte in range(256)}


def has_template(config: PretrainedConfig) -> bool:
    """Tells whether models of this configuration have a tokenizer of transformers."""
    return config.model_type in MODEL_TYPES_OF_TRANSFORMERS


def chat_tokenizer(tokenizer: Any, model: Any) -> Any:
    """Returns `tokenizer` as `chat()` of `model` uses it: wrapped where the model's is one of transformers."""
    return TemplateChat(tokenizer, model.generation_config) if has_template(model.config) else tokenizer


class TemplateTokenizer:
    """A tokenizer of transformers, with what those of this package have beside.

    Its template is that of GLM-4: an answer has metadata (none, or the name of a function), a line break and content.

    Args:
        tokenizer: the checkpoint's own, with a chat template.
        generation_config: the model's, which names the ids that end a turn.
    """

    chatglm_generation = GENERATION

    def __init__(self, tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"`tokenizer` is a {type(tokenizer).__name__} without a chat template; expected the tokenizer of the "
                "checkpoint, with `chat_template`. Load it with `AutoTokenizer.from_pretrained(...)`."
            )
        ids = generation_config.eos_token_id
        ids = ids if isinstance(ids, list) else [tokenizer.eos_token_id if ids is None else ids]
        self.tokenizer, self.turn_end_ids = tokenizer, ids

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["tokenizer"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> BatchEncoding:
        return self.tokenizer(*args, **kwargs)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def prompt(self, messages: Sequence[dict[str, Any]], tools: Any = None, add_generation_prompt: bool = True) -> str:
        """Renders messages in any form that this package's tokenizers take.

        Raises:
            ValueError: something has no form; jinja2.TemplateError: the template refuses it.
        """
        check_roles(messages, ("system", "user", "assistant", "observation"), "a GLM-4")
        said = plain_messages(messages, _as_messages_of_calls)
        if tools:
            tools = wrapped_functions(tool_schemas(tools))
        return self.tokenizer.apply_chat_template(
            said, tools=tools or None, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], tools: Any = None, add_generation_prompt: bool = False, **_: Any
    ) -> BatchEncoding:
        """Encodes `prompt`: `input_ids` and `attention_mask`, lists of numbers."""
        text = self.prompt(messages, tools, add_generation_prompt)
        return self.tokenizer(text, add_special_tokens=False, return_token_type_ids=False)

    def build_single_message(self, role: str, metadata: str, content: str) -> list[int]:
        """Encodes a message, whose turn may go on."""
        return self.tokenizer.encode(f"<|{role}|>{metadata}\n{content}", add_special_tokens=False)

    def convert_ids_to_tokens(self, token_id: int) -> bytes:
        """Returns the bytes of a token; none of an id beyond the vocabulary."""
        name = self.tokenizer.convert_ids_to_tokens(token_id) or ""
        return bytes(_BYTES[letter] for letter in name) if _BYTES.keys() >= set(name) else name.encode()

    def decode(
        self, token_ids: Sequence[int] | torch.Tensor, skip_incomplete_tail: bool = False, **kwargs: Any
    ) -> str:
        """Decodes ids; with `skip_incomplete_tail`, without the bytes of an unfinished character."""
        text = self.tokenizer.decode(token_ids, **kwargs)
        return text.rstrip("\ufffd") if skip_incomplete_tail else text


class TemplateChat(TemplateTokenizer):
    """As `chat()` asks the tokenizers of this package: it decodes the answer to the prompt that was built last."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig):
        super().__init__(tokenizer, generation_config)
        self._begun = ""

    def build_chat_input(self, query: str, history: list[Any] | None = None, role: str = "user") -> BatchEncoding:
        """Encodes one more turn, int64 tensors `[1, L]`; functions are `tools` of a leading system message."""
        messages = [*as_messages(history or []), {"role": role, "content": query}]
        tools = messages[0].get("tools") if messages[0]["role"] == "system" else None
        if tools and not messages[0].get("content"):
            del messages[0]  # of which the template would write a message without content
        text = self.prompt(messages, tools)
        self._begun = text.rpartition(_ASSISTANT)[2]
        return self.tokenizer(text, add_special_tokens=False, return_token_type_ids=False, return_tensors="pt")

    def decode(
        self, token_ids: Sequence[int] | torch.Tensor, skip_incomplete_tail: bool = False, **kwargs: Any
    ) -> str:
        """Decodes an answer, with what the template begins it with, and without a thought that has ended."""
        return without_thought(self._begun + super().decode(token_ids, skip_incomplete_tail, **kwargs))


def _as_messages_of_calls(calls: list[ToolCall], where: str) -> list[dict[str, Any]]:
    return [
        {"role": "assistant", "metadata": name, "content": json.dumps(arguments, ensure_ascii=False)}
        for name, arguments in calls
    ]
