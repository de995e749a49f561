# SPDX-License-Identifier: Apache-2.0
"""Tokens of the engine as pieces of an answer: text, calls, probabilities, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..tokenization import ChatGLMTextStreamer
from ..tokenization.chat_rules import settled
from ..tokenization.template_chat import TemplateTokenizer
from ..tokenization.thoughts import ThoughtReader
from ..tokenization.tool_calls import PARSERS, CallBegin, CallEnd, Event, Text, Thought, answer_parser
from ..tokenization.tool_calls.text import unfinished_mark
from .engine import GeneratedToken, GenerationRequest
from .errors import RequestError
from .metrics import AnswerClock, Metrics
from .model import ServedModel
from .prompts import Plan


_LONGEST = 365 * 24 * 3600.0  # seconds that a timer may have


@dataclass(frozen=True)
class Piece:
    """What one token adds to an answer.

    Args:
        events: text and calls.
        logprobs: of tokens, as OpenAI gives them.
        finish_reason: of the last piece: "stop", "length" or "tool_calls".
        tokens: that were computed.
    """

    events: list[Event]
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    tokens: int = 1


async def answer(
    model: ServedModel, plan: Plan, generation: GenerationRequest, metrics: Metrics
) -> AsyncIterator[Piece]:
    """Yields the pieces of one answer; closing it stops the computation."""
    clock = AnswerClock(metrics, len(generation.input_ids))
    reason = "error"
    try:
        reader = _Reader(model, plan, generation)
        async with aclosing(model.engine.generate(generation)) as tokens:
            async for token in tokens:
                clock.token()
                piece = reader.read(token)
                yield piece
                if piece.finish_reason is not None:
                    reason = piece.finish_reason
                    return
    except (GeneratorExit, asyncio.CancelledError):
        if reason == "error":
            reason = "cancelled"
        raise
    finally:
        clock.end(reason)


async def all_answers(model: ServedModel, plan: Plan, metrics: Metrics) -> AsyncIterator[tuple[int, Piece]]:
    """Yields the pieces of all answers of a plan, each with the answer's index, as they come.

    Raises:
        RequestError: they take longer than the server allows.
    """
    pieces: asyncio.Queue[tuple[int, Piece | BaseException]] = asyncio.Queue()

    async def give(index: int, generation: GenerationRequest) -> None:
        try:
            async with aclosing(answer(model, plan, generation, metrics)) as answered:
                async for piece in answered:
                    pieces.put_nowait((index, piece))
        except Exception as error:  # it belongs to whoever iterates
            pieces.put_nowait((index, error))

    seconds = model.options.request_seconds
    timeout = RequestError(
        f"The answer took longer than {seconds:g} s. Lower `max_tokens`, or try again when less is asked for.",
        504,
        code="timeout",
    )
    tasks = [asyncio.create_task(give(index, generation)) for index, generation in enumerate(plan.generations)]
    timer = asyncio.get_running_loop().call_later(min(seconds, _LONGEST), pieces.put_nowait, (0, timeout))
    unfinished = len(tasks)
    try:
        while unfinished:
            index, piece = await pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            unfinished -= piece.finish_reason is not None
            yield index, piece
    finally:
        timer.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Reader:
    """Tokens of one answer -> pieces."""

    def __init__(self, model: ServedModel, plan: Plan, generation: GenerationRequest):
        self._model, self._plan, self._generation = model, plan, generation
        self._text = _TextOfTokens(model.tokenizer)
        self._stops = _Stops(plan.stops)
        self._calls = 0
        self._thoughts = None
        if plan.is_chat and isinstance(model.tokenizer, TemplateTokenizer):
            self._thoughts = ThoughtReader(model.tokenizer.decode(generation.input_ids))
        if not plan.is_chat:
            self._parser: Any = _BareText()
        elif model.generation in PARSERS:
            self._parser = answer_parser(model.generation, plan.tools, plan.forced)
        else:
            self._parser = _RulesText(model.rules.process_text)

    def read(self, token: GeneratedToken) -> Piece:
        """Reads what the next token adds."""
        is_turn_end = token.finish_reason == "stop"
        text = "" if is_turn_end else self._text.next(token.token_id)
        reason = token.finish_reason
        if reason is not None:
            text += self._text.rest()
        text, is_stopped = self._stops.feed(text, is_last=reason is not None)
        if is_stopped:
            reason = "stop"
        thought = ""
        if self._thoughts is not None:
            thought, text = self._thoughts.feed(text, is_last=reason is not None)
        events = [*([Thought(thought)] if thought else ()), *self._parser.feed(text)]
        if reason is None and self._plan.one_call and any(isinstance(event, CallEnd) for event in events):
            reason = "stop"
        if reason is not None:
            events = [*events, *self._parser.finish()]
        if self._plan.one_call:
            events = _up_to_first_call(events)
        self._calls += sum(isinstance(event, CallEnd) for event in events)
        if reason == "stop" and self._calls:
            reason = "tool_calls"
        return Piece(events, [] if is_turn_end else self._logprobs(token), reason)

    def _logprobs(self, token: GeneratedToken) -> list[dict[str, Any]]:
        if not self._generation.logprobs:
            return []
        written = self._model.bytes_of(token.token_id)
        return [
            {
                "token": written.decode("utf-8", "replace"),
                "logprob": token.logprob,
                "bytes": list(written),
                "top_logprobs": [],
            }
        ]


def _up_to_first_call(events: list[Event]) -> list[Event]:
    """Returns `events` without what follows the end of a call."""
    for index, event in enumerate(events):
        if isinstance(event, CallEnd):
            return events[: index + 1]
        if isinstance(event, CallBegin) and event.index > 0:
            return events[:index]
    return events


class _TextOfTokens(ChatGLMTextStreamer):
    """Whole characters of tokens, as soon as nothing that follows changes them."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        self._pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._pieces.append(text)

    def next(self, token_id: int) -> str:
        """Returns what the next token makes certain."""
        self.put(np.array([token_id]))
        return self._taken()

    def rest(self) -> str:
        """Returns what was held back, when no token follows."""
        self.end()
        return self._taken()

    def _taken(self) -> str:
        text, self._pieces = "".join(self._pieces), []
        return text


class _Stops:
    """Cuts a text where one of `stops` begins, and holds back what may begin one."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = tuple(stops), ""

    def feed(self, text: str, is_last: bool) -> tuple[str, bool]:
        """Returns the text that is certain by now, and whether one of `stops` was found."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = min((index for stop in self._stops if (index := text.find(stop)) >= 0), default=-1)
        if found >= 0:
            return text[:found], True
        held = 0 if is_last else unfinished_mark(text, self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False


class _BareText:
    """A parser for completions: all is text."""

    def feed(self, text: str) -> list[Event]:
        return [Text(text)] if text else []

    def finish(self) -> list[Event]:
        return []


class _RulesText:
    """A parser for ChatGLM and ChatGLM2, whose whole text is changed by rules."""

    def __init__(self, process_text: Callable[[str], str]):
        self._process_text = process_text
        self._text = self._given = ""

    def feed(self, text: str) -> list[Event]:
        self._text += text
        return self._more(settled(self._process_text(self._text)))

    def finish(self) -> list[Event]:
        return self._more(self._process_text(self._text))

    def _more(self, text: str) -> list[Event]:
        new, self._given = text[len(self._given) :], text if len(text) > len(self._given) else self._given
        return [Text(new)] if new else []
