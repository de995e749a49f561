# SPDX-License-Identifier: Apache-2.0
"""The native library as Python calls it: its operations for OpenVINO, and its functions by ctypes."""

from __future__ import annotations

import ctypes
import functools
import os

import numpy as np
import openvino as ov
from openvino.utils.node_factory import NodeFactory

from .build import NativeBuildError, extension_path


def add_extension(registry: ov.Core | NodeFactory) -> None:
    """Makes the operations known to `registry`. Raises `NativeBuildError` without the native library."""
    path = extension_path()
    try:
        registry.add_extension(os.fspath(path))
    except RuntimeError as error:
        raise NativeBuildError(f"OpenVINO {ov.get_version()} does not load {path}: {error}") from error


@functools.lru_cache(maxsize=1)
def functions() -> ctypes.CDLL:
    """The functions beside the operations (openvino/extension.cpp). Raises `NativeBuildError` without the library."""
    found = ctypes.CDLL(os.fspath(extension_path()))
    found.chatglm_attention_instruction_sets.restype = ctypes.c_char_p
    found.chatglm_linear_instruction_sets.restype = ctypes.c_char_p
    for name in ("chatglm_block_tokens", "chatglm_max_head_dim", "chatglm_panel_columns"):
        getattr(found, name).restype = ctypes.c_int64
    found.chatglm_cache_block_bytes.restype = ctypes.c_int64
    found.chatglm_cache_block_bytes.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    found.chatglm_copy_tokens.restype = None
    found.chatglm_copy_tokens.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int]
    found.chatglm_copy_tokens.argtypes += [ctypes.c_void_p, ctypes.c_int64] * 2 + [ctypes.c_int64]
    found.chatglm_linear_panel_bytes.restype = ctypes.c_int64
    found.chatglm_linear_panel_bytes.argtypes = [ctypes.c_int64] * 5
    found.chatglm_linear_pack.restype = None
    found.chatglm_linear_pack.argtypes = [ctypes.c_int64] * 4 + [ctypes.c_void_p, ctypes.c_uint8]
    found.chatglm_linear_pack.argtypes += [ctypes.c_void_p] * 4
    found.chatglm_peak_operations.restype = ctypes.c_double
    found.chatglm_peak_operations.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    return found


def block_tokens() -> int:
    """Tokens of one cache block; a cache is u8 `[rows, num_key_value_heads, blocks, cache_block_bytes]`."""
    return functions().chatglm_block_tokens()


def cache_block_bytes(cache_precision: str, head_dim: int) -> int:
    """Bytes of the keys, or of the values, of `block_tokens()` tokens of one head.

    Raises `ValueError` for a cache precision that the operation does not have.
    """
    size = functions().chatglm_cache_block_bytes(cache_precision.encode(), head_dim)
    if not size:
        raise ValueError(f"`cache_precision` is {cache_precision!r}; expected f32, bf16 or i8.")
    return size


def copy_tokens(
    layout: tuple[str, int], is_keys: bool, source: tuple[np.ndarray, int], target: tuple[np.ndarray, int], count: int
) -> None:
    """Copies the keys, or the values, of `count` tokens of every head between rows of blocks.

    Args:
        layout: cache precision and `head_dim`.
        is_keys: whether they are keys.
        source, target: blocks, u8 `[num_key_value_heads, blocks, bytes]`, and the token in them to begin at.
    """
    precision, head_dim = layout
    (source_blocks, source_token), (target_blocks, target_token) = source, target
    for read, written in zip(source_blocks, target_blocks, strict=True):
        if not read.flags.c_contiguous or not written.flags.c_contiguous:
            raise ValueError("the blocks of a head must lie behind one another")
        functions().chatglm_copy_tokens(
            precision.encode(),
            head_dim,
            is_keys,
            read.ctypes.data,
            source_token,
            written.ctypes.data,
            target_token,
            count,
        )


def max_head_dim() -> int:
    """The largest `head_dim` of the attention operation, which must also be a multiple of 16."""
    return functions().chatglm_max_head_dim()


def panel_columns() -> int:
    """Output features that the packed weights of a linear layer hold together."""
    return functions().chatglm_panel_columns()
