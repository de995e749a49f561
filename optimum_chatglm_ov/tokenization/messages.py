# SPDX-License-Identifier: Apache-2.0
"""Conversations in the forms that people have them, as messages of role, metadata, content and tools.

Errors name the message by its index in the conversation, and the key.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers.utils import get_json_schema


# Name and arguments of a call.
ToolCall = tuple[str, dict[str, Any]]

ROLES_OF_RESULTS = ("tool", "function")

# What stands between several messages of one answer, and what the models say for the year of their training.
BETWEEN_MESSAGES = "<|assistant|>"
PLACEHOLDER, YEAR = "[[训练时间]]", "2023年"


def as_messages(history: Sequence[Any] | None) -> list[dict[str, Any]]:
    """Makes messages of `(query, response)` pairs, messages, or both; `None` in a pair is what was not said.

    Raises:
        ValueError: an item is neither.
    """
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(history or ()):
        if isinstance(item, Mapping):
            messages.append(dict(item))
        elif isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(x, str | None) for x in item):
            turn = zip(("user", "assistant"), item)
            messages += [{"role": role, "content": text} for role, text in turn if text is not None]
        else:
            raise ValueError(
                f"`history[{index}]` is {item!r}; expected a message (a dictionary with `role` and `content`) or a "
                "pair (query, response)."
            )
    return messages


def plain_messages(
    conversation: Sequence[Mapping[str, Any]], write_calls: Callable[[list[ToolCall], str], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Converts messages in the ecosystem's form to those that ChatGLM knows, without keys that hold `None`.

    The roles `tool` and `function` become `observation`; a list of text parts becomes one text; `tool_calls`, or the
    older `function_call`, become the messages that `write_calls` makes of them and of the place to name in an error.

    Raises:
        ValueError: something has no form here.
    """
    messages = []
    for index, item in enumerate(conversation):
        where = f"messages[{index}]"
        message = {key: value for key, value in item.items() if value is not None}
        if "tools" in message:
            message["tools"] = tool_schemas(message["tools"], f"{where}: `tools")
        if not isinstance(message.get("metadata", ""), str):
            raise ValueError(f"{where}: `metadata` is {message['metadata']!r}; expected a text.")
        calls = _calls(message, where)
        message["content"] = _text(message.get("content"), where)
        if message["role"] in ROLES_OF_RESULTS:
            message["role"] = "observation"
        if message["content"] or not calls:
            messages.append(message)
        if calls:
            messages += write_calls(calls, where)
    return messages


def check_roles(conversation: Sequence[Any], roles: Sequence[str] | None, tokenizer_name: str) -> None:
    """Checks the role of each message.

    Raises:
        ValueError: a message is no dictionary, or has no role or one that is not in `roles` (`None`: any).
    """
    for index, message in enumerate(conversation):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{index}] is {message!r}; expected a dictionary with `role` and `content`.")
        role = message["role"]
        if roles is not None and not (role in ROLES_OF_RESULTS and "observation" in roles):
            check_role(role, roles, f"messages[{index}]: {tokenizer_name}")


def check_role(role: str, roles: Sequence[str], name: str) -> None:
    """Checks that a role is one of `roles`; `name` begins the message of the error.

    Raises:
        ValueError: it is not.
    """
    if role not in roles:
        raise ValueError(f"{name} has no role {role!r}; use one of {', '.join(roles)}.")


def tool_schemas(tools: Any, where: str = "`tools") -> list[dict[str, Any]]:
    """Makes JSON schemas of `tools`; that of a Python function comes from its signature and docstring.

    Args:
        tools: a list of schemas and functions.
        where: their place, for errors; it ends in the key, without the closing mark.

    Raises:
        ValueError: it is no list, or has something else, or a function without a name.
    """
    if not isinstance(tools, (list, tuple)):
        raise ValueError(f"{where}` is a {type(tools).__name__}; expected a list of functions.")
    schemas = []
    for index, tool in enumerate(tools):
        if inspect.isroutine(tool):
            schemas.append(get_json_schema(tool))
            continue
        if not isinstance(tool, Mapping):
            raise ValueError(f"{where}[{index}]` is {tool!r}; expected a JSON schema (a dictionary) or a function.")
        function = tool.get("function", tool)
        has_name = isinstance(function, Mapping) and isinstance(function.get("name"), str)
        if tool.get("type", "function") == "function" and not has_name:
            raise ValueError(f"{where}[{index}]` is {tool!r}; expected a function with its `name`.")
        schemas.append(dict(tool))
    return schemas


def with_tools(
    messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any] | Callable], introduction: str = ""
) -> list[dict[str, Any]]:
    """Returns `messages` with `tools` in the leading system message; without one it is made of `introduction`."""
    schemas = tool_schemas(tools)
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "tools": schemas}, *messages[1:]]
    return [{"role": "system", "content": introduction, "tools": schemas}, *messages]


def bare_functions(tools: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Returns functions without the ecosystem's `{"type": "function", "function": ...}` around them."""
    return [tool["function"] if tool.get("type") == "function" and "function" in tool else tool for tool in tools]


def wrapped_functions(tools: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Returns functions with `{"type": "function", "function": ...}` around them; tools with a type stay."""
    return [
        tool
        if tool.get("type", "function") != "function" or {"type", "function"} <= tool.keys()
        else {"type": "function", "function": tool.get("function", tool)}
        for tool in tools
    ]


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ValueError(
            f"{where}: `content` is a {type(content).__name__}; expected a text, a list of text parts, or nothing."
        )
    texts = []
    for number, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            found = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(
                f"{where}: `content[{number}]` is of type {found!r}; ChatGLM reads text alone. Leave it out, or put "
                "it in words."
            )
        texts.append(text)
    return "".join(texts)


def _calls(message: dict[str, Any], where: str) -> list[ToolCall]:
    """Takes the calls out of `message`."""
    entries = [("tool_calls", message.pop("tool_calls", None) or [])]
    if "function_call" in message:
        entries.append(("function_call", message.pop("function_call")))
    calls = []
    for key, found in entries:
        if found and message["role"] != "assistant":
            raise ValueError(f"{where}: `{key}` in a message of role {message['role']!r}; only the assistant calls.")
        if key == "function_call":
            calls.append(_call(found, f"{where}: `function_call"))
        elif not isinstance(found, (list, tuple)):
            raise ValueError(f"{where}: `tool_calls` is a {type(found).__name__}; expected a list of calls.")
        else:
            calls += [_call(entry, f"{where}: `tool_calls[{number}]") for number, entry in enumerate(found)]
    return calls


def _call(entry: Any, where: str) -> ToolCall:
    """Reads a call; `where` ends in the key, without the closing mark."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}` is a {type(entry).__name__}; expected a dictionary with `name` and `arguments`.")
    if entry.get("type", "function") != "function":
        raise ValueError(f"{where}.type` is {entry['type']!r}; only calls of functions have a form.")
    if isinstance(entry.get("function"), Mapping):
        entry, where = entry["function"], f"{where}.function"
    name, arguments = entry.get("name"), entry.get("arguments")
    if not isinstance(name, str) or not name or len(name.splitlines()) > 1 or name != name.strip():
        raise ValueError(f"{where}.name` is {name!r}; expected the name of a function, without blanks around it.")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise ValueError(f"{where}.arguments` is {arguments!r}, which is not JSON: {error}.") from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(
            f"{where}.arguments` is {arguments!r}; expected names and values, as a dictionary or as JSON text."
        )
    return name, arguments
