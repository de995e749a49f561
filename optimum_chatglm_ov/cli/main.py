# SPDX-License-Identifier: Apache-2.0
"""Entry point of `chatglm-ov`: finds the sub-command, runs it, and turns exceptions into one line and an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from ..environment import package_version
from ..errors import openvino_message
from ..signals import termination_unwinds
from .arguments import UsageError


# Name, module beside this one, help. A module has `add_arguments(parser)` and `run(args) -> int`.
SUBCOMMANDS = (
    ("chat", "chat", "talk to a model in the terminal"),
    ("serve", "serve", "serve a model over HTTP with OpenAI's interface"),
    ("export", "export", "export a checkpoint to OpenVINO"),
    ("tokenizer", "tokenizer", "write a tokenizer in the forms that other programs read"),
    ("compare", "compare", "compare two models on a text"),
    ("bench", "bench", "time models, and attention alone"),
    ("build-native", "build_native", "build the native operations ahead of their first use"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `chatglm-ov` with these arguments (those of the process by default).

    Returns:
        The exit code: 0, 1 after an error, 2 for arguments that are not understood, 130 after Ctrl-C. SIGTERM removes
        what is half written and ends the process with 143.
    """
    parser = argparse.ArgumentParser(prog="chatglm-ov", description="ChatGLM, every generation, on OpenVINO.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {package_version()}")
    subparsers = parser.add_subparsers(title="sub-commands", dest="subcommand", metavar="SUB-COMMAND", required=True)
    for name, module_name, help_text in SUBCOMMANDS:
        module = importlib.import_module(f".{module_name}", __package__)
        subparser = subparsers.add_parser(name, help=help_text, description=module.__doc__)
        module.add_arguments(subparser)
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error, and all warnings")
        subparser.set_defaults(run=module.run)
    _write_unicode()
    args = parser.parse_args(argv)
    return run_command(args.run, args, name=f"chatglm-ov {args.subcommand}")


@termination_unwinds()
def run_command(run: Callable[[argparse.Namespace], int], args: argparse.Namespace, name: str) -> int:
    """Calls `run(args)`; an exception becomes one line on stderr, beginning with `name`, and an exit code."""
    debug = getattr(args, "debug", False)
    if not debug:
        _quiet_libraries()
    try:
        code = run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # whoever read our output is gone; Python would complain again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        print(f"{name}: error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def one_line(error: BaseException) -> str:
    """Puts the message of `error` on one line, with its class if the exception is not meant for users."""
    if isinstance(error, RuntimeError) and str(error).startswith("Exception from "):
        return f"OpenVINO: {openvino_message(error)}"
    message = " ".join(str(error).split())
    if isinstance(error, (OSError, ValueError)) or type(error).__module__.startswith("optimum_chatglm_ov"):
        return message or type(error).__name__
    return f"{type(error).__name__}: {message} (run with --debug to see where)"


def _quiet_libraries() -> None:
    warnings.simplefilter("ignore")
    if "TRANSFORMERS_VERBOSITY" in os.environ:  # a user's own choice counts
        return
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.set_verbosity_error()
    else:  # imported when a sub-command needs it
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"


def _write_unicode() -> None:
    """Makes pipes UTF-8, whatever the locale says, and terminals show `?` for what they lack."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            encoding = stream.encoding if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="replace")


if __name__ == "__main__":
    sys.exit(main())
