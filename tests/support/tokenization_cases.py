# SPDX-License-Identifier: Apache-2.0
"""What the tokenizer tests share: vocabularies, and what the original tokenizers made of many texts with them."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from optimum_chatglm_ov import ChatGLMTokenizer


DATA = Path(__file__).parents[1] / "data"
NAMES = sorted(path.name.removesuffix(".json.gz") for path in (DATA / "tokenizer_io").glob("*.json.gz"))
ROUNDS_OF_TEXT = [name for name in NAMES if "chatglm-6b" in name or "2-6b" in name]
CHATGLM3 = [name for name in NAMES if "chatglm3" in name]
GLM4 = [name for name in NAMES if "glm-4" in name]

_TOKENIZERS: dict[str, ChatGLMTokenizer] = {}


def folder(name: str) -> Path:
    """Folder of a checkpoint's tokenizer files."""
    return DATA / "tokenizers" / name


def golden(name: str) -> dict[str, Any]:
    """Inputs and outputs of the original tokenizer."""
    with gzip.open(DATA / "tokenizer_io" / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)


def tokenizer(name: str) -> ChatGLMTokenizer:
    """The tokenizer of `folder(name)`, loaded once; do not change it."""
    if name not in _TOKENIZERS:
        _TOKENIZERS[name] = AutoTokenizer.from_pretrained(folder(name))
    return _TOKENIZERS[name]


def as_lists(encoding: dict[str, Any]) -> dict[str, Any]:
    """Arrays as lists; a ChatGLM mask [..., L, L] as one string of 0 and 1 (blocked) for each row."""
    return {name: _as_list(value) for name, value in encoding.items()}


def _as_list(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], np.ndarray):
        return [_as_list(item) for item in value]
    if isinstance(value, np.ndarray) and value.dtype == bool:
        if value.ndim == 1:
            return "".join("1" if blocked else "0" for blocked in value)
        return [_as_list(row) for row in value]
    return value.tolist() if hasattr(value, "tolist") else value
