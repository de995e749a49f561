# SPDX-License-Identifier: Apache-2.0
"""Tokenizer of ChatGLM3-6B."""

from __future__ import annotations

import functools
import json
import keyword
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from transformers import BatchEncoding

from .chat_templates import CHATGLM3_TEMPLATE
from .chatglm2 import ChatGLM2Tokenizer
from .messages import ToolCall, as_messages, bare_functions, check_role, check_roles, with_tools


logger = logging.getLogger(__name__)

_ROLES = ("system", "user", "assistant", "observation")
INTRODUCTION_OF_TOOLS = "Answer the following questions as best as you can. You have access to the following tools:"
_ROLE_TOKEN = re.compile("(" + "|".join(re.escape(f"<|{role}|>") for role in _ROLES) + ")")


class ChatGLM3Tokenizer(ChatGLM2Tokenizer, saved_as="ChatGLMTokenizer"):
    r"""As ChatGLM2's, with control tokens for the roles of a conversation.

    `decode` shows control tokens by name.

    Args:
        encode_special_tokens (`bool`, defaults to `False`): recognise the role tokens in text.
    """

    chatglm_generation = "chatglm3"
    default_chat_template = CHATGLM3_TEMPLATE
    turn_end_tokens = ("<|user|>", "<|observation|>")
    roles = _ROLES
    control_tokens = (*ChatGLM2Tokenizer.control_tokens, *(f"<|{role}|>" for role in _ROLES))

    def __init__(
        self,
        vocab_file: str | None = None,
        ice_text_file: str | None = None,
        encode_special_tokens: bool = False,
        **kwargs: Any,
    ):
        self.encode_special_tokens = encode_special_tokens
        super().__init__(vocab_file, ice_text_file, encode_special_tokens=encode_special_tokens, **kwargs)

    def _convert_id_to_token(self, index: int) -> str:
        return self.tokenizer.index_special_tokens.get(index) or super()._convert_id_to_token(index)

    def _decode_ids(self, token_ids: int | list[int], skip_special_tokens: bool) -> str:
        if skip_special_tokens:
            token_ids = self._without_turn_ends(token_ids)
        return super()._decode_ids(token_ids, skip_special_tokens)

    def _without_turn_ends(self, token_ids: int | list[int]) -> int | list[int]:
        """Returns `token_ids` without the tokens at their end that end an answer or fill up its row of a batch.

        The original shows control tokens whatever is asked for; so does this where nothing but others are left.
        """
        ends = {self.pad_token_id, *self.turn_end_ids}
        if isinstance(token_ids, int):
            return [] if token_ids in ends else token_ids
        end = len(token_ids)
        while end and token_ids[end - 1] in ends:
            end -= 1
        controls = {*self.special_tokens.values(), *self.tokenizer.index_special_tokens}
        is_answer = not end or not controls.issuperset(token_ids[:end])
        return token_ids[:end] if is_answer else token_ids

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        if not self.encode_special_tokens:
            return super()._tokenize(text)
        tokens = []
        for part in _ROLE_TOKEN.split(text):
            tokens += [part] if _ROLE_TOKEN.fullmatch(part) else super()._tokenize(part)
        return tokens

    # Conversations -------------------------------------------------------------------------------------------------

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """Encodes `<|role|>`, metadata and a line break, and the message; control tokens in these two are text.

        Raises:
            ValueError: `role` is not system, user, assistant or observation.
        """
        check_role(role, self.roles, type(self).__qualname__)
        text_ids = self.tokenizer.encode
        return [self.get_command(f"<|{role}|>"), *text_ids(f"{metadata}\n"), *text_ids(message)]

    def build_chat_input(self, query: str, history: Sequence[Any] | None = None, role: str = "user") -> BatchEncoding:
        """Makes `input_ids`, `attention_mask` and `position_ids` [1, L]; see [`ChatGLMTokenizer.build_chat_input`]."""
        messages = [*as_messages(history), {"role": role, "content": query}]
        check_roles(messages, self.roles, type(self).__qualname__)
        messages = self._prepare_messages(messages, None)
        ids = self._conversation_ids(messages, add_generation_prompt=True, continue_final_message=False)
        return self.pad({"input_ids": [ids]}, return_tensors="pt")

    def _conversation_ids(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, continue_final_message: bool
    ) -> list[int]:
        # A message has no end token: an answer that was begun is simply the last message.
        ids = self.get_prefix_tokens()
        for message in messages:
            content = message["content"]
            if message["role"] == "system" and "tools" in message:
                content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
            ids += self.build_single_message(message["role"], message.get("metadata") or "", content)
        return ids + [self.get_command("<|assistant|>")] if add_generation_prompt else ids

    def _with_tools(self, messages: list[dict[str, Any]], tools: Sequence[dict | Callable]) -> list[dict[str, Any]]:
        return with_tools(messages, tools, INTRODUCTION_OF_TOOLS)

    def _prepare_messages(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict | Callable] | None
    ) -> list[dict[str, Any]]:
        return [
            {**message, "tools": bare_functions(message["tools"])} if "tools" in message else message
            for message in super()._prepare_messages(messages, tools)
        ]

    def _rendered_ids(self, messages: list[dict[str, Any]], **rendering: Any) -> list[int]:
        """Encodes by a checkpoint's template; only control tokens of the template itself become control tokens.

        Revisions of ChatGLM3 whose tokenizer_config.json lists the control tokens as added tokens recognise them in
        text; those without the list spell them, which is not the prompt that the model was trained on.
        """
        added_tokens, control_tokens = self.added_tokens_encoder, self.tokenizer.special_tokens
        if added_tokens.keys() & control_tokens.keys():
            added_tokens = {**control_tokens, **added_tokens}  # where some are listed, the others were forgotten
        else:
            if not self.encode_special_tokens:
                _warn_once(
                    "The chat template of this ChatGLM3 checkpoint writes the roles as text, as its authors' "
                    "tokenizer does. For the prompt that the model was trained on, use `build_chat_input`, or set "
                    "`tokenizer.chat_template = None` before `apply_chat_template`."
                )
            return super()._rendered_ids(messages, **rendering)
        # `sop` is also part of words
        pattern = re.compile(
            "|".join(
                rf"(?<![A-Za-z]){token}(?![A-Za-z])" if token.isalpha() else re.escape(token) for token in added_tokens
            )
        )
        everything = str(messages)
        mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in everything)

        def protected(value: Any) -> Any:
            if isinstance(value, str):
                return pattern.sub(lambda token: token[0][0] + mark + token[0][1:], value)
            if isinstance(value, list):
                return [protected(item) for item in value]
            return {key: protected(item) for key, item in value.items()} if isinstance(value, dict) else value

        marked = [{**protected(message), "role": message["role"]} for message in messages]
        ids: list[int] = []
        for part in re.split(f"({pattern.pattern})", self._render(marked, **rendering)):
            known = added_tokens.get(part)
            ids += self.tokenizer.encode(part.replace(mark, "")) if known is None else [known]
        return ids

    def _call_messages(self, calls: list[ToolCall], where: str) -> list[dict[str, Any]]:
        messages = []
        for name, arguments in calls:
            for argument in arguments:
                if not argument.isidentifier() or keyword.iskeyword(argument):
                    raise ValueError(
                        f"{where}: the argument {argument!r} of the call of {name!r} has no form; ChatGLM3 writes "
                        "calls in Python, where it is not a name."
                    )
            call = ", ".join(f"{argument}={value!r}" for argument, value in arguments.items())
            content = f"```python\ntool_call({call})\n```"
            messages.append({"role": "assistant", "metadata": name, "content": content})
        return messages


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
