# SPDX-License-Identifier: Apache-2.0
"""A conversation in a file, with the keys and values of its tokens: it goes on without computing them again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..runtime.reuse.files import CacheFileError, read_file, write_file


_HISTORY = "history"


class Session:
    """The file of one conversation.

    Args:
        file: made by the first answer; written anew by every other one.
        model: an `EngineForCausalLM`.
    """

    def __init__(self, file: Path, model: Any):
        self._file = file
        self._model = model

    def load(self) -> list[Any]:
        """Reads what was said, and lets the model hold what the file has of its keys and values.

        Raises:
            CacheFileError: the file is damaged, or no session.
            OSError: it cannot be read, or there is no folder to write it to.
        """
        if not self._file.exists():
            if not self._file.parent.is_dir():
                raise FileNotFoundError(f"{self._file}: there is no folder {self._file.parent}. Make it first.")
            return []
        tensors, notes = read_file(self._file)
        try:
            history = json.loads(notes[_HISTORY])
        except (KeyError, ValueError) as error:
            raise CacheFileError(f"{self._file}: holds no conversation. Name another file.") from error
        if tensors:
            try:
                self._model.load_cache(self._file)
            except ValueError as error:
                print(f"What was said is computed again: {error}", file=sys.stderr)
        return [tuple(turn) if isinstance(turn, list) else turn for turn in history]

    def save(self, history: list[Any]) -> None:
        """Writes what was said.

        Raises:
            OSError: the file cannot be written.
        """
        notes = {_HISTORY: json.dumps(history, ensure_ascii=False)}
        try:
            if history:
                self._model.save_cache(self._file, notes)
                return
        except ValueError:  # keys and values that cannot be saved: those of OpenVINO's attention
            pass
        write_file(self._file, {}, notes, is_synced=True)
