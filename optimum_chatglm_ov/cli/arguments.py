# SPDX-License-Identifier: Apache-2.0
"""Arguments that several sub-commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ..choices import ATTENTIONS, KV_CACHE_PRECISIONS, LINEARS, WEIGHT_FORMATS, canonical, size_in_bytes


_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
_Number = TypeVar("_Number", int, float)


class UsageError(Exception):
    """Arguments that contradict each other; the exit code is 2."""


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that find a checkpoint on the Hub."""
    group = parser.add_argument_group("Hugging Face Hub")
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit (default: the main branch)")
    group.add_argument("--token", help="access token (default: HF_TOKEN, or the one that `hf auth login` stored)")
    group.add_argument(
        "--cache-dir", "--cache_dir", metavar="DIR", help="folder for downloads (default: HF_HUB_CACHE)"
    )
    group.add_argument("--local-files-only", action="store_true", help="use what was downloaded before, no network")
    group.add_argument("--force-download", action="store_true", help="download again what is in the cache")
    group.add_argument("--subfolder", default="", metavar="DIR", help="folder inside the repository")


def hub_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments of `resolve_checkpoint` and `export_model`."""
    return {name: getattr(args, name) for name in _HUB_ARGUMENTS}


def add_weight_format(parser: Any) -> None:
    """Adds `--weight-format` to a parser or a group of arguments."""
    parser.add_argument(
        "--weight-format",
        choices=WEIGHT_FORMATS,
        help="precision of the weights (default: int8 above 10^9 parameters, else as in the checkpoint)",
    )


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of running a model; OpenVINO chooses what is left out."""
    group = parser.add_argument_group("OpenVINO")
    group.add_argument("--device", default="CPU", help="device (default: CPU)")
    group.add_argument(
        "--attention",
        type=canonical,
        choices=ATTENTIONS,
        help="who computes attention: OpenVINO, this package's native operation, or the latter where it can be built "
        "(default: auto)",
    )
    group.add_argument(
        "--linear",
        type=canonical,
        choices=LINEARS,
        help="who computes int8 and int4 linear layers: OpenVINO, this package's native operations, or the latter on "
        "CPUs where they are faster (default: auto; openvino with --attention openvino)",
    )
    group.add_argument(
        "--kv-cache-precision",
        choices=tuple(KV_CACHE_PRECISIONS),
        help="of keys and values (default: bf16 with native attention, whose f16 is bf16; u8 with OpenVINO's on CPU)",
    )
    add_computation_options(group)


def add_computation_options(group: Any) -> None:
    """Adds the precision of computation to a parser or a group of arguments."""
    group.add_argument(
        "--inference-precision",
        choices=("bf16", "f16", "f32"),
        help="of computation (default: bf16 or f16 where the CPU is fast at it, else f32)",
    )
    group.add_argument(
        "--dynamic-quantization-group-size",
        type=non_negative_integer,
        metavar="N",
        help="activations that share a scale in int8 and int4 models; 0 leaves activations as they are",
    )


def runtime_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments of `OVChatGLMForCausalLM.from_pretrained`."""
    ov_config = computation_options(args)
    if args.kv_cache_precision is not None:
        ov_config["KV_CACHE_PRECISION"] = args.kv_cache_precision
    return {"device": args.device, "attention": args.attention, "linear": args.linear, "ov_config": ov_config}


def add_reuse_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of what is not computed twice, or drafted."""
    group = parser.add_argument_group("what is not computed again (native attention)")
    group.add_argument(
        "--prefix-cache",
        metavar="DIR",
        help="folder that keeps keys and values of prompts, for equal beginnings of later ones, also after a restart; "
        "it holds what was said, for its owner alone",
    )
    group.add_argument(
        "--prefix-cache-size", type=cache_size, metavar="SIZE", help="what the folder holds at most (default: 20GB)"
    )
    group.add_argument(
        "--prompt-lookup",
        action="store_true",
        help="draft tokens that follow the same words in the prompt, as long as that is faster",
    )


def reuse_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments of `OVChatGLMForCausalLM.from_pretrained` that the folder's options choose."""
    if args.prefix_cache is None and args.prefix_cache_size is not None:
        raise UsageError("--prefix-cache-size is the size of a folder: name one with --prefix-cache")
    return {"prefix_cache": args.prefix_cache, "prefix_cache_size": args.prefix_cache_size}


def computation_options(args: argparse.Namespace) -> dict[str, str]:
    """Returns the OpenVINO properties that the options of `add_computation_options` choose."""
    properties = {
        "INFERENCE_PRECISION_HINT": args.inference_precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": args.dynamic_quantization_group_size,
    }
    return {name: str(value) for name, value in properties.items() if value is not None}


def check_writable(file: Path) -> None:
    """Raises `UsageError` if `file` cannot be written, before long work whose result would be lost."""
    existed = file.exists()
    try:
        file.open("ab").close()
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror})") from error
    if not existed:
        file.unlink()


def cache_size(text: str) -> int:
    """Reads a size such as 20GB."""
    try:
        return size_in_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def unicode_text(text: str) -> str:
    """Reads an argument as UTF-8, whatever the locale says."""
    return os.fsencode(text).decode("utf-8", "replace")


def non_negative_integer(text: str) -> int:
    """Reads an argument that must be an integer, 0 or above."""
    return _number(text, int, lambda value: value >= 0, "an integer of at least 0")


def positive_integer(text: str) -> int:
    """Reads an argument that must be an integer above 0."""
    return _number(text, int, lambda value: value > 0, "a positive integer")


def positive_number(text: str) -> float:
    """Reads an argument that must be a number above 0."""
    return _number(text, float, lambda value: 0 < value < float("inf"), "a positive number")


def _number(text: str, read: Callable[[str], _Number], is_wanted: Callable[[_Number], bool], wanted: str) -> _Number:
    with suppress(ValueError):
        if is_wanted(value := read(text)):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
