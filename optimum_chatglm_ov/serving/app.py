# SPDX-License-Identifier: Apache-2.0
"""The ASGI application: OpenAI's interface in front of an engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import prometheus_client
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from ..environment import package_version
from ..tokenization.tool_calls import Event, fold
from .answers import Piece, all_answers
from .closing import Heartbeats
from .engine import EngineOptions
from .errors import RequestError, add_error_handlers
from .limits import Gate
from .metrics import Metrics
from .model import ServedModel, ServerOptions, load_served_model
from .numa import warn_of_numa_nodes
from .prompts import Plan, plan_chat, plan_completion, tokenize
from .responses import Answers, ClientGoneError, EventStream, unless_gone
from .schemas import ChatCompletionRequest, CompletionRequest, TokenizeRequest


logger = logging.getLogger(__name__)

_CLIENT_CLOSED_REQUEST = 499
_BODY_SECONDS = 60.0  # in which a body must have come


def create_app(
    folder: str | Path, options: ServerOptions | None = None, engine_options: EngineOptions | None = None
) -> FastAPI:
    """Makes the application for the model in an exported folder; its engine starts with the server.

    Raises:
        MissingExtraError: a package of the extra `web` is needed and not installed.
        ValueError, OSError: see [`load_served_model`].
    """
    return app_of(load_served_model(Path(folder), options or ServerOptions(), engine_options or EngineOptions()))


def app_of(model: ServedModel) -> FastAPI:
    """Makes the application, as [`create_app`], for a model that was loaded before."""
    options, metrics = model.options, Metrics(model.engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warn_of_numa_nodes()
        started = time.perf_counter()
        await model.engine.start()
        logger.info("%s: %s, after %.1f s", model.name, model.engine.name, time.perf_counter() - started)
        try:
            yield
        finally:
            await model.engine.close()

    app = FastAPI(
        title="optimum-chatglm-ov", version=package_version(), lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.model, app.state.closing = model, asyncio.Event()
    add_error_handlers(app)
    app.add_middleware(
        Gate,
        api_key=options.api_key,
        max_body=options.max_body,
        body_seconds=min(options.request_seconds, _BODY_SECONDS),
        has_page=options.web,
    )
    _add_answers(app, model, metrics)
    _add_facts(app, model, metrics)
    if options.web:
        from .web import add_page

        app.add_middleware(Heartbeats, closing=app.state.closing)
        add_page(app, model, metrics)
    return app


def _add_answers(app: FastAPI, model: ServedModel, metrics: Metrics) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        _check_name(model, body.model)
        plan = await asyncio.to_thread(plan_chat, model, body, _client(body.user, request))
        return await _respond(model, metrics, plan, body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        _check_name(model, body.model)
        plan = await asyncio.to_thread(plan_completion, model, body, _client(body.user, request))
        return await _respond(model, metrics, plan, body, request)


async def _respond(
    model: ServedModel, metrics: Metrics, plan: Plan, body: ChatCompletionRequest | CompletionRequest, request: Request
) -> Response:
    answers = Answers(model, plan)
    pieces = all_answers(model, plan, metrics)
    if model.options.log_prompts:
        pieces = _logged(model, plan, pieces)
    try:
        if body.stream:
            # what is wrong before the first token still has a status of its own
            first = await unless_gone(request.receive, anext(pieces))
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStream(answers.chunks(pieces, first, include_usage))
        async with aclosing(pieces):
            content = await unless_gone(request.receive, answers.whole(pieces))
    except ClientGoneError:
        await pieces.aclose()
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    return JSONResponse(content)


async def _logged(
    model: ServedModel, plan: Plan, pieces: AsyncIterator[tuple[int, Piece]]
) -> AsyncIterator[tuple[int, Piece]]:
    """Yields the same pieces, and writes prompts and answers to the log."""
    for generation in plan.generations:
        logger.info("prompt: %r", model.tokenizer.decode(generation.input_ids))
    events: list[list[Event]] = [[] for _ in plan.generations]
    async with aclosing(pieces):
        async for index, piece in pieces:
            events[index] += piece.events
            yield index, piece
            if piece.finish_reason is not None:
                logger.info("answer: %r", fold(events[index]))


def _add_facts(app: FastAPI, model: ServedModel, metrics: Metrics) -> None:
    created = int(time.time())
    card = {"id": model.name, "object": "model", "created": created, "owned_by": "optimum-chatglm-ov"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{**card, "max_model_len": model.engine.prompt_and_answer}]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        _check_name(model, name)
        return card

    @app.get("/health")
    async def health() -> Response:
        problem, state = model.engine.problem(), model.engine.state()
        facts = {
            "status": "ok" if problem is None else problem,
            "engine": model.engine.name,
            "model": model.name,
            "running": state.running,
            "waiting": state.waiting,
        }
        return JSONResponse(facts, 200 if problem is None else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        content = prometheus_client.generate_latest(metrics.registry)
        return Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.post("/tokenize")
    async def token_ids(body: TokenizeRequest) -> dict[str, Any]:
        if body.model is not None:
            _check_name(model, body.model)
        ids = await asyncio.to_thread(tokenize, model, body)
        return {"tokens": ids, "count": len(ids), "max_model_len": model.engine.prompt_and_answer}


def _check_name(model: ServedModel, name: str) -> None:
    if name != model.name:
        raise RequestError(
            f"There is no model {name!r} here; expected {model.name!r}.", 404, "model", "model_not_found"
        )


def _client(user: str | None, request: Request) -> str:
    return user or (request.client.host if request.client else "")
