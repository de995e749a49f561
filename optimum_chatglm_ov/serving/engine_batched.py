# SPDX-License-Identifier: Apache-2.0
"""Many requests at once, by openvino-genai's continuous batching in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .. import native
from ..ir import MODEL_FILE
from . import batching_process_path
from .admission import Admission
from .engine import EngineError, EngineOptions, EngineState, GeneratedToken, GenerationRequest, UnsupportedError
from .vocabulary import save_vocabulary


logger = logging.getLogger(__name__)

_BLOCK = 32  # tokens of a block of PagedAttention's cache on CPU
_CACHE_BYTES = 2  # of a number in the cache, at most: u8 with its scales, f16, bf16
_SHARE_OF_MEMORY = 4
_REFUSED = "refused"
_CLOSED = object()
_STDERR = 2


class BatchedEngine:
    """Owner of the process that computes; see [`batching_process`].

    Two threads talk to it: one sends what is put into a queue, the other gives what comes back to the event loop. A
    process that ends is started again, and the requests that it had fail.
    """

    name = "openvino-genai, continuous batching"

    def __init__(self, folder: Path, tokenizer: Any, config: Any, options: EngineOptions):
        self._folder, self._tokenizer, self._config, self._options = folder, tokenizer, config, options
        blocks = _cache_blocks(config, options)
        self.prompt_and_answer = min(config.max_position_embeddings, blocks * _BLOCK - _BLOCK)
        self._blocks = blocks
        self._admission = Admission(options.max_running, options.max_waiting, options.queue_seconds)
        self._numbers = itertools.count(1)
        self._requests: dict[int, asyncio.Queue[GeneratedToken | Exception]] = {}
        self._outbox: queue.SimpleQueue = queue.SimpleQueue()
        self._cache_use = 0.0
        self._problem: str | None = "the model is being loaded"
        self._is_closing = False
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._vocabulary = TemporaryDirectory(prefix="optimum_chatglm_ov-")

    # What the server calls -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Starts the process, and waits until it has loaded the model.

        Raises:
            EngineError: it has not.
        """
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(save_vocabulary, self._tokenizer, self._vocabulary.name)
        await asyncio.to_thread(self._start_process)
        self._problem = None
        for target in (self._send, self._receive):
            threading.Thread(target=target, daemon=True).start()

    def check(self, request: GenerationRequest) -> None:
        """Refuses nothing: whether a JSON schema has a grammar is known when the computation begins."""

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GeneratedToken]:
        """See [`Engine.generate`]."""
        async with self._admission.turn(request.client):
            if self._problem:
                raise EngineError(f"The engine cannot compute: {self._problem}.")
            number = next(self._numbers)
            arrived: asyncio.Queue[GeneratedToken | Exception] = asyncio.Queue()
            self._requests[number] = arrived
            self._outbox.put(("add", number, request.input_ids, _settings(request)))
            try:
                while True:
                    token = await arrived.get()
                    if isinstance(token, Exception):
                        raise token
                    yield token
                    if token.finish_reason is not None:
                        return
            finally:
                if self._requests.pop(number, None) is not None:
                    self._outbox.put(("cancel", number))

    def state(self) -> EngineState:
        """Tells what it is doing."""
        use = self._cache_use if self._admission.running else 0.0
        return EngineState(self._admission.running, self._admission.waiting, use)

    def problem(self) -> str | None:
        """Tells why it cannot compute now; `None` if it can."""
        return self._problem

    @property
    def process_id(self) -> int | None:
        """Of the process that computes."""
        return self._process.pid if self._process else None

    async def close(self) -> None:
        """Ends the process."""
        self._is_closing, self._problem = True, "the server is closing"
        self._outbox.put(_CLOSED)
        await asyncio.to_thread(self._end_process)
        self._vocabulary.cleanup()

    # The process, in other threads than the event loop's -----------------------------------------------------------

    def _start_process(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, str(batching_process_path()), str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=_STDERR
            )
        self._socket, self._connection = ours, Connection(os.dup(ours.fileno()))
        self._connection.send(
            {
                "folder": os.fspath(self._folder),
                "vocabulary": self._vocabulary.name,
                "device": self._options.device,
                "ov_config": self._options.ov_config,
                "extension": self._extension(),
                "max_running": self._options.max_running,
                "blocks": self._blocks,
            }
        )
        try:
            kind, facts = self._connection.recv()
        except (EOFError, ConnectionError):
            kind, facts = "failed", f"its process ended with {self._process.wait()}"
        if kind != "ready":
            self._end_process()
            raise EngineError(f"{self._folder}: openvino-genai does not load this model: {facts}")

    def _extension(self) -> str | None:
        """Finds the native library, if the model holds native linear layers."""
        return os.fspath(native.extension_path()) if native.is_native(self._folder / MODEL_FILE) else None

    def _end_process(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # closing alone would not wake who reads from it
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # in a step that takes long
            self._process.kill()
            self._process.wait()
        self._connection.close()
        self._socket.close()

    def _send(self) -> None:
        while (message := self._outbox.get()) is not _CLOSED:
            try:
                self._connection.send(message)
            except (OSError, ValueError):
                pass  # the process has ended, which the other thread finds, too

    def _receive(self) -> None:
        while True:
            try:
                _, tokens, cache_use = self._connection.recv()
            except (EOFError, OSError, TypeError):
                if self._is_closing or not self._restart():
                    return
                continue
            self._in_loop(self._deliver, tokens, cache_use)

    def _restart(self) -> bool:
        code = self._process.wait()
        problem = f"its process ended with {code}, and is started again"
        logger.error("The engine has stopped: %s.", problem)
        self._in_loop(self._fail, problem)
        self._connection.close()
        self._socket.close()
        try:
            self._start_process()
        except EngineError as error:
            logger.error("%s", error)
            self._in_loop(self._fail, str(error))
            return False
        self._in_loop(self._fail, None)
        return True

    def _in_loop(self, function: Any, *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the event loop is closed
            self._is_closing = True

    # What those threads let the event loop do ----------------------------------------------------------------------

    def _deliver(self, tokens: list[tuple[int, list[tuple[int, float]], str | None, str | None]], use: float) -> None:
        self._cache_use = use
        for number, new, finish_reason, error in tokens:
            arrived = self._requests.get(number)
            if arrived is None:  # it was closed
                if finish_reason is None and error is None:
                    self._outbox.put(("cancel", number))
                continue
            if finish_reason == _REFUSED:
                message = f"The JSON schema has no grammar: {error}"
                arrived.put_nowait(UnsupportedError(message, "response_format"))
                del self._requests[number]
                continue
            if finish_reason is not None and not new:
                error = "it ended without a token"
            for index, (token_id, logprob) in enumerate(new):
                is_last = index == len(new) - 1
                arrived.put_nowait(GeneratedToken(token_id, logprob, finish_reason if is_last else None))
            if error is not None:
                arrived.put_nowait(EngineError(f"The answer could not be computed: {error}."))
            if error is not None or finish_reason is not None:
                del self._requests[number]

    def _fail(self, problem: str | None) -> None:
        self._problem = problem if not self._is_closing else self._problem
        if problem:
            for arrived in self._requests.values():
                arrived.put_nowait(EngineError(f"The answer could not be computed: {problem}."))
            self._requests.clear()


def _settings(request: GenerationRequest) -> dict[str, Any]:
    """Makes the attributes of openvino-genai's `GenerationConfig`."""
    settings: dict[str, Any] = {
        "max_new_tokens": request.max_new_tokens,
        "stop_token_ids": set(request.stop_ids),
        "eos_token_id": request.stop_ids[0],
        "do_sample": request.do_sample,
        "repetition_penalty": request.repetition_penalty,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        "logprobs": int(request.logprobs),
    }
    if request.do_sample:
        settings |= {"temperature": request.temperature, "top_p": request.top_p, "rng_seed": request.seed}
        if request.top_k:
            settings["top_k"] = request.top_k
    if request.json_schema is not None:
        settings["json_schema"] = request.json_schema
    return settings


def _cache_blocks(config: Any, options: EngineOptions) -> int:
    """Counts the blocks of the key/value cache."""
    tokens = options.cache_tokens
    if tokens is None:
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        affordable = _free_bytes() // _SHARE_OF_MEMORY // (numbers * _CACHE_BYTES)
        tokens = min(options.max_running * config.max_position_embeddings, affordable)
    return max(2, -(-tokens // _BLOCK) + 1)


def _free_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        facts = dict(line.split(":", 1) for line in file)
    return int(facts["MemAvailable"].split()[0]) * 1024
