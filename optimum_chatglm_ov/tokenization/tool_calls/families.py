# SPDX-License-Identifier: Apache-2.0
"""The parsers of ChatGLM3, GLM-4 and CodeGeeX4."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import regex

from ..messages import BETWEEN_MESSAGES, bare_functions
from .arguments import BROKEN, DONE, PYTHON_CALL, JsonArguments, PythonArguments
from .events import CallArguments, CallBegin, CallBroken, CallEnd, Event, ParsedAnswer, Text, fold
from .text import MessageText, unfinished_mark


# Whether text at the beginning of a string is what a pattern says, may become it, or is something else.
_NO, _PERHAPS, _YES = range(3)


class MessageParser:
    """Answers that are messages of metadata, a line break and content, of which the metadata names a tool.

    What it gives does not depend on how the answer was cut into pieces. Text is held back only while it can be the
    beginning of a call. A call of a tool that was not declared, or one that cannot be read, is text; where a part of
    it was given already, `CallBroken` tells so, and what follows is text.

    Args:
        names: of the declared tools.
        forced: the tool whose call the prompt has begun, so that the answer begins with its arguments.
    """

    arguments: Callable[[], Any] = JsonArguments
    # What stands before the arguments, where {names} are those of the tools; and what may follow them.
    head = r"[ \t]*(?P<name>{names})[ \t\r]*\n"
    tail = ""
    # What begins something in the middle of a message.
    marks: tuple[str, ...] = (BETWEEN_MESSAGES,)

    def __init__(self, names: Iterable[str], forced: str | None = None):
        alternatives = "|".join(regex.escape(name) for name in names)
        self._head = regex.compile(self.head.replace("{names}", alternatives)) if alternatives else None
        self._tail = regex.compile(self.tail)
        self._text = MessageText()
        self._buffer = ""
        self._calls = 0
        self._state = self._at_beginning
        if forced is not None:
            self._begin_call(forced, "")

    def feed(self, text: str) -> list[Event]:
        """Reads the next piece of the answer; returns what it makes certain."""
        self._buffer += text
        return self._advance(is_last=False)

    def finish(self) -> list[Event]:
        """Returns what is certain once nothing follows."""
        return [*self._advance(is_last=True), *self._given(self._text.end())]

    def _advance(self, is_last: bool) -> list[Event]:
        events: list[Event] = []
        while self._state(events, is_last):
            pass
        return events

    # States: each reads from `_buffer`, and returns whether another is to go on

    def _at_beginning(self, events: list[Event], is_last: bool) -> bool:
        """Reads where a message begins."""
        found, match = self._compare(self._head)
        if found == _YES:
            self._begin_call(match["name"], match[0])
            self._buffer = self._buffer[match.end() :]
            return True
        if found == _PERHAPS and not is_last:
            return False
        self._state = self._in_text
        return True

    def _in_text(self, events: list[Event], is_last: bool) -> bool:
        index, mark = min(
            ((index, mark) for mark in self.marks if (index := self._buffer.find(mark)) >= 0), default=(-1, "")
        )
        end = index
        if not mark:
            end = len(self._buffer) - (0 if is_last else unfinished_mark(self._buffer, self.marks))
        events += self._given(self._text.feed(self._buffer[:end]))
        self._buffer = self._buffer[end:]
        if mark:
            self._at_mark(mark, events)
        return bool(mark)

    def _at_mark(self, mark: str, events: list[Event]) -> None:
        """Goes on behind `mark`, with which `_buffer` begins."""
        events += self._given(self._text.end())
        self._buffer = self._buffer[len(mark) :]
        self._state = self._at_beginning

    def _begin_call(self, name: str, source: str) -> None:
        self._name, self._source, self._read = name, source, ""
        self._reader, self._is_given, self._arguments = self.arguments(), False, ""
        self._state = self._in_arguments

    def _in_arguments(self, events: list[Event], is_last: bool) -> bool:
        piece, self._buffer = self._buffer, ""
        self._read += piece
        arguments, state = self._reader.feed(piece)
        self._arguments += arguments
        if self._is_given or self._arguments.strip() not in ("", "{"):  # a bracket alone may begin anything
            if not self._is_given:
                events.append(CallBegin(self._calls, self._name))
                self._is_given = True
            if self._arguments:
                events.append(CallArguments(self._calls, self._arguments))
            self._arguments = ""
        if state == DONE:
            self._source, self._buffer = (
                self._source + self._read[: self._reader.used],
                self._read[self._reader.used :],
            )
            self._state = self._after_arguments
            return True
        if state == BROKEN or is_last:
            self._break_call(events, self._reader.used)
            return True
        return False

    def _break_call(self, events: list[Event], used: int) -> None:
        """Gives up the call; of what was read after its head, `used` characters are in what was given."""
        self._state = self._in_text
        if not self._is_given:
            self._buffer = self._source + self._read
            return
        events.append(CallBroken(self._calls, self._source + self._read[:used]))
        self._calls += 1
        self._text.go_on()
        self._buffer = self._read[used:]

    def _after_arguments(self, events: list[Event], is_last: bool) -> bool:
        found, match = self._compare(self._tail)
        if found == _PERHAPS and not is_last:
            return False
        if found == _YES or self._may_lack_tail:
            events.append(CallEnd(self._calls))
            self._buffer = self._buffer[match.end() if found == _YES else 0 :]
        else:
            events.append(CallBroken(self._calls, self._source))
            self._text.go_on()
        self._calls += 1
        self._state = self._in_text
        return True

    _may_lack_tail = True

    def _compare(self, pattern: Any) -> tuple[int, Any]:
        match = pattern.match(self._buffer, partial=True) if pattern is not None else None
        return (_NO, None) if match is None else (_PERHAPS if match.partial else _YES, match)

    @staticmethod
    def _given(text: str) -> list[Event]:
        return [Text(text)] if text else []


class GLM4Parser(MessageParser):
    """`get_weather\\n{"city": "北京"}`; several calls are several messages."""


class ChatGLM3Parser(MessageParser):
    """`get_weather\\n```python\\ntool_call(city='北京')\\n```, of which each argument is given when it is complete."""

    arguments = PythonArguments
    head = MessageParser.head + r"[ \t]*```\w*[ \t\r]*\n" + PYTHON_CALL
    tail = r"\s*```"


class CodeGeeX4Parser(MessageParser):
    """Text with blocks of JSON, `{"name": "get_weather", "arguments": {"city": "北京"}}`."""

    _BLOCK = "```json"
    head = _BLOCK + r'\s*\{\s*"name"\s*:\s*"(?P<name>{names})"\s*,\s*"arguments"\s*:'
    tail = r"\s*\}\s*```"
    marks = (BETWEEN_MESSAGES, _BLOCK)
    _may_lack_tail = False

    def _at_mark(self, mark: str, events: list[Event]) -> None:
        if mark == BETWEEN_MESSAGES:
            super()._at_mark(mark, events)
        else:
            self._state = self._at_block

    def _at_block(self, events: list[Event], is_last: bool) -> bool:
        found, match = self._compare(self._head)
        if found == _PERHAPS and not is_last:
            return False
        if found == _YES:
            self._begin_call(match["name"], match[0])
            self._buffer = self._buffer[match.end() :]
        else:
            events += self._given(self._text.feed(self._BLOCK))
            self._buffer = self._buffer[len(self._BLOCK) :]
            self._state = self._in_text
        return True

    def _break_call(self, events: list[Event], used: int) -> None:
        super()._break_call(events, used)
        if not self._is_given and self._source:  # the block is no call, and its beginning no mark any more
            events += self._given(self._text.feed(self._BLOCK))
            self._buffer = self._buffer[len(self._BLOCK) :]


# By `tokenizer.chatglm_generation`; the others know no tools.
PARSERS: dict[str, type[MessageParser]] = {
    "chatglm3": ChatGLM3Parser,
    "glm4": GLM4Parser,
    "codegeex4": CodeGeeX4Parser,
}


def tool_names(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names the functions among `tools`, JSON schemas with or without `{"type": "function", ...}` around."""
    return [tool["name"] for tool in bare_functions(tools) if isinstance(tool.get("name"), str)]


def answer_parser(
    generation: str, tools: Sequence[Mapping[str, Any]] = (), forced: str | None = None
) -> MessageParser:
    """Makes the parser of answers of a generation (`tokenizer.chatglm_generation`) to which `tools` were declared.

    Raises:
        ValueError: the generation knows no tools.
    """
    if generation not in PARSERS:
        raise ValueError(f"{generation!r} calls no tools; expected one of {', '.join(PARSERS)}.")
    return PARSERS[generation](tool_names(tools), forced)


def read_answer(
    generation: str, text: str, tools: Sequence[Mapping[str, Any]] = (), forced: str | None = None
) -> ParsedAnswer:
    """Reads the text and the calls of a whole answer; see [`answer_parser`]."""
    parser = answer_parser(generation, tools, forced)
    return fold([*parser.feed(text), *parser.finish()])
