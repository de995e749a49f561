# SPDX-License-Identifier: Apache-2.0
"""Servers for tests, each in a thread of its own; a plugin of pytest with the one that most tests share."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import openai
import pytest
import uvicorn

from optimum_chatglm_ov.cli.embedded import embedded_model
from optimum_chatglm_ov.serving.app import create_app
from optimum_chatglm_ov.serving.engine import EngineOptions
from optimum_chatglm_ov.serving.model import ServerOptions


NAME = "tiny"
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


class Server:
    """A running server: its address, its application, and OpenAI's client for it."""

    def __init__(self, app, port: int, api_key: str | None = None):
        self.app, self.port = app, port
        self.url = f"http://127.0.0.1:{port}"
        self.engine = app.state.model.engine
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key or "none", max_retries=0, timeout=60)

    def chat(self, text: str, **arguments):
        """One answer to one question."""
        messages = [{"role": "user", "content": text}]
        return self.client.chat.completions.create(model=NAME, messages=messages, **arguments)


@contextlib.contextmanager
def run_server(app) -> Iterator[Server]:
    """A server of an application while the block runs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(256)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        assert thread.is_alive(), "the server did not start"
        try:
            yield Server(app, listener.getsockname()[1], app.state.model.options.api_key)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server did not end"


@contextlib.contextmanager
def serving(folder, options: ServerOptions, engine_options: EngineOptions) -> Iterator[Server]:
    """A server of the model in a folder while the block runs."""
    with run_server(create_app(folder, options, engine_options)) as server:
        yield server


def options(**changes) -> ServerOptions:
    return ServerOptions(**{"name": NAME, "greedy": True, **changes})


def engine_options(**changes) -> EngineOptions:
    return EngineOptions(**{"ov_config": EXACT, "max_running": 8, "cache_tokens": 8192, **changes})


@pytest.fixture(scope="session")
def tiny():
    """Folder of the package's own model."""
    with embedded_model() as folder:
        yield folder


@pytest.fixture(scope="session")
def server(tiny):
    """The package's own model, with the batched engine."""
    with serving(tiny, options(), engine_options()) as running:
        yield running
