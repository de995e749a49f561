# SPDX-License-Identifier: Apache-2.0
"""Tensors of a checkpoint: what is declared of them, what is read, and what is made of it."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch


# Rows converted at a time: copies stay below 100 MB.
_ROWS = 1024


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that a checkpoint has to hold.

    Attributes:
        original: its name there.
        shape: of its numbers, `[rows, columns]` or `[rows]`.
        is_linear: whether it is the matrix of a linear layer inside a block: what quantised checkpoints have as
            integers.
    """

    original: str
    shape: tuple[int, ...]
    is_linear: bool = False

    @property
    def is_adaptable(self) -> bool:
        """Whether PEFT can adapt it: a linear layer's matrix, or the embedding's."""
        return len(self.shape) == 2


@dataclass(frozen=True)
class Weight:
    """A matrix or vector of the checkpoint, possibly quantised per row.

    Attributes:
        data: fp16, bf16 or fp32 `[rows, columns]` or `[rows]`; int8 `[rows, columns]` when `bits` is 8; when `bits` is
            4, int8 `[rows, columns / 2]` with the even column in the high nibble, both sign-extended.
        scale: fp16 `[rows]`; the weight is `integer * scale`. `None` for floating-point data.
        bits: 4 or 8 for quantised data, else 16 or 32.
        scratch: where copies of rows go; ordinary memory when `None`.
    """

    data: torch.Tensor
    scale: torch.Tensor | None = None
    bits: int = 16
    scratch: Scratch | None = None

    def rows(self, index: slice | np.ndarray) -> Weight:
        """Returns the rows `index`, in that order: a view for a slice, a copy otherwise."""
        if isinstance(index, slice):
            return replace(self, data=self.data[index], scale=None if self.scale is None else self.scale[index])
        index = torch.from_numpy(index)
        out = self.scratch.empty((len(index), *self.data.shape[1:]), self.data.dtype) if self.scratch else None
        data = torch.index_select(self.data, 0, index, out=out)
        return replace(self, data=data, scale=None if self.scale is None else self.scale[index])

    def to(self, dtype: torch.dtype) -> Weight:
        """Converts to floating-point numbers of `dtype`, rounded once; the weight itself, if it has that already."""
        if self.scale is None and self.data.dtype == dtype:
            return self
        shape = list(self.data.shape)
        if self.bits == 4:
            shape[1] *= 2
        out = self.scratch.empty(tuple(shape), dtype) if self.scratch else torch.empty(shape, dtype=dtype)
        for start in range(0, shape[0], _ROWS):
            rows = slice(start, start + _ROWS)
            out[rows] = self.rows(rows)._numbers()
        return replace(self, data=out, scale=None, bits=8 * dtype.itemsize)

    def _numbers(self) -> torch.Tensor:
        if self.scale is None:
            return self.data
        integers = self.data
        if self.bits == 4:
            integers = torch.stack((self.data >> 4, (self.data << 4) >> 4), dim=-1).flatten(-2)
        return integers * self.scale.float()[:, None]


class Scratch:
    """Memory of a temporary file that has no name: copies kept here need no anonymous memory and no cleaning up.

    Args:
        folder: an existing folder on the file system to use.
    """

    def __init__(self, folder: str | Path):
        self._file = tempfile.TemporaryFile(dir=folder)
        self._size = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Makes a tensor of `shape` and `dtype` with undefined content, mapped from the file."""
        size = math.prod(shape) * dtype.itemsize
        start = -(-self._size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._size = start + size
        os.posix_fallocate(self._file.fileno(), start, size)  # a full disk must fail here, not as a bus error
        array = np.memmap(self._file, dtype=np.uint8, mode="r+", offset=start, shape=(size,))
        return torch.from_numpy(array).view(dtype).view(shape)


class Derived(Mapping[str, Weight]):
    """Weights made of other weights, under the same names, when they are asked for.

    Args:
        weights: tensors by canonical name.
        derive: of a name and the weight in `weights`, the weight here.
    """

    def __init__(self, weights: Mapping[str, Weight], derive: Callable[[str, Weight], Weight]):
        self._weights = weights
        self._derive = derive
        self._matrix: tuple[str, Weight] | None = None

    def __getitem__(self, name: str) -> Weight:
        if self._matrix is not None and self._matrix[0] == name:  # query, key and value are rows of one matrix
            return self._matrix[1]
        weight = self._derive(name, self._weights[name])
        if weight.data.ndim == 2:
            self._matrix = name, weight
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __contains__(self, name: object) -> bool:
        return name in self._weights
