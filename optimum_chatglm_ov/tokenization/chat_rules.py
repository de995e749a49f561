# SPDX-License-Identifier: Apache-2.0
"""What becomes of a generated answer, by the rules of each generation: the other side of its prompts."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..architectures.families import Family, family_of_generation
from ..errors import ChatGLMError
from .codegeex4 import defined_functions
from .messages import BETWEEN_MESSAGES, PLACEHOLDER, YEAR, as_messages
from .tool_calls.arguments import read_python_call


# One turn is `(query, response)` with ChatGLM and ChatGLM2, `{"role", "content", "metadata"}` afterwards; all read
# both.
History = list[Any]
# A text, or a call: `{"name", "content"}` without tools in the conversation, `{"name", "parameters"}` with them; a
# list of calls where CodeGeeX4 makes several.
Response = str | dict[str, Any] | list[dict[str, Any]]

_BEGIN_OF_BLOCK, _FENCE = re.compile(r"```json\s*"), re.compile(r"\s*```")
_PUNCTUATION = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_PUNCTUATION_NEXT_TO_CHINESE = re.compile(r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")


class ToolCallError(ChatGLMError, ValueError):
    """The model answered with a call whose arguments cannot be read; nothing was executed."""


# What becomes of the generated text --------------------------------------------------------------------------------


def _process_chatglm(text: str) -> str:
    return _PUNCTUATION_NEXT_TO_CHINESE.sub(lambda mark: _PUNCTUATION[mark[0]], _process_chatglm2(text))


def _process_chatglm2(text: str) -> str:
    return text.strip().replace(PLACEHOLDER, YEAR)


# What these may still change when more of an answer is known: ASCII punctuation next to Chinese characters, blanks at
# the end, half a character, and a placeholder.
_UNSETTLED = ",!:;? \n\ufffd"


def settled(response: str) -> str:
    """Returns the part of an unfinished response that later tokens cannot change."""
    for length in range(min(len(PLACEHOLDER) - 1, len(response)), 0, -1):
        if response.endswith(PLACEHOLDER[:length]):
            response = response[:-length]
            break
    return response.rstrip(_UNSETTLED)


def _process_messages(
    text: str, history: History, read_parameters: Callable[[str], dict[str, Any]]
) -> tuple[Response, History]:
    """Reads messages in `text`, each metadata, a line break and content; returns the last, and `history` with all."""
    history = copy.deepcopy(history)
    response: Response = ""
    for message in text.split(BETWEEN_MESSAGES):
        metadata, line_break, content = message.partition("\n")
        if not line_break:
            metadata, content = "", message
        name = metadata.strip()
        if not name:
            content = content.strip()
        history.append({"role": "assistant", "metadata": metadata, "content": content})
        if not name:
            response = content.replace(PLACEHOLDER, YEAR)
        elif history[0]["role"] == "system" and history[0].get("tools") is not None:
            response = {"name": name, "parameters": read_parameters(content)}
        else:
            response = {"name": name, "content": content}
    return response, history


def _parameters_of_python(content: str) -> dict[str, Any]:
    """Reads the arguments of a call in Python inside a code block.

    Raises:
        ToolCallError: the block holds anything else.
    """
    try:
        return read_python_call("\n".join(content.split("\n")[1:-1]))
    except ValueError as error:
        raise ToolCallError(
            f"The model's call cannot be read: {error}. Found {content!r}; expected a code block with "
            "`tool_call(name=value, ...)` of literal values. Ask again, or lower `temperature`."
        ) from error


def _parameters_of_json(content: str) -> dict[str, Any]:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _unreadable_json(content, error) from error


def _unreadable_json(content: str, error: Exception) -> ToolCallError:
    return ToolCallError(
        f"The model's call cannot be read: {error}. Found {content!r}; expected its arguments as JSON. Ask again, "
        "or lower `temperature`."
    )


def _process_codegeex4(text: str, history: History, incomplete: bool) -> tuple[Response, History]:
    """Reads messages without metadata; blocks of JSON are calls if there are functions. See `_process_messages`."""
    can_call = any(defined_functions(history))
    history = copy.deepcopy(history)
    content = ""
    for content in map(str.strip, text.split(BETWEEN_MESSAGES)):
        history.append({"role": "assistant", "metadata": "", "content": content})
    calls = _calls_of_blocks(content, incomplete) if can_call else []
    return (calls[0] if len(calls) == 1 else calls or content.replace(PLACEHOLDER, YEAR)), history


def _calls_of_blocks(content: str, incomplete: bool) -> list[dict[str, Any]]:
    """Reads the calls in blocks of JSON with `name` and `arguments`; none where a block is something else.

    Raises:
        ToolCallError: a block that looks like a call is no JSON, and it is complete.
    """
    calls, end = [], 0
    while block := _BEGIN_OF_BLOCK.search(content, end):
        rest = content[block.end() :]  # a fence in a text of the call does not end the block
        try:
            call, length = json.JSONDecoder().raw_decode(rest)
            end = block.end() + length
            if not _FENCE.match(content, end):
                raise ValueError("its block goes on after the JSON")
        except (ValueError, RecursionError) as error:
            if "```" not in rest:  # the block has no end yet
                break
            if incomplete or '"name"' not in rest:
                return []
            raise _unreadable_json(content, error) from error
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            return []
        calls.append({"name": call["name"], "parameters": call["arguments"]})
    return calls


# The generations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatRules:
    """What one generation does in its own way.

    Args:
        family: whose defaults of sampling it has; see [`chat_rules`].
        invalid_score_token_id: chosen where a score is NaN or infinite.
        process_text: text of an answer -> response, where a conversation is pairs; else `None`.
        read_parameters: content of a call -> its arguments, where a conversation is messages; else `None`.
        calls_in_blocks: an answer has no metadata, and calls are blocks of JSON in it.
        stream_withholds_last_token: each streamed text leaves out the newest token, which may be a stop token.
        stream_shows_empty_texts: as long as an answer has no text, that is yielded, too.
        has_past_key_values: `stream_chat()` can go on from `past_key_values`.
        continues_text: rounds are one text; a round that goes on in it begins without the `▁` of a text.
    """

    family: Family | None = None
    invalid_score_token_id: int = 5
    process_text: Callable[[str], str] | None = None
    read_parameters: Callable[[str], dict[str, Any]] | None = None
    calls_in_blocks: bool = False
    stream_withholds_last_token: bool = False
    stream_shows_empty_texts: bool = False
    has_past_key_values: bool = True
    continues_text: bool = False

    @property
    def has_messages(self) -> bool:
        """Whether a conversation is a list of messages rather than of `(query, response)` pairs."""
        return self.read_parameters is not None

    def process_response(
        self, text: str, query: str, history: History, role: str = "user", incomplete: bool = False
    ) -> tuple[Response, History]:
        """Returns the response in `text`, and the conversation with this turn.

        Args:
            text: what the model generated.
            query, role: what it answers, and who said that.
            history: the conversation before; it is left as it is. The one after it has its form, except that pairs
                become messages where an answer can be more than a text.
            incomplete: more text may follow; a call that cannot be read yet is given as `{"name", "content"}`.

        Raises:
            ToolCallError: the arguments of a call cannot be read.
        """
        if not self.has_messages:
            response = self.process_text(text)
            if not any(isinstance(item, Mapping) for item in history):
                return response, [*history, (query, response)]
            return response, as_messages([*history, (query, response)])
        return self.read_answer(text, [*as_messages(history), {"role": role, "content": query}], incomplete)

    def read_answer(self, text: str, history: History, incomplete: bool = False) -> tuple[Response, History]:
        """Reads a response as `process_response`, of messages that end with what is answered."""
        if self.calls_in_blocks:
            return _process_codegeex4(text, history, incomplete)
        try:
            return _process_messages(text, history, self.read_parameters)
        except ToolCallError:
            if not incomplete:
                raise
        response, new_history = _process_messages(text, history, lambda content: {})
        if isinstance(response, dict):
            response = {"name": response["name"], "content": new_history[-1]["content"]}
        return response, new_history


RULES = {
    "chatglm": ChatRules(
        process_text=_process_chatglm,
        stream_withholds_last_token=True,
        stream_shows_empty_texts=True,
        has_past_key_values=False,
    ),
    "chatglm2": ChatRules(process_text=_process_chatglm2, continues_text=True),
    "chatglm3": ChatRules(
        read_parameters=_parameters_of_python,
        stream_withholds_last_token=True,
    ),
    "glm4": ChatRules(
        invalid_score_token_id=198,
        read_parameters=_parameters_of_json,
        stream_withholds_last_token=True,
    ),
}
RULES["codegeex4"] = replace(RULES["glm4"], calls_in_blocks=True)


def chat_rules(tokenizer: Any, config: Any) -> ChatRules:
    """Finds the rules of the tokenizer's generation, and the family that the model's configuration makes it.

    Raises:
        ValueError: `tokenizer` is not one of this package's.
    """
    generation = getattr(tokenizer, "chatglm_generation", None)
    if generation not in RULES:
        raise ValueError(
            f"`tokenizer` is a {type(tokenizer).__name__}; expected a ChatGLM tokenizer. Load it with "
            "`AutoTokenizer.from_pretrained(...)` after `import optimum_chatglm_ov`."
        )
    rope_ratio = getattr(config, "rope_ratio", None)
    family = family_of_generation(generation, rope_ratio, config.max_position_embeddings)
    return replace(RULES[generation], family=family)
