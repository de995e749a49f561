# SPDX-License-Identifier: Apache-2.0
"""What `from_pretrained` is asked to keep of prompts, and where."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...architectures.architecture import Architecture
from ...choices import size_in_bytes
from ..engine import Engine, FusedEngine
from .prefixes import Prefixes
from .stores import PrefixFolder, PrefixMemory


logger = logging.getLogger(__name__)

_SIZE_IN_MEMORY, _SIZE_OF_FOLDER = "1GB", "20GB"


@dataclass(frozen=True)
class ReuseSettings:
    """What is kept of prompts.

    Attributes:
        folder: where; `None`: in memory.
        size: bytes at most.
        always: of every generation; else of conversations alone.
        never: of none.
    """

    folder: Path | None
    size: int
    always: bool
    never: bool = False

    @classmethod
    def of(cls, prefix_cache: str | Path | bool | None = None, size: int | str | None = None) -> ReuseSettings:
        """Reads the arguments of `from_pretrained`.

        Raises:
            ValueError: one of them has another form.
        """
        if not isinstance(prefix_cache, (str, os.PathLike, bool, type(None))) or prefix_cache == "":
            raise ValueError(f"`prefix_cache` is {prefix_cache!r}; expected a folder, True, False or None.")
        in_folder = isinstance(prefix_cache, (str, os.PathLike))
        default = _SIZE_OF_FOLDER if in_folder else _SIZE_IN_MEMORY
        try:
            found = size_in_bytes(default if size is None else size)
        except ValueError as error:
            raise ValueError(f"`prefix_cache_size`: {error}.") from error
        folder = Path(prefix_cache) if in_folder else None
        return cls(folder, found, always=in_folder or prefix_cache is True, never=prefix_cache is False)

    def prefixes(self, engine: Engine, architecture: Architecture, identity: Callable[[], bytes]) -> Prefixes | None:
        """What keeps the prompts of `engine`; `None` if nothing is kept.

        Args:
            engine: that of a model.
            architecture: of the model.
            identity: tells apart what may not share keys and values.

        Raises:
            PrefixCacheError: the folder cannot be used.
        """
        if self.never:
            return None
        if not isinstance(engine, FusedEngine):
            if self.always:
                logger.warning("`prefix_cache` has no effect: it needs native attention, which this model has not.")
            return None
        if self.folder is None:
            return Prefixes(engine, architecture, PrefixMemory(self.size), b"")
        return Prefixes(engine, architecture, PrefixFolder(self.folder, self.size), identity())
