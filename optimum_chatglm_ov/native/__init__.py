# SPDX-License-Identifier: Apache-2.0
"""The native operations, an extension of the installed OpenVINO: fused attention, its caches, and linear layers."""

from __future__ import annotations

import ctypes
import os
import weakref
from pathlib import Path

import openvino as ov

from .build import NativeBuildError, build_native, extension_path


__all__ = [
    "NativeBuildError",
    "build_native",
    "extension_path",
    "instruction_sets",
    "is_fused",
    "linear_instruction_sets",
    "linear_is_fast",
    "load",
]

_loaded: weakref.WeakSet[ov.Core] = weakref.WeakSet()


def load(core: ov.Core) -> None:
    """Registers the operations with a core, once; builds the library if need be.

    Raises `NativeBuildError` when there is no library and none can be built.
    """
    if core in _loaded:
        return
    path = extension_path()
    try:
        core.add_extension(os.fspath(path))
    except RuntimeError as error:
        raise NativeBuildError(f"OpenVINO {ov.get_version()} does not load {path}: {error}") from error
    _loaded.add(core)


def is_fused(xml: Path) -> bool:
    """Whether an IR holds `ChatGLMAttention`: OpenVINO can read it only after `load`."""
    return b'type="ChatGLMAttention"' in xml.read_bytes()


def instruction_sets() -> list[str]:
    """Kernels of attention that this CPU can run, best first; `CHATGLM_OV_ISA` takes one of these names."""
    return _names("chatglm_attention_instruction_sets")


def linear_instruction_sets() -> list[str]:
    """The same of linear layers."""
    return _names("chatglm_linear_instruction_sets")


def linear_is_fast() -> bool:
    """Whether the native linear layers are meant for this CPU: it multiplies bytes (VNNI) and has no AMX."""
    return bool(ctypes.CDLL(os.fspath(extension_path())).chatglm_linear_is_fast())


def _names(function: str) -> list[str]:
    names = getattr(ctypes.CDLL(os.fspath(extension_path())), function)
    names.restype = ctypes.c_char_p
    return names().decode().split(",")
