# SPDX-License-Identifier: Apache-2.0
"""Ends a server although pages are open in browsers."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn


# By this path Gradio's page tells that it is still open: a stream that ends when the page is closed, and not before.
_ENDLESS = "/gradio_api/heartbeat/"


class Heartbeats:
    """ASGI middleware that ends the endless streams of a page once `closing` is set.

    A server that drains waits for all answers, and would wait for these, too.
    """

    def __init__(self, app: Any, closing: asyncio.Event):
        self._app, self._closing = app, closing

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(_ENDLESS):
            await self._app(scope, receive, send)
            return

        async def receive_or_close() -> dict[str, Any]:
            tasks = [asyncio.ensure_future(receive()), asyncio.ensure_future(self._closing.wait())]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                return tasks[0].result() if tasks[0].done() else {"type": "http.disconnect"}
            finally:
                for task in tasks:
                    task.cancel()

        await self._app(scope, receive_or_close, send)


class DrainingServer(uvicorn.Server):
    """A server that sets `app.state.closing` when it begins to end."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Lets answers that were begun end."""
        self.config.app.state.closing.set()
        await super().shutdown(sockets)
