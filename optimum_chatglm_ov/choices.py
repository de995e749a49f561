# SPDX-License-Identifier: Apache-2.0
"""The values of arguments. Imports nothing large: the command line lists them without waiting for torch."""

from __future__ import annotations

import re


ATTENTIONS = ("openvino", "native", "auto")
"""Who computes attention: OpenVINO, the native operation of this package, or the latter where it can."""
LINEARS = ("openvino", "native", "native-int8", "auto")
"""Who computes linear layers, in the same words; "native-int8" rounds activations further."""
_EARLIER_NAMES = {"sdpa": "openvino", "fused": "native", "fused-int8": "native-int8"}

KV_CACHE_PRECISIONS = {"bf16": "bf16", "f16": "bf16", "u8": "i8", "f32": "f32"}
"""The cache precision for each value of OpenVINO's property `KV_CACHE_PRECISION` that fused attention serves."""

FLOATING_FORMATS = ("original", "fp32", "fp16", "bf16")
QUANTIZED_FORMATS = ("int8", "int4", "nf4", "mxfp4", "cb4")
WEIGHT_FORMATS = FLOATING_FORMATS + QUANTIZED_FORMATS

WAYS = ("openvino", "native", "native-int8", "paged")
"""What is timed: OpenVINO's stateful attention, the native operation with its bf16 and its int8 cache, and
openvino-genai with OpenVINO's PagedAttention; each with OpenVINO's own defaults for everything that is not chosen."""

PROMPT_LOOKUP_TOKENS = 10
"""Tokens that prompt lookup drafts at once where it is only switched on."""


def canonical(value: str) -> str:
    """Returns the name of a choice; version 0.1.0 called some "sdpa", "fused" and "fused-int8"."""
    return _EARLIER_NAMES.get(value, value)


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def size_in_bytes(size: int | str) -> int:
    """Reads a size such as `20GB`, `512 MiB` or a number of bytes.

    Raises:
        ValueError: it is none, or not above 0.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not (found := int(float(match[1]) * unit)):
        raise ValueError(f"{size!r} is no size; expected a number above 0 with KB, MB, GB, TB, KiB, MiB, GiB or TiB")
    return found
