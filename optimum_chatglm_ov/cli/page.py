# SPDX-License-Identifier: Apache-2.0
"""The page of `chatglm-ov chat --web`: that of `chatglm-ov serve --web`, for this machine alone."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

import uvicorn

from ..serving.app import create_app
from ..serving.closing import DrainingServer
from ..serving.engine import EngineOptions
from ..serving.model import ServerOptions
from .arguments import reuse_options, runtime_options


_HOST = "127.0.0.1"
_DRAIN_SECONDS = 5


def talk_in_browser(args: argparse.Namespace, folder: Path, name: str) -> int:
    """Serves the page of the model in `folder` at a free port, and prints the address, until a signal comes."""
    app = create_app(
        folder,
        ServerOptions(name=name, greedy=args.greedy or args.model is None, web=True),
        EngineOptions(prompt_lookup=args.prompt_lookup, **runtime_options(args), **reuse_options(args)),
    )
    with socket.socket() as listener:
        listener.bind((_HOST, 0))
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_DRAIN_SECONDS)
        server = _Server(config, f"Talk to {name} at http://{_HOST}:{listener.getsockname()[1]} (Ctrl-C ends it).")
        server.run(sockets=[listener])
    return 0 if server.started else 1


class _Server(DrainingServer):
    """A server that says where it is once it answers."""

    def __init__(self, config: uvicorn.Config, greeting: str):
        super().__init__(config)
        self._greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self._greeting, flush=True)
