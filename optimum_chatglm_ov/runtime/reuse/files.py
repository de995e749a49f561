# SPDX-License-Identifier: Apache-2.0
"""Files of keys and values: safetensors that are whole or not there, are their owner's alone, and tell damage."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ...errors import ChatGLMError


FORMAT = "optimum-chatglm-ov keys and values 1"
_DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64}
_LONGEST_HEADER = 1 << 24
_UNFINISHED = ".chatglm-ov-"


class CacheFileError(ChatGLMError, ValueError):
    """A file of keys and values cannot be used."""


def write_file(file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a file that only its owner can read; it is whole or, if this fails, as it was.

    Args:
        file: the file.
        tensors: u8, i32 or i64, by name.
        metadata: texts by name.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in sorted(tensors.items())}
    metadata = {**metadata, "format": FORMAT, "crc32": str(_checksum(tensors))}
    descriptor, name = tempfile.mkstemp(prefix=_UNFINISHED, suffix=".partial", dir=file.parent)  # 0600
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # others clear away what nobody locks
        try:
            save_file(tensors, name, metadata)
        except Exception as error:  # safetensors' own, for a full disk, too
            if isinstance(error, OSError):
                raise
            raise OSError(f"{file}: cannot be written ({error})") from error
        os.chmod(name, 0o600)
        os.replace(name, file)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    finally:
        os.close(descriptor)


def read_file(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Maps the tensors of a file, read-only, and reads its metadata.

    Raises:
        FileNotFoundError: it is not there.
        OSError: it cannot be read.
        CacheFileError: it is damaged, of another format, or another user's.
    """
    with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as stream:
        status = os.fstat(stream.fileno())
        if status.st_uid != os.geteuid():
            raise CacheFileError(f"{file}: belongs to another user, who may have written anything into it")
        try:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(_LONGEST_HEADER, status.st_size):
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
            metadata = header.pop("__metadata__")
            if metadata["format"] != FORMAT:
                raise ValueError(f"its format is {metadata['format']!r}")
            tensors = {name: _mapped(stream, 8 + length, entry) for name, entry in sorted(header.items())}
            if 8 + length + sum(tensor.nbytes for tensor in tensors.values()) != status.st_size:
                raise ValueError("the file is longer or shorter than it says")
            if _checksum(tensors) != int(metadata["crc32"]):
                raise ValueError("the checksum is another")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CacheFileError(
                f"{file}: no whole file of keys and values in the format {FORMAT!r}: {error}"
            ) from error
    return tensors, metadata


def clear_unfinished(folder: Path) -> None:
    """Removes what processes that were killed have left behind."""
    for file in folder.glob(f"{_UNFINISHED}*.partial"):
        with suppress(OSError):
            descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while it is written
                os.unlink(file)
            finally:
                os.close(descriptor)


def _mapped(stream, start: int, entry: Mapping) -> np.ndarray:
    first, last = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), np.dtype(_DTYPES[entry["dtype"]])
    if min(first, *shape, 0) < 0 or last - first != np.prod(shape, dtype=np.float64) * dtype.itemsize:
        raise ValueError(f"a tensor of shape {list(shape)} has {last - first} bytes")
    if first == last:
        return np.zeros(shape, dtype)
    return np.memmap(stream, dtype, "r", start + first, shape)


def _checksum(tensors: Mapping[str, np.ndarray]) -> int:
    checksum = 0
    for name, tensor in tensors.items():
        checksum = zlib.crc32(tensor, zlib.crc32(f"{name} {tensor.dtype} {tensor.shape}".encode(), checksum))
    return checksum
