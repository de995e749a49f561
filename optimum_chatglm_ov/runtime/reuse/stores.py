# SPDX-License-Identifier: Apache-2.0
"""Where keys and values of beginnings of prompts are kept: in memory, or in a folder that outlives the process."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np

from ...errors import ChatGLMError
from .files import CacheFileError, clear_unfinished, read_file, write_file


logger = logging.getLogger(__name__)

# What waits to be written: if the disk is slower than the model by more than this, entries are left out.
_MOST_PENDING_BYTES = 2 << 30
# How often a folder is looked through, for what other processes write, while as much is written as it may hold.
_COUNTS = 16
_SUFFIX = ".safetensors"
_NAME = re.compile(rf"[0-9a-f]{{64}}\{_SUFFIX}")
_BLOCKS = "blocks"


class PrefixCacheError(ChatGLMError, OSError):
    """The folder of a prefix cache cannot be used."""


class Store(Protocol):
    """Keeps blocks of keys and values by key, the least recently used for the shortest time.

    Attributes:
        is_lasting: whether what is put there is safe when the process ends.
        size: bytes that all blocks have together at most.
    """

    is_lasting: bool
    size: int

    def get(self, key: bytes, shape: tuple[int, ...]) -> np.ndarray | None:
        """The blocks u8 of that shape, not to be changed; `None` if there are none."""

    def put(self, key: bytes, blocks: np.ndarray) -> None:
        """Keeps `blocks`, which nobody changes any more."""

    def used(self, keys: Sequence[bytes]) -> None:
        """Notes that the blocks of these keys were used just now, of which each is of no use without those before."""

    def __contains__(self, key: bytes) -> bool:
        """Whether there are, or soon will be, blocks of that key."""


class PrefixMemory:
    """Keeps them in memory."""

    is_lasting = False

    def __init__(self, size: int):
        """
        Args:
            size: bytes that all blocks have together at most.
        """
        self.size = size
        self._blocks: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self.bytes = 0
        """That all blocks have together now."""

    def get(self, key: bytes, shape: tuple[int, ...]) -> np.ndarray | None:
        """See [`Store`]."""
        return self._blocks.get(key)

    def put(self, key: bytes, blocks: np.ndarray) -> None:
        """See [`Store`]."""
        if key in self._blocks or blocks.nbytes > self.size:
            return
        self._blocks[key] = blocks
        self.bytes += blocks.nbytes
        while self.bytes > self.size:
            _, oldest = self._blocks.popitem(last=False)
            self.bytes -= oldest.nbytes

    def used(self, keys: Sequence[bytes]) -> None:
        """See [`Store`]."""
        for key in reversed(keys):  # the first one stays longest
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks


class PrefixFolder:
    """Keeps them in files, one for each key, which a thread writes in the background.

    Several processes may share a folder. What is damaged is removed when it is read.
    """

    is_lasting = True

    def __init__(self, folder: str | Path, size: int):
        """
        Args:
            folder: made if it is not there; files of other names in it are left alone.
            size: bytes that all files have together at most.

        Raises:
            PrefixCacheError: it cannot be made, written or listed.
        """
        self.folder, self.size = Path(folder), size
        self._pending: dict[bytes, np.ndarray] = {}
        self._moments: dict[bytes, int] = {}  # when what is pending was used
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="prefix-cache")  # ends its work before Python ends
        self._writes: set[Future] = set()
        self._has_warned = False
        self._since_count = 0  # bytes written since the folder was looked through
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            clear_unfinished(self.folder)
            self._bytes = sum(size for _, size, _ in self._files())
            if not os.access(self.folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(None, "no permission to write there")
        except OSError as error:
            raise PrefixCacheError(
                f"prefix_cache: {self.folder} cannot be used ({error.strerror or error}). Name a folder that you may "
                "write to, or leave it out."
            ) from error

    def get(self, key: bytes, shape: tuple[int, ...]) -> np.ndarray | None:
        """See [`Store`]; the file is mapped."""
        with self._lock:
            if key in self._pending:
                return self._pending[key]
        file = self._file(key)
        try:
            tensors, metadata = read_file(file)
            blocks = tensors.get(_BLOCKS)
            if metadata.get("key") != key.hex() or blocks is None or blocks.shape != shape:
                raise CacheFileError(f"{file}: holds something else than its name says")
        except FileNotFoundError:
            return None
        except CacheFileError as error:
            logger.warning(f"{error}; it is removed and computed again.")
            with suppress(OSError):
                file.unlink()
            return None
        except OSError as error:
            self._warn(f"{file.name} cannot be read", error)
            return None
        return blocks

    def put(self, key: bytes, blocks: np.ndarray) -> None:
        """See [`Store`]."""
        if blocks.nbytes > self.size or key in self:
            return
        with self._lock:
            if sum(waiting.nbytes for waiting in self._pending.values()) > _MOST_PENDING_BYTES:
                return
            self._pending[key] = blocks
        write = self._writer.submit(self._write, key, blocks)
        self._writes.add(write)
        write.add_done_callback(self._writes.discard)

    def used(self, keys: Sequence[bytes]) -> None:
        """See [`Store`]."""
        now = time.time_ns()
        for age, key in enumerate(keys):
            moment = now - 1000 * age  # the first one stays longest
            with self._lock:
                if key in self._pending:
                    self._moments[key] = moment
                    continue
            with suppress(OSError):
                os.utime(self._file(key), ns=(moment, moment))

    def __contains__(self, key: bytes) -> bool:
        return key in self._pending or self._file(key).exists()

    def wait(self) -> None:
        """Waits until all that was put is written."""
        wait(list(self._writes))

    def _write(self, key: bytes, blocks: np.ndarray) -> None:
        file = self._file(key)
        try:
            write_file(file, {_BLOCKS: blocks}, {"key": key.hex()})
            self._bytes += blocks.nbytes
            self._since_count += blocks.nbytes
        except OSError as error:
            self._warn("the prefix cache cannot be written", error)
        finally:
            with self._lock:
                del self._pending[key]
                moment = self._moments.pop(key, None)
            if moment is not None:
                with suppress(OSError):
                    os.utime(file, ns=(moment, moment))
            if self._bytes > self.size or self._since_count * _COUNTS > self.size:
                self._evict()

    def _warn(self, problem: str, error: OSError) -> None:
        """Once: a disk that is full or gone is so for every piece."""
        if not self._has_warned:
            logger.warning(f"{self.folder}: {problem} ({error.strerror or error}).")
        self._has_warned = True

    def _evict(self) -> None:
        """Removes the files that were not used for the longest time, of other processes, too."""
        self._since_count = 0
        try:
            files = sorted(self._files())
        except OSError:  # the folder is gone
            files = []
        self._bytes = sum(size for _, size, _ in files)
        for _, size, file in files:
            if self._bytes <= self.size:
                break
            with suppress(OSError):
                file.unlink()
            self._bytes -= size

    def _files(self) -> list[tuple[int, int, Path]]:
        """When each was used, its size, and itself."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _NAME.fullmatch(entry.name):
                    with suppress(OSError):  # removed by another process just now
                        status = entry.stat(follow_symlinks=False)
                        found.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
        return found

    def _file(self, key: bytes) -> Path:
        return self.folder / f"{key.hex()}{_SUFFIX}"
