# SPDX-License-Identifier: Apache-2.0
"""The tokenizer in a folder: one of this package, or of transformers where the model type is one of its own."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..architectures.families import MODEL_TYPES_OF_TRANSFORMERS
from ..signals import signals_wait
from .base import ChatGLMTokenizer


_FAST_TOKENIZER_FILE = "tokenizer.json"


def has_vocabulary(folder: str | Path) -> bool:
    """Tells whether a folder holds the vocabulary of a tokenizer."""
    names = [_FAST_TOKENIZER_FILE] if _is_fast(folder) else ChatGLMTokenizer.vocab_files_names.values()
    return any((Path(folder) / name).is_file() for name in names)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer in `folder`, whatever class its files name.

    A `ChatGLMTokenizer` is of the generation that its vocabulary belongs to.

    Raises:
        TokenizerError: see [`ChatGLMTokenizer`].
        OSError, ValueError: a tokenizer of transformers cannot be read.
    """
    with signals_wait():  # transformers 4 makes an ImportError of what interrupts it where there is no protobuf
        return (PreTrainedTokenizerFast if _is_fast(folder) else ChatGLMTokenizer).from_pretrained(folder)


def _is_fast(folder: str | Path) -> bool:
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return config.get("model_type") in MODEL_TYPES_OF_TRANSFORMERS
    except (OSError, ValueError, AttributeError):
        return False
