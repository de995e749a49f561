# SPDX-License-Identifier: Apache-2.0
"""The native operations, an extension of the installed OpenVINO: fused attention, its caches, and linear layers."""

from __future__ import annotations

from pathlib import Path

import openvino as ov

from .build import NativeBuildError, build_native, extension_path
from .library import add_extension, functions


__all__ = [
    "NativeBuildError",
    "build_native",
    "extension_path",
    "instruction_sets",
    "is_fused",
    "is_native",
    "linear_instruction_sets",
    "linear_is_fast",
    "load",
    "peak_operations",
]

PEAKS = ("tile-bf16", "tile-int8", "vnni-int8", "f32")
"""Kinds of products that `peak_operations` counts, those of AMX tiles and those of vectors."""


def load(core: ov.Core) -> None:
    """Registers the operations with a core; builds the library if need be.

    Raises `NativeBuildError` when there is no library and none can be built.
    """
    add_extension(core)


def is_fused(xml: Path) -> bool:
    """Tells whether an IR holds `ChatGLMAttention`."""
    return b'type="ChatGLMAttention"' in xml.read_bytes()


def is_native(xml: Path) -> bool:
    """Tells whether an IR holds native operations: OpenVINO can read it only after `load`."""
    return b'version="optimum_chatglm_ov"' in xml.read_bytes()


def instruction_sets() -> list[str]:
    """Names the kernels of attention that this CPU can run, best first; `CHATGLM_OV_ISA` takes one of these names."""
    return functions().chatglm_attention_instruction_sets().decode().split(",")


def linear_instruction_sets() -> list[str]:
    """Names the kernels of linear layers, as `instruction_sets` those of attention."""
    return functions().chatglm_linear_instruction_sets().decode().split(",")


def linear_is_fast() -> bool:
    """Tells whether the native linear layers are meant for this CPU: it multiplies bytes, with VNNI or AMX."""
    return bool(functions().chatglm_linear_is_fast())


def peak_operations(kind: str, threads: int) -> float:
    """Measures operations a second, 2 for a multiply-add, of products that stay in registers, on so many threads.

    `kind` is one of `PEAKS`; 0 where this CPU has no such instructions. Raises `ValueError` for another kind or no
    thread, `NativeBuildError` without the native library.
    """
    if kind not in PEAKS:
        raise ValueError(f"`kind` is {kind!r}; expected one of {', '.join(PEAKS)}.")
    if threads < 1:
        raise ValueError(f"`threads` is {threads}; expected at least 1.")
    return functions().chatglm_peak_operations(kind.encode(), threads)
