# SPDX-License-Identifier: Apache-2.0
"""Tells which ChatGLM generation a vocabulary belongs to."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

from .vocabulary import TokenizerError, load_sentencepiece, vocabulary_format


logger = logging.getLogger(__name__)

GENERATIONS = ("chatglm", "chatglm2", "chatglm3", "glm4")

_GENERATION_OF_NAME = (
    (re.compile(r"chatglm[-_]?3", re.I), "chatglm3"),
    (re.compile(r"chatglm[-_]?2|codegeex[-_]?2", re.I), "chatglm2"),
)


def detect_generation(vocab_file: str, tokenizer_config: dict[str, Any]) -> str:
    """One of `GENERATIONS`, for a vocabulary file and the arguments that its tokenizer is made with.

    The file tells ChatGLM (its own pieces for line breaks) and GLM-4 (not a SentencePiece model) apart. ChatGLM2 and
    ChatGLM3 have the same file: what tells them apart is, in this order, `chatglm_generation` in `tokenizer_config`,
    the role tokens in it, the repository names stored beside the file (`name_or_path` of tokenizer_config.json,
    `_name_or_path` of config.json), and the name the tokenizer was asked for by. When nothing tells, ChatGLM3 is
    taken and a warning says so.

    Raises:
        TokenizerError: `chatglm_generation` is unknown or contradicts the file, or the file is unusable.
    """
    asked = tokenizer_config.get("chatglm_generation")
    possible = _generations_of_file(vocab_file)
    if asked is not None:
        check_generation(asked, possible, vocab_file)
        return asked
    if len(possible) == 1:
        return possible[0]

    role_tokens = (tokenizer_config.get("added_tokens_decoder") or {}).values()
    if any("<|assistant|>" in str(token) for token in role_tokens):
        return "chatglm3"
    if "<|assistant|>" in str(tokenizer_config.get("chat_template")):
        return "chatglm3"
    for name in _repository_names(vocab_file, tokenizer_config):
        for pattern, generation in _GENERATION_OF_NAME:
            if pattern.search(name):
                return generation
    logger.warning(
        f"Nothing beside {vocab_file} tells whether it belongs to ChatGLM2 or ChatGLM3, whose prompts differ; "
        'ChatGLM3 is assumed. Pass `chatglm_generation="chatglm2"` or `"chatglm3"` (or write it into '
        "tokenizer_config.json) to decide."
    )
    return "chatglm3"


def check_generation(asked: str, possible: tuple[str, ...], vocab_file: str) -> None:
    """Raises `TokenizerError` unless `asked`, a value of `chatglm_generation`, is one of `possible`."""
    if asked not in GENERATIONS:
        raise TokenizerError(f"`chatglm_generation` is {asked!r}; expected one of {', '.join(GENERATIONS)}.")
    if asked not in possible:
        raise TokenizerError(
            f"`chatglm_generation` is {asked!r}, but {vocab_file} is a vocabulary of {' or '.join(possible)}. "
            "Leave the argument out, or give the right file."
        )


def _generations_of_file(vocab_file: str) -> tuple[str, ...]:
    if vocabulary_format(vocab_file) == "ranks":
        return ("glm4",)
    model = load_sentencepiece(vocab_file)
    return ("chatglm",) if model.piece_to_id("<n>") != model.unk_id() else ("chatglm2", "chatglm3")


def _repository_names(vocab_file: str, tokenizer_config: dict[str, Any]) -> Iterator[str]:
    folder = os.path.dirname(os.path.abspath(vocab_file))
    yield _read_key(os.path.join(folder, "tokenizer_config.json"), "name_or_path")
    for key in ("original_name_or_path", "_name_or_path"):
        yield _read_key(os.path.join(folder, "config.json"), key)
    # Only the last part of a path: a parent folder called "chatglm2-and-3" says nothing.
    yield os.path.basename(os.path.normpath(str(tokenizer_config.get("name_or_path") or folder)))


def _read_key(path: str, key: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return str(json.load(file).get(key) or "")
    except (OSError, ValueError):
        return ""
