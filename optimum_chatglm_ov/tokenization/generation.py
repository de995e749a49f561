# SPDX-License-Identifier: Apache-2.0
"""Tells which ChatGLM generation a vocabulary belongs to."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from typing import Any

from ..architectures.families import GENERATIONS, GENERATIONS_OF_RANKS, family_of_name
from .vocabulary import TokenizerError, load_sentencepiece, vocabulary_format


logger = logging.getLogger(__name__)


def detect_generation(vocab_file: str, tokenizer_config: dict[str, Any]) -> tuple[str, bool]:
    """Detects the generation of a vocabulary file and of the arguments that its tokenizer is made with.

    The file tells ChatGLM (its own pieces for line breaks) and GLM-4 (not a SentencePiece model). ChatGLM2 and
    ChatGLM3 have the same file, and so have GLM-4 and CodeGeeX4. These are told apart by the first of:

    - `chatglm_generation` in `tokenizer_config`; a stored "glm4" means CodeGeeX4 where a stored name is of that, since
      version 0.1.0 knew GLM-4 alone
    - the role tokens there, which ChatGLM2 has not
    - the model names stored beside the file (`name_or_path` of tokenizer_config.json, `_name_or_path` of config.json)
    - the name that the tokenizer was asked for by

    Where nothing tells, it is GLM-4, or ChatGLM3 with a warning.

    Returns:
        One of `GENERATIONS`, and whether anything told it.

    Raises:
        TokenizerError: `chatglm_generation` is unknown or contradicts the file, the file is unusable, or the stored
            names contradict each other.
    """
    asked = tokenizer_config.get("chatglm_generation")
    possible = _generations_of_file(vocab_file)
    folder = os.path.dirname(os.path.abspath(vocab_file))
    stored = _stored_names(folder)
    if asked is not None:
        check_generation(asked, possible, vocab_file)
        is_stored = asked == _read_key(folder, "tokenizer_config.json", "chatglm_generation")
        if asked == "glm4" and is_stored and _is_codegeex4(stored.values()):
            return "codegeex4", True
        return asked, True
    if len(possible) == 1:
        return possible[0], True

    role_tokens = (tokenizer_config.get("added_tokens_decoder") or {}).values()
    texts = [*map(str, role_tokens), str(tokenizer_config.get("chat_template"))]
    if "chatglm3" in possible and any("<|assistant|>" in text for text in texts):
        return "chatglm3", True
    asked_by = str(tokenizer_config.get("name_or_path") or folder)
    for names in (stored, {"the name": os.path.abspath(asked_by) if os.path.isdir(asked_by) else asked_by}):
        families = {place: family_of_name(name, possible) for place, name in names.items()}
        found = {family.generation for family in families.values() if family is not None}
        if len(found) == 1:
            return found.pop(), True
        if "codegeex4" in found:  # which was made from GLM-4, and may name it
            return "codegeex4", True
        if found:
            told = " and ".join(f"{place} {names[place]!r}" for place, family in families.items() if family)
            raise TokenizerError(
                f"{folder}: {told} are names of different generations, whose prompts differ. Decide with "
                f"`chatglm_generation`, one of {', '.join(possible)}, in tokenizer_config.json or as an argument."
            )
    if possible == GENERATIONS_OF_RANKS:
        return "glm4", True
    logger.warning(
        f"Nothing beside {vocab_file} tells whether it belongs to ChatGLM2 or ChatGLM3, whose prompts differ; "
        'ChatGLM3 is assumed. Pass `chatglm_generation="chatglm2"` or `"chatglm3"` (or write it into '
        "tokenizer_config.json) to decide."
    )
    return "chatglm3", False


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
        return GENERATIONS_OF_RANKS
    model = load_sentencepiece(vocab_file)
    return ("chatglm",) if model.piece_to_id("<n>") != model.unk_id() else ("chatglm2", "chatglm3")


def _is_codegeex4(names: Iterable[str]) -> bool:
    families = (family_of_name(name, GENERATIONS_OF_RANKS) for name in names)
    return any(family is not None and family.generation == "codegeex4" for family in families)


def _stored_names(folder: str) -> dict[str, str]:
    """Finds stored names: key and file -> name. transformers overwrites `_name_or_path`, an export keeps it."""
    names = {
        "`name_or_path` of tokenizer_config.json": _read_key(folder, "tokenizer_config.json", "name_or_path"),
        "`original_name_or_path` of config.json": _read_key(folder, "config.json", "original_name_or_path"),
    }
    if not names["`original_name_or_path` of config.json"]:
        names["`_name_or_path` of config.json"] = _read_key(folder, "config.json", "_name_or_path")
    return {place: name for place, name in names.items() if name}


def _read_key(folder: str, name: str, key: str) -> str:
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            return str(json.load(file).get(key) or "")
    except (OSError, ValueError, AttributeError):
        return ""
