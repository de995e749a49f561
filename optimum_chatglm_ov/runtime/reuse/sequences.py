# SPDX-License-Identifier: Apache-2.0
"""What an engine holds, in a file: the tokens with their keys and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..cache import FusedCache, context_tokens, past_key_values_of
from ..engine import Engine, FusedEngine, HeldTokens
from .files import CacheFileError, read_file, write_file
from .rows import Span, read_blocks, write_blocks


_MODEL, _IS_COUNTED = "model", "is_counted"


class CacheFilesMixin:
    """Keys and values of an `EngineForCausalLM` in files."""

    def save_cache(self, file: str | Path, notes: Mapping[str, str] | None = None) -> None:
        """Writes the tokens that the model holds, with their keys and values, for `load_cache`.

        The file is as large as they are in memory, and holds what was said; its owner alone can read it.

        Args:
            file: is replaced once the new one is whole.
            notes: texts to keep in it.

        Raises:
            ValueError: the model holds none, or beams, or computes attention by OpenVINO.
            OSError: the file cannot be written.
        """
        with self._turn:
            self.compile()
            save_sequences(self.engine, Path(file), self._identity, notes or {})

    def load_cache(self, file: str | Path) -> FusedCache:
        """Lets the model hold what `save_cache` wrote.

        `chat()` goes on from it when its prompt begins so; `generate()` takes what is returned as `past_key_values`,
        with the whole sequence as `input_ids`.

        Raises:
            CacheFileError: another model wrote it, or the same with other settings; or it is damaged.
            ValueError: the model computes attention by OpenVINO.
            OSError: the file cannot be read.
        """
        with self._turn:
            self.compile()
            if self._prefixes is not None:
                self._prefixes.keep()
            load_sequences(self.engine, Path(file), self._identity)
            if self._prefixes is not None:
                self._prefixes.after_call(has_begun=True)
            return past_key_values_of(self.engine, context_tokens(self.engine, self.engine.held.attention_mask))


def save_sequences(engine: Engine, file: Path, identity: Callable[[], bytes], notes: Mapping[str, str]) -> None:
    """Writes what `engine` holds.

    Args:
        engine: has fused attention.
        file: is replaced once it is whole.
        identity: tells apart what may not share keys and values.
        notes: texts to keep in it.

    Raises:
        ValueError: there is nothing to write, or beams, or another engine.
        OSError: the file cannot be written.
    """
    engine = _fused(engine)
    if not engine.past_length or engine.held.length != engine.past_length:
        raise ValueError(f"{file}: the model holds no tokens whose keys and values could be saved; generate first.")
    stored_rows = [engine.state.stored_row(row) for row in range(engine.batch_size)]
    if None in stored_rows:
        raise ValueError(f"{file}: the model holds the beams of a search, which are not saved. Generate without.")
    tensors = {
        "input_ids": engine.held.input_ids,
        "attention_mask": engine.held.attention_mask,
        "blocks": np.stack([read_blocks(engine.state, row, 0, _whole(engine)) for row in stored_rows]),
    }
    if (layout := engine.read_rows("prompt_layout")) is not None:
        tensors["prompt_layout"] = layout
    known = {_MODEL: identity().hex(), _IS_COUNTED: str(engine.held.is_counted)}
    write_file(file, tensors, {**notes, **known}, is_synced=True)


def load_sequences(engine: Engine, file: Path, identity: Callable[[], bytes]) -> None:
    """Lets `engine` hold what was saved; arguments as of `save_sequences`.

    Raises:
        CacheFileError: the file is damaged, or another model's.
        ValueError: another engine.
        OSError: the file cannot be read.
    """
    engine = _fused(engine)
    tensors, metadata = read_file(file)
    if metadata.get(_MODEL) != identity().hex():
        raise CacheFileError(
            f"{file}: the keys and values are of another model, or were computed with other settings, another CPU's "
            "instructions or another version. Generate anew."
        )
    try:
        held = HeldTokens(
            np.array(tensors["input_ids"]), np.array(tensors["attention_mask"]), metadata[_IS_COUNTED] == "True"
        )
        _check(tensors, engine)
    except (KeyError, IndexError, ValueError) as error:
        raise CacheFileError(f"{file}: does not hold what it must: {error}. Generate anew.") from error
    engine.hold(held)
    for row, blocks in enumerate(tensors["blocks"]):
        write_blocks(engine.state, row, 0, _whole(engine), blocks)
    if "prompt_layout" in tensors:
        engine.write_state("prompt_layout", np.array(tensors["prompt_layout"]))


def _check(tensors: Mapping[str, np.ndarray], engine: FusedEngine) -> None:
    """
    Raises:
        ValueError: a tensor is not what `save_sequences` writes of this engine.
    """
    ids, layout = tensors["input_ids"], engine.state.layout
    tokens = Span(0, layout.prefix_tokens + ids.shape[-1])
    expected = {
        "input_ids": (np.int64, (*ids.shape[:1], *ids.shape[-1:])),
        "attention_mask": (np.int64, ids.shape),
        "blocks": (np.uint8, (*ids.shape[:1], *tokens.shape(layout))),
    }
    if engine.read_state("prompt_layout") is not None:
        expected["prompt_layout"] = (np.int32, (*ids.shape[:1], 2))
    if ids.shape[-1] > engine.state.max_tokens:
        raise ValueError(f"{ids.shape[-1]} tokens exceed the context length of {engine.state.max_tokens}")
    for name, (dtype, shape) in expected.items():
        if tensors[name].dtype != dtype or tensors[name].shape != shape or not tensors[name].size:
            found = tensors[name]
            raise ValueError(f"`{name}` is {found.dtype} {found.shape}, expected {np.dtype(dtype)} {shape}")


def _fused(engine: Engine) -> FusedEngine:
    if not isinstance(engine, FusedEngine):
        raise ValueError(
            "Only native attention has keys and values that can be saved and loaded. Load the model as "
            '`OVChatGLMForCausalLM.from_pretrained(..., attention="native")`.'
        )
    return engine


def _whole(engine: FusedEngine) -> Span:
    return Span(0, engine.state.layout.prefix_tokens + engine.past_length)
