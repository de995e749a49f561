# SPDX-License-Identifier: Apache-2.0
"""Reads the calls of tools in what a model wrote, whole or piece by piece.

    answer = read_answer("glm4", text, tools)

    parser = answer_parser("glm4", tools)
    for piece in pieces:
        for event in parser.feed(piece):
            ...
    for event in parser.finish():
        ...

Nothing is ever evaluated, and what is no call that can be read is text.
"""

from .events import CallArguments, CallBegin, CallBroken, CallEnd, Event, ParsedAnswer, ParsedCall, Text, Thought, fold
from .families import PARSERS, answer_parser, read_answer, tool_names


__all__ = [
    "PARSERS",
    "CallArguments",
    "CallBegin",
    "CallBroken",
    "CallEnd",
    "Event",
    "ParsedAnswer",
    "ParsedCall",
    "Text",
    "Thought",
    "answer_parser",
    "fold",
    "read_answer",
    "tool_names",
]
