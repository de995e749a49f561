# SPDX-License-Identifier: Apache-2.0
"""What tells models apart whose keys and values must not be mixed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino as ov

from ... import environment
from ...native import extension_path, instruction_sets
from ..engine import FusedEngine


_PART = 1 << 24


def model_identity(engine: FusedEngine, weights: bytes, settings: Mapping[str, Any]) -> bytes:
    """A digest of all that keys and values follow from, apart from the tokens.

    Args:
        engine: runs the model.
        weights: `digest_of_files` or `digest_of_model` of what it runs.
        settings: how it computes; all values have a text.
    """
    known = {
        "weights": weights.hex(),
        "layout": repr(engine.state.layout),
        "openvino": ov.get_version(),
        "library": hashlib.sha256(extension_path().read_bytes()).hexdigest(),
        "instruction_sets": [*instruction_sets(), environment.variable(environment.INSTRUCTION_SET)],
        "settings": {name: str(value) for name, value in settings.items()},
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).digest()


@dataclass(frozen=True)
class StoredFiles:
    """Files of an exported model, as they were when it was read."""

    files: tuple[Path, ...]
    states: tuple[tuple[str | int, ...], ...]

    @classmethod
    def of(cls, files: Sequence[Path]) -> StoredFiles:
        """These files, as they are."""
        return cls(tuple(files), _states(files))

    @property
    def are_unchanged(self) -> bool:
        """Whether they hold what was read: an export may have taken their place."""
        try:
            return _states(self.files) == self.states
        except OSError:
            return False


def _states(files: Sequence[Path]) -> tuple[tuple[str | int, ...], ...]:
    states = [(os.fspath(file.resolve()), os.stat(file)) for file in files]
    return tuple((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev) for name, s in states)


def digest_of_files(stored: StoredFiles) -> bytes:
    """The digest of the content of the files of an exported model.

    A file in the cache folder of this package remembers it, by their names, sizes and times of change.
    """
    note = None
    with suppress(environment.CacheFolderError):
        name = hashlib.sha256(json.dumps(stored.states).encode()).hexdigest()
        note = environment.cache_dir() / "digests" / name
    with suppress(OSError, ValueError, AttributeError):
        if len(digest := bytes.fromhex(note.read_text())) == hashlib.sha256().digest_size:
            return digest
    content = hashlib.sha256()
    for file in stored.files:
        content.update(os.stat(file).st_size.to_bytes(8, "little"))
        with open(file, "rb", buffering=0) as stream:
            while part := stream.read(_PART):
                content.update(part)
    if note is not None:
        with suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            unfinished = note.with_name(f"{note.name}.{os.getpid()}")
            unfinished.write_text(content.hexdigest())
            os.replace(unfinished, note)
    return content.digest()


def digest_of_model(model: ov.Model) -> bytes:
    """The digest of a model that no file holds: of its operations, their attributes and constants."""
    content = hashlib.sha256()
    names = {node.get_name(): i for i, node in enumerate(model.get_ordered_ops())}
    for node in model.get_ordered_ops():
        sources = [(names[value.get_node().get_name()], value.get_index()) for value in node.input_values()]
        outputs = [(str(port.get_element_type()), str(port.get_partial_shape())) for port in node.outputs()]
        content.update(repr((node.get_type_name(), sources, outputs)).encode())
        if node.get_type_name() == "Constant":
            content.update(node.get_data().tobytes())
        else:
            content.update(repr(sorted((name, str(value)) for name, value in node.get_attributes().items())).encode())
    return content.digest()
