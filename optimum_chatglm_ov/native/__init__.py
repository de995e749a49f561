# SPDX-License-Identifier: Apache-2.0
"""The fused attention operation: a native extension of the installed OpenVINO, its graph pass and its caches."""

from __future__ import annotations

import ctypes
import os
import weakref
from pathlib import Path

import openvino as ov

from .build import NativeBuildError, build_native, extension_path


__all__ = ["NativeBuildError", "build_native", "extension_path", "instruction_sets", "is_fused", "load"]

_loaded: weakref.WeakSet[ov.Core] = weakref.WeakSet()


def load(core: ov.Core) -> None:
    """Registers `ChatGLMAttention` with a core, once; builds the library if need be.

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
    """Kernels that this CPU can run, best first; `CHATGLM_OV_ISA` takes one of these names."""
    library = ctypes.CDLL(os.fspath(extension_path()))
    library.chatglm_attention_instruction_sets.restype = ctypes.c_char_p
    return library.chatglm_attention_instruction_sets().decode().split(",")
