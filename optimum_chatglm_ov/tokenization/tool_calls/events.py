# SPDX-License-Identifier: Apache-2.0
"""What a parser finds in an answer, in the order in which the model wrote it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class Thought:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """Call number `index` (from 0) of the answer is of the tool `name`."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the JSON of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """The arguments of a call are complete."""

    index: int


@dataclass(frozen=True)
class CallBroken:
    """A call that had begun cannot be read.

    Args:
        source: all that the model wrote of it so far, of which nothing was given as text.
    """

    index: int
    source: str


Event = Text | Thought | CallBegin | CallArguments | CallEnd | CallBroken


@dataclass(frozen=True)
class ParsedCall:
    """A call of the tool `name`; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ParsedAnswer:
    """The text of an answer, without its calls and thoughts, and the calls."""

    text: str
    calls: tuple[ParsedCall, ...] = ()


def fold(events: Iterable[Event]) -> ParsedAnswer:
    """Puts together the answer that events make; a call that broke is text."""
    texts: list[str] = []
    calls: dict[int, list[str]] = {}
    for event in events:
        if isinstance(event, Text):
            texts.append(event.text)
        elif isinstance(event, CallBegin):
            calls[event.index] = [event.name, ""]
        elif isinstance(event, CallArguments):
            calls[event.index][1] += event.text
        elif isinstance(event, CallBroken):
            del calls[event.index]
            texts.append(event.source)
    return ParsedAnswer("".join(texts), tuple(ParsedCall(*call) for call in calls.values()))
