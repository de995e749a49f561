# SPDX-License-Identifier: Apache-2.0
"""Talks to a model in the terminal; without --model, to the tiny one that comes with the package. Answers appear as
they are generated. /clear forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..choices import PROMPT_LOOKUP_TOKENS
from .arguments import (
    UsageError,
    add_hub_arguments,
    add_reuse_options,
    add_runtime_options,
    add_weight_format,
    hub_arguments,
    positive_integer,
    positive_number,
    reuse_options,
    runtime_options,
    unicode_text,
)


if TYPE_CHECKING:
    from .conversation import Conversation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `chatglm-ov chat`."""
    parser.add_argument("--model", metavar="MODEL", help="Hub id or folder, original or exported")
    parser.add_argument(
        "--prompt", type=unicode_text, metavar="TEXT", help="answer this and leave (default: a conversation)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive_integer, metavar="N", help="longest answer (default: what the context holds)"
    )
    parser.add_argument(
        "--session",
        type=Path,
        metavar="FILE",
        help="file of a conversation, which goes on at once where it stopped; it holds what was said, for its owner "
        "alone",
    )
    sampling = parser.add_mutually_exclusive_group()
    sampling.add_argument(
        "--temperature", type=positive_number, help="of sampling (default: that of the model's generation)"
    )
    sampling.add_argument(
        "--greedy", action="store_true", help="always the likeliest token (default for the model of the package)"
    )
    parser.add_argument(
        "--web", action="store_true", help="talk in a browser: show a page at a free port of this machine"
    )
    add_runtime_options(parser)
    add_reuse_options(parser)
    add_weight_format(parser)
    add_hub_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Answers one prompt, or talks until the user leaves."""
    if args.prompt is not None and not args.prompt.strip():
        raise UsageError("--prompt is empty; leave it out for a conversation")
    if args.web:
        return _show_page(args)
    from .. import OVChatGLMForCausalLM
    from ..tokenization import load_tokenizer
    from .conversation import Conversation
    from .session import Session

    options = {**runtime_options(args), **reuse_options(args)}
    with model_folder(args) as folder:
        tokenizer = load_tokenizer(folder)
        model = OVChatGLMForCausalLM.from_pretrained(folder, **options)
        session = None if args.session is None else Session(args.session, model)
        conversation = Conversation(model, tokenizer, _settings(args), session)
        if args.prompt is None:
            return _talk(conversation, args.model or "the tiny model of the package")
        return 130 if conversation.answer(args.prompt) else 0


def _show_page(args: argparse.Namespace) -> int:
    """Talks in a browser until a signal comes."""
    for option in ("prompt", "session", "max_new_tokens", "temperature"):
        if getattr(args, option) is not None:
            raise UsageError(f"--{option.replace('_', '-')} and --web: the page asks for it; leave one of them out")
    from ..serving.extras import require

    require("serve")
    require("web")
    from .page import talk_in_browser

    with model_folder(args) as folder:
        return talk_in_browser(args, folder, Path(args.model).resolve().name if args.model else "tiny-chatglm3")


@contextmanager
def model_folder(args: argparse.Namespace) -> Iterator[Path]:
    """Yields the folder of an IR: the embedded model's, the one that was named, or that of a temporary export."""
    from .. import export_model
    from ..hub.download import resolve_checkpoint
    from ..ir import has_openvino_model
    from .embedded import embedded_model
    from .progress import export_progress

    if args.model is None:
        with embedded_model(args.weight_format) as folder:
            yield folder
        return
    source = resolve_checkpoint(args.model, **hub_arguments(args))
    if has_openvino_model(source):
        if args.weight_format is not None:
            raise UsageError(
                f"--weight-format: {args.model} is exported already; name the original checkpoint instead"
            )
        yield source
        return
    print(f"To export only once: chatglm-ov export {args.model} FOLDER", file=sys.stderr)
    with TemporaryDirectory(prefix="optimum_chatglm_ov-") as temporary:
        with export_progress() as progress:
            folder = export_model(
                source, Path(temporary) / "model", weight_format=args.weight_format, progress=progress
            )
        yield folder


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments of `stream_chat`."""
    settings: dict[str, Any] = {}
    if args.max_new_tokens is not None:
        settings["max_new_tokens"] = args.max_new_tokens
    if args.temperature is not None:
        settings["temperature"] = args.temperature
    elif args.greedy or args.model is None:
        settings["do_sample"] = False
    if args.prompt_lookup:
        settings["prompt_lookup_num_tokens"] = PROMPT_LOOKUP_TOKENS
    return settings


def _talk(conversation: Conversation, name: str) -> int:
    """Reads and answers queries until /exit, the end of the input, or Ctrl-C twice.

    Returns the exit code: in a pipe, 1 if a query was not answered.
    """
    from .main import one_line

    at_terminal = sys.stdin.isatty()
    if at_terminal:
        print(f"Talking to {name}. /clear forgets, /exit leaves, Ctrl-C stops an answer.", file=sys.stderr)
        try:
            import readline  # noqa: F401  gives `input` a history and an editor that knows wide characters
        except ImportError:
            pass
    interrupted = failed = False
    while True:
        try:
            query = input("> " if at_terminal else "").strip()
        except EOFError:
            if at_terminal:
                print()
            break
        except KeyboardInterrupt:
            print()
            if interrupted:
                return 0
            interrupted = True
            print("(Ctrl-C again, Ctrl-D or /exit leaves)", file=sys.stderr)
            continue
        interrupted = False
        if query == "/exit":
            break
        if query == "/clear":
            conversation.clear()
        elif query.startswith("/") and " " not in query:
            print(f"{query}: unknown; there are /clear and /exit", file=sys.stderr)
        elif query:
            try:
                interrupted = conversation.answer(query)
            except BrokenPipeError:
                raise
            except (OSError, ValueError) as error:
                failed = True
                print(f"error: {one_line(error)}", file=sys.stderr)
    return int(failed and not at_terminal)
