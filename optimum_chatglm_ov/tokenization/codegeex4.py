# SPDX-License-Identifier: Apache-2.0
"""Tokenizer of CodeGeeX4."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .chat_templates import CODEGEEX4_INTRODUCTION, CODEGEEX4_TEMPLATE
from .glm4 import ChatGLM4Tokenizer
from .messages import ToolCall, tool_schemas, with_tools, wrapped_functions


class CodeGeeX4Tokenizer(ChatGLM4Tokenizer, saved_as="ChatGLM4Tokenizer"):
    """As GLM-4's, with other prompts for tools.

    Functions come into the system message, and the model calls them in blocks of JSON. They are given in `tools`, or
    in a message of role `tool` whose content is `{"function": [...]}`, as the authors of CodeGeeX4 do. A message of
    that role which answers a call is an `observation`.
    """

    chatglm_generation = "codegeex4"
    default_chat_template = CODEGEEX4_TEMPLATE

    def _prepare_messages(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict | Callable] | None
    ) -> list[dict[str, Any]]:
        definitions, said = tool_schemas(tools or ()), []
        for index, (message, functions) in enumerate(zip(messages, defined_functions(messages))):
            key = "content" if message["role"] == "tool" else "tools"
            definitions += tool_schemas(functions, f"messages[{index}]: `{key}")
            if functions and message["role"] == "tool":
                continue
            calls_before = any(earlier["role"] == "assistant" for earlier in said)
            if message["role"] == "tool" and not (message.get("tool_call_id") or calls_before):
                raise ValueError(
                    f"messages[{index}]: `content` of the role 'tool' is {message.get('content')!r}; expected the "
                    'functions that CodeGeeX4 may call, {"function": [...]}. What a function gave has the role '
                    "'observation', or follows the message that called it."
                )
            said.append({key: value for key, value in message.items() if key != "tools"})
        prepared = super()._prepare_messages(said, None)
        if not definitions:
            return prepared
        return with_tools(prepared, wrapped_functions(definitions), CODEGEEX4_INTRODUCTION)

    def _call_messages(self, calls: list[ToolCall], where: str) -> list[dict[str, Any]]:
        blocks = [
            f"```json\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n```"
            for name, arguments in calls
        ]
        return [{"role": "assistant", "content": "\n".join(blocks)}]


def defined_functions(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Reads the functions that each message defines; none of one that says something, or gives what a call gave."""
    found, calls = [], False
    for message in messages:
        if message["role"] != "tool":
            calls = bool(message.get("tool_calls") or message.get("function_call"))
            found.append(message.get("tools") or [])
        else:
            found.append([] if calls or message.get("tool_call_id") else _functions_of_content(message.get("content")))
    return found


def _functions_of_content(content: Any) -> list[Mapping[str, Any]]:
    functions = content.get("function") if isinstance(content, Mapping) else content
    functions = [functions] if isinstance(functions, Mapping) else functions
    is_definition = isinstance(functions, list) and all(
        isinstance(function, Mapping) and ("name" in function or "function" in function) for function in functions
    )
    return functions if is_definition else []
