# SPDX-License-Identifier: Apache-2.0
"""Many conversations at once without a server, for batches."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .answers import all_answers
from .engine import EngineOptions
from .errors import RequestError, as_request_error
from .metrics import Metrics
from .model import ServerOptions, load_served_model
from .prompts import plan_chat
from .responses import Answers
from .schemas import ChatCompletionRequest


class OfflineModel:
    """A model that answers lists of conversations as the server does.

    Args:
        folder: of an exported model; `None`: the tiny one of the package.
        engine_options: see there; as many conversations as there are may wait.
    """

    def __init__(self, folder: str | Path | None = None, engine_options: EngineOptions | None = None):
        self._cleaning = ExitStack()
        if folder is None:
            from ..cli.embedded import embedded_model

            folder = self._cleaning.enter_context(embedded_model())
        options = ServerOptions(greedy=True, request_seconds=float("inf"))
        engine_options = engine_options or EngineOptions(max_waiting=2**31, queue_seconds=float("inf"))
        self._model = load_served_model(Path(folder), options, engine_options)
        self._metrics = Metrics(self._model.engine)
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._model.engine.start())

    def answer(self, conversations: list[list[dict[str, Any]]], **settings: Any) -> list[dict[str, Any]]:
        """Answers each conversation.

        Args:
            conversations: lists of messages as OpenAI has them.
            settings: other fields of OpenAI's request, the same for all.

        Returns:
            For each `answer` and `finish_reason`, and `tool_calls` if there are some; or `error`.
        """
        return self._loop.run_until_complete(self._all(conversations, settings))

    async def _all(self, conversations: list[list[dict[str, Any]]], settings: dict[str, Any]) -> list[dict[str, Any]]:
        return await asyncio.gather(*(self._one(messages, settings) for messages in conversations))

    async def _one(self, messages: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
        fields = {**settings, "model": self._model.name, "messages": messages, "n": 1}
        try:
            plan = plan_chat(self._model, ChatCompletionRequest.model_validate(fields), client="")
            async with aclosing(all_answers(self._model, plan, self._metrics)) as pieces:
                response = await Answers(self._model, plan).whole(pieces)
        except ValidationError as error:
            return {"error": str(error)}
        except RequestError as error:
            return {"error": str(error)}
        except Exception as error:
            return {"error": str(as_request_error(error))}
        choice = response["choices"][0]
        calls = choice["message"].get("tool_calls")
        answer = {"answer": choice["message"]["content"], "finish_reason": choice["finish_reason"]}
        return {**answer, "tool_calls": calls} if calls else answer

    def close(self) -> None:
        """Gives the model back."""
        self._loop.run_until_complete(self._model.engine.close())
        self._loop.close()
        self._cleaning.close()
