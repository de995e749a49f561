# SPDX-License-Identifier: Apache-2.0
"""Serves a model over HTTP with OpenAI's interface: chat and completions, streams, tool calls; without --model, the
tiny one that comes with the package. Ctrl-C or SIGTERM lets answers that were begun end."""

from __future__ import annotations

import argparse
import logging
import os

from .. import environment
from .arguments import (
    add_hub_arguments,
    add_reuse_options,
    add_runtime_options,
    add_weight_format,
    non_negative_integer,
    positive_integer,
    positive_number,
    reuse_options,
    runtime_options,
    unicode_text,
)
from .chat import model_folder


ENGINES = ("auto", "batched", "queue")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `chatglm-ov serve`."""
    parser.add_argument("--model", metavar="MODEL", help="Hub id or folder, original or exported")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=non_negative_integer, default=8000, help="port; 0 takes a free one")
    parser.add_argument(
        "--served-name", type=unicode_text, metavar="NAME", help="name of the model for clients (default: its own)"
    )
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"key that clients must send (default: {environment.API_KEY}, else none)"
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="many requests at once by openvino-genai, one by one by this package, or the former where it can",
    )
    parser.add_argument("--web", action="store_true", help="show a page to talk to at /")
    parser.add_argument("--log-prompts", action="store_true", help="write prompts and answers to the log")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-running", type=positive_integer, default=32, metavar="N", help="answers at once")
    limits.add_argument("--max-waiting", type=non_negative_integer, default=256, metavar="N", help="answers in line")
    limits.add_argument("--max-body", type=positive_integer, default=4 << 20, metavar="BYTES", help="of a request")
    limits.add_argument("--queue-seconds", type=positive_number, default=60.0, metavar="S", help="longest wait")
    limits.add_argument("--request-seconds", type=positive_number, default=600.0, metavar="S", help="longest answer")
    limits.add_argument(
        "--drain-seconds",
        type=positive_integer,
        default=30,
        metavar="S",
        help="for answers that were begun, at the end",
    )
    limits.add_argument(
        "--cache-tokens",
        type=positive_integer,
        metavar="N",
        help="tokens that the key/value cache holds (default: --max-running times the context, or a quarter of the "
        "free memory)",
    )
    parser.add_argument("--numa-node", type=non_negative_integer, metavar="N", help="use the CPUs of this node alone")
    add_runtime_options(parser)
    add_reuse_options(parser)
    add_weight_format(parser)
    add_hub_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serves until a signal comes."""
    from ..serving.extras import require

    require("serve")
    if args.web:
        require("web")
    import uvicorn

    from ..serving.numa import bind_to_node

    if args.numa_node is not None:
        bind_to_node(args.numa_node)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    with model_folder(args) as folder:
        from ..serving.app import create_app
        from ..serving.closing import DrainingServer
        from ..serving.engine import EngineOptions
        from ..serving.model import ServerOptions

        app = create_app(
            folder,
            ServerOptions(
                name=args.served_name or _name(args),
                greedy=args.model is None,
                api_key=args.api_key or environment.variable(environment.API_KEY),
                max_body=args.max_body,
                request_seconds=args.request_seconds,
                log_prompts=args.log_prompts,
                web=args.web,
            ),
            EngineOptions(
                kind=args.engine,
                max_running=args.max_running,
                max_waiting=args.max_waiting,
                queue_seconds=args.queue_seconds,
                cache_tokens=args.cache_tokens,
                prompt_lookup=args.prompt_lookup,
                **runtime_options(args),
                **reuse_options(args),
            ),
        )
        config = uvicorn.Config(
            app,
            host=args.host,
            port=args.port,
            timeout_graceful_shutdown=args.drain_seconds,
            log_config=None,
            access_log=True,
        )
        server = DrainingServer(config)
        server.run()
    return 0 if server.started else 1


def _name(args: argparse.Namespace) -> str:
    if args.model is None:
        return "tiny-chatglm3"
    return os.path.basename(os.path.normpath(args.model)) if os.path.isdir(args.model) else args.model
