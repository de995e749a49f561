# SPDX-License-Identifier: Apache-2.0
"""Who is next: a bounded queue in which clients take turns."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..errors import ChatGLMError


class QueueFullError(ChatGLMError, RuntimeError):
    """As many requests wait as may."""


class QueueTimeoutError(ChatGLMError, TimeoutError):
    """A request has waited too long."""


class Admission:
    """Lets `max_running` requests run and `max_waiting` wait; used in one event loop.

    Of those that wait, each client's first comes before any client's second, so that one with many requests does not
    keep the others waiting.

    Args:
        seconds: the longest wait.
    """

    def __init__(self, max_running: int, max_waiting: int, seconds: float):
        self.running = self.waiting = 0
        self._max_running, self._max_waiting, self._seconds = max_running, max_waiting, seconds
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}  # the client whose turn is next is the first one

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Lets the block run when it is this request's turn.

        Raises:
            QueueFullError, QueueTimeoutError: see there.
        """
        await self._enter(client)
        try:
            yield
        finally:
            self.running -= 1
            self._wake()

    async def _enter(self, client: str) -> None:
        if self.running < self._max_running and not self.waiting:
            self.running += 1
            return
        if self.waiting >= self._max_waiting:
            raise QueueFullError(f"{self.waiting} requests are waiting, and no more may. Try again later.")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(client, deque()).append(turn)
        self.waiting += 1
        try:
            await asyncio.wait_for(asyncio.shield(turn), self._seconds)
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # its turn came at the same moment
                self.running -= 1
                self._wake()
            else:
                turn.cancel()
                self._leave(client, turn)
            if isinstance(error, asyncio.TimeoutError):
                raise QueueTimeoutError(
                    f"The request has waited {self._seconds:g} s, and it was not its turn. Try again later."
                ) from error
            raise

    def _leave(self, client: str, turn: asyncio.Future[None]) -> None:
        self.waiting -= 1
        queue = self._queues[client]
        queue.remove(turn)
        if not queue:
            del self._queues[client]

    def _wake(self) -> None:
        while self._queues and self.running < self._max_running:
            client = next(iter(self._queues))
            queue = self._queues.pop(client)
            turn = queue.popleft()
            if queue:
                self._queues[client] = queue  # behind the others
            self.waiting -= 1
            self.running += 1
            turn.set_result(None)
