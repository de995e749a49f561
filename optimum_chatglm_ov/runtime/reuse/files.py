# SPDX-License-Identifier: Apache-2.0
"""Files of keys and values: safetensors that are whole or not there, are their owner's alone, and tell damage."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import tempfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from ...errors import ChatGLMError


FORMAT = "optimum-chatglm-ov keys and values 1"
_DTYPES = {"U8": np.dtype(np.uint8), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}
_LONGEST_HEADER = 1 << 24
_UNFINISHED = ".chatglm-ov-"
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe would wait for its writer


class CacheFileError(ChatGLMError, ValueError):
    """A file of keys and values cannot be used."""


def write_file(
    file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], is_synced: bool = False
) -> None:
    """Writes a file that only its owner can read; it is whole or, if this fails, as it was.

    safetensors' own `save_file` takes a name, and may write another file: neither lock nor mode would be its.

    Args:
        file: the file.
        tensors: u8, i32 or i64, by name.
        metadata: texts by name.
        is_synced: whether it takes the place of the earlier one only when the disk has it.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in sorted(tensors.items())}
    metadata = {**metadata, "format": FORMAT, "crc32": str(_checksum(tensors))}
    descriptor, name = _begin_unfinished(file.parent)
    with open(descriptor, "wb") as stream:
        try:
            stream.write(_header(tensors, metadata))
            for tensor in tensors.values():
                stream.write(tensor.reshape(-1).view(np.uint8))
            stream.flush()
            if is_synced:
                os.fsync(descriptor)
            os.replace(name, file)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise


def read_file(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Maps the tensors of a file, read-only, and reads its metadata.

    Raises:
        FileNotFoundError: it is not there.
        OSError: it cannot be read.
        CacheFileError: it is damaged, of another format, or another user's.
    """
    with open(_open(file), "rb") as stream:
        status = os.fstat(stream.fileno())
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
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CacheFileError(
                f"{file}: no whole file of keys and values in the format {FORMAT!r}: {error}"
            ) from error
    return tensors, metadata


def clear_unfinished(folder: Path) -> None:
    """Removes what processes that were killed have left behind."""
    for file in folder.glob(f"{_UNFINISHED}*.partial"):
        with suppress(OSError):
            descriptor = os.open(file, _READ)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while it is written
                os.unlink(file)
            finally:
                os.close(descriptor)


def _begin_unfinished(folder: Path) -> tuple[int, str]:
    """Descriptor and name of a new file of mode 0600, locked: others clear away what nobody locks."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=_UNFINISHED, suffix=".partial", dir=folder)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, name
        os.close(descriptor)  # cleared away before it was locked


def _header(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """What a file of safetensors begins with."""
    names, end = {dtype: name for name, dtype in _DTYPES.items()}, 0
    header: dict[str, Mapping[str, object]] = {"__metadata__": dict(metadata)}
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _open(file: Path) -> int:
    """The descriptor of a file of this user."""
    try:
        descriptor = os.open(file, _READ)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CacheFileError(f"{file}: is a symbolic link") from error
        raise
    status, problem = os.fstat(descriptor), None
    if not stat.S_ISREG(status.st_mode):
        problem = "is no file"
    elif status.st_uid != os.geteuid():
        problem = "belongs to another user, who may have written anything into it"
    if problem is not None:
        os.close(descriptor)
        raise CacheFileError(f"{file}: {problem}")
    return descriptor


def _mapped(stream, start: int, entry: Mapping) -> np.ndarray:
    first, last = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
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
