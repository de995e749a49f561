# SPDX-License-Identifier: Apache-2.0
"""Memory that begins where the kernels read fastest."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import numpy as np


def aligned_bytes(shape: Sequence[int]) -> np.ndarray:
    """Allocates u8 zeros at the beginning of a page; on Linux and macOS what nobody writes takes no memory.

    Memory of `openvino.Tensor` and numpy begins at any multiple of 16 bytes. Each row of a tile would lie in two lines
    of the processor's cache, and prompts take up to 1.7 times as long.

    Raises:
        MemoryError: the system has not so much.
    """
    size = math.prod(shape)
    # of this process alone
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        memory = mmap.mmap(-1, max(size, 1), **private)
    except OSError as error:
        raise MemoryError(f"cannot allocate {size} bytes: {error}") from error
    return np.frombuffer(memory, np.uint8, size).reshape(shape)
