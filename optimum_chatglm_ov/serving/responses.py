# SPDX-License-Identifier: Apache-2.0
"""Answers in OpenAI's form, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.responses import Response

from ..tokenization.tool_calls import CallArguments, CallBegin, Event, Text, Thought, fold
from ..tokenization.vocabulary import whole_characters
from .answers import Piece
from .errors import as_request_error, error_body
from .model import ServedModel
from .prompts import Plan


_T = TypeVar("_T")


class ClientGoneError(Exception):
    """Whoever asked has left."""


async def unless_gone(receive: Callable[[], Awaitable[dict[str, Any]]], work: Awaitable[_T]) -> _T:
    """Waits for `work`, which is cancelled when the client leaves.

    Raises:
        ClientGoneError: the client has left.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientGoneError
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Events of a server, `data: {...}`, ended by `data: [DONE]`; leaving it stops what makes them."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[dict[str, Any]]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await unless_gone(receive, self._send_all(send))
        except ClientGoneError:
            pass

    async def _send_all(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": _event(chunk), "more_body": True})
        except Exception as error:  # the status has been sent
            body = _event(error_body(as_request_error(error)))
            await send({"type": "http.response.body", "body": body, "more_body": True})
        finally:
            await self._chunks.aclose()
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def _event(chunk: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode("utf-8", "replace")


class Answers:
    """Gathers the pieces of a plan's answers into responses."""

    def __init__(self, model: ServedModel, plan: Plan):
        self._model, self._plan = model, plan
        self._common = {
            "id": ("chatcmpl-" if plan.is_chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model.name,
        }
        self.tokens = 0

    def usage(self) -> dict[str, int]:
        """Counts tokens of prompts, once for all answers of one, and of answers."""
        prompts = {id(generation.input_ids): len(generation.input_ids) for generation in self._plan.generations}
        prompt_tokens = sum(prompts.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": prompt_tokens + self.tokens,
        }

    async def whole(self, pieces: AsyncIterator[tuple[int, Piece]]) -> dict[str, Any]:
        """Makes the response that has everything."""
        events: list[list[Event]] = [[] for _ in self._plan.generations]
        logprobs: list[list[dict[str, Any]]] = [[] for _ in self._plan.generations]
        reasons = [""] * len(events)
        async for index, piece in pieces:
            self.tokens += piece.tokens
            events[index] += piece.events
            logprobs[index] += piece.logprobs
            reasons[index] = piece.finish_reason or reasons[index]
        choices = [self._choice(index, *parts) for index, parts in enumerate(zip(events, logprobs, reasons))]
        kind = "chat.completion" if self._plan.is_chat else "text_completion"
        return {**self._common, "object": kind, "choices": choices, "usage": self.usage()}

    def _choice(self, index: int, events: list[Event], logprobs: list[dict[str, Any]], reason: str) -> dict[str, Any]:
        parsed = fold(events)
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": self._logprobs(logprobs)}
        if not self._plan.is_chat:
            return {**choice, "text": whole_characters(parsed.text)}
        content = whole_characters(parsed.text)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if thought := "".join(event.text for event in events if isinstance(event, Thought)):
            message["reasoning_content"] = whole_characters(thought)
        if parsed.calls:
            message["content"] = content or None
            message["tool_calls"] = [
                {"id": _call_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in parsed.calls
            ]
        return {**choice, "message": message}

    def _logprobs(self, logprobs: list[dict[str, Any]]) -> dict[str, Any] | None:
        if not any(generation.logprobs for generation in self._plan.generations):
            return None
        if self._plan.is_chat:
            return {"content": logprobs}
        return {
            "tokens": [entry["token"] for entry in logprobs],
            "token_logprobs": [entry["logprob"] for entry in logprobs],
            "top_logprobs": None,
        }

    async def chunks(
        self, pieces: AsyncIterator[tuple[int, Piece]], first: tuple[int, Piece], include_usage: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """Yields the response in parts; `first` was taken from `pieces` before."""
        kind = "chat.completion.chunk" if self._plan.is_chat else "text_completion"
        common = {**self._common, "object": kind, **({"usage": None} if include_usage else {})}
        begun: set[int] = set()
        waiting: dict[int, list[dict[str, Any]]] = {}
        try:
            async for index, piece in _chained(first, pieces):
                self.tokens += piece.tokens
                if self._plan.is_chat and index not in begun:
                    begun.add(index)
                    yield {**common, "choices": [_part(index, {"delta": {"role": "assistant", "content": ""}})]}
                waiting.setdefault(index, []).extend(piece.logprobs)
                for part in self._parts(piece):
                    logprobs, waiting[index] = self._logprobs(waiting[index]), []
                    yield {**common, "choices": [_part(index, part, logprobs)]}
                if piece.finish_reason is not None:
                    last = {"delta": {}} if self._plan.is_chat else {"text": ""}
                    logprobs = self._logprobs(waiting[index]) if waiting[index] else None
                    yield {**common, "choices": [_part(index, last, logprobs, piece.finish_reason)]}
            if include_usage:
                yield {**common, "choices": [], "usage": self.usage()}
        finally:
            await pieces.aclose()

    def _parts(self, piece: Piece) -> list[dict[str, Any]]:
        parts = []
        for event in piece.events:
            if isinstance(event, Text):
                text = whole_characters(event.text)
                parts.append({"delta": {"content": text}} if self._plan.is_chat else {"text": text})
            elif isinstance(event, Thought):
                parts.append({"delta": {"reasoning_content": whole_characters(event.text)}})
            elif isinstance(event, CallBegin):
                function = {"name": event.name, "arguments": ""}
                call = {"index": event.index, "id": _call_id(), "type": "function", "function": function}
                parts.append({"delta": {"tool_calls": [call]}})
            elif isinstance(event, CallArguments):
                call = {"index": event.index, "function": {"arguments": event.text}}
                parts.append({"delta": {"tool_calls": [call]}})
        return parts


async def _chained(
    first: tuple[int, Piece], pieces: AsyncIterator[tuple[int, Piece]]
) -> AsyncIterator[tuple[int, Piece]]:
    yield first
    async for piece in pieces:
        yield piece


def _part(
    index: int, part: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, **part, "logprobs": logprobs, "finish_reason": finish_reason}


def _call_id() -> str:
    return "call_" + secrets.token_hex(12)
