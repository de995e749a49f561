# SPDX-License-Identifier: Apache-2.0
"""`chatglm-ov compare`: the accuracy of a quantised or otherwise changed model, against a reference."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..choices import ATTENTIONS, LINEARS, canonical
from .arguments import check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `chatglm-ov compare` to `parser`."""
    parser.description = (
        "Measure perplexity, KL divergence, top-1 agreement and common greedy continuations of two models on a text."
    )
    parser.add_argument("reference", help="IR folder, checkpoint folder or Hub id of the reference")
    parser.add_argument("candidate", help="the model to judge; may be the reference, with other options")
    parser.add_argument("--text", required=True, help="UTF-8 text file, or wikitext2, c4, gsm8k")
    parser.add_argument("--json", metavar="FILE", help="also write the measurements as JSON; - prints them instead")
    parser.add_argument(
        "--max-tokens", type=int, default=4096, help="tokens of the text to measure (default: %(default)s)"
    )
    parser.add_argument("--block-length", type=int, default=512, help="tokens read in one call (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="blocks to continue greedily (default: %(default)s)")
    parser.add_argument(
        "--new-tokens", type=int, default=64, help="tokens to generate from each (default: %(default)s)"
    )
    for model in ("reference", "candidate"):
        parser.add_argument(
            f"--{model}-attention",
            type=canonical,
            choices=ATTENTIONS,
            help=f"of the {model} (default: auto; see chatglm-ov chat)",
        )
        parser.add_argument(
            f"--{model}-linear",
            type=canonical,
            choices=LINEARS,
            help=f"of the {model} (default: auto; see chatglm-ov chat)",
        )
        parser.add_argument(
            f"--{model}-property",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            type=_key_and_value,
            help=f"OpenVINO property of the {model}, such as KV_CACHE_PRECISION=u8; may be repeated",
        )


def run(args: argparse.Namespace) -> int:
    """Compares, prints and returns the exit status."""
    if args.json not in (None, "-"):
        check_writable(Path(args.json))
    from ..integrations import registration  # noqa: F401  before any file is read
    from ..measure.accuracy import compare

    measured = compare(
        args.reference,
        args.candidate,
        args.text,
        reference_config=dict(args.reference_property),
        candidate_config=dict(args.candidate_property),
        reference_attention=args.reference_attention,
        candidate_attention=args.candidate_attention,
        reference_linear=args.reference_linear,
        candidate_linear=args.candidate_linear,
        max_tokens=args.max_tokens,
        block_length=args.block_length,
        prompts=args.prompts,
        new_tokens=args.new_tokens,
    )
    report = json.dumps(measured.to_dict(), indent=2) + "\n"
    if args.json == "-":
        sys.stdout.write(report)
        return 0
    if args.json:
        Path(args.json).write_text(report, encoding="utf-8")
    print(measured.table())
    return 0


def _key_and_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value
