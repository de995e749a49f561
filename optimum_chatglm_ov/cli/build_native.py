# SPDX-License-Identifier: Apache-2.0
"""Builds the native operations for the installed OpenVINO ahead of their first use."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `chatglm-ov build-native`."""
    parser.add_argument("--force", action="store_true", help="build again, even if the cache has it")


def run(args: argparse.Namespace) -> int:
    """Builds the library and prints where it is and which kernels this CPU can run."""
    from .. import native

    print(native.build_native(force=args.force))
    print("attention kernels for this CPU, best first:", ", ".join(native.instruction_sets()))
    print("kernels of linear layers:", ", ".join(native.linear_instruction_sets()))
    return 0
