# SPDX-License-Identifier: Apache-2.0
"""Special tokens as files have them, and as tokenizer.json names them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase

from .vocabulary import TokenizerError


MARK = "\ufdd0"
"""In tokenizer.json, stands before the names of control tokens that are not recognised in text. It is no character."""

NAMES_OF_FAST_INPUTS = ["input_ids", "attention_mask"]
SPECIAL_TOKENS = tuple(name for name in PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES if name.endswith("_token"))
_KEYS_OF_ADDED_TOKENS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def read_special_tokens(kwargs: dict[str, Any]) -> None:
    """Makes `AddedToken`s of the special tokens that are plain dictionaries, as files edited by hand have them.

    Raises:
        TokenizerError: one is no text, and no dictionary with a text.
    """
    for name, value in kwargs.items():
        if name in (*SPECIAL_TOKENS, "gmask_token", "end_token") and value is not None:
            kwargs[name] = _added_token(name, value)
        elif name in ("additional_special_tokens", "extra_special_tokens") and isinstance(value, (list, tuple)):
            kwargs[name] = [_added_token(name, token) for token in value]
        elif name in ("extra_special_tokens", "model_specific_special_tokens") and isinstance(value, dict):
            kwargs[name] = {key: _added_token(f"{name}.{key}", token) for key, token in value.items()}
        elif name == "added_tokens_decoder" and isinstance(value, dict):
            kwargs[name] = {int(key): _added_token(f"{name}.{key}", token) for key, token in value.items()}


def undo_fast_forms(kwargs: dict[str, Any]) -> None:
    """Makes of arguments that tokenizer_config.json has for tokenizer.json those of this package's classes."""
    if kwargs.pop("has_tokenizer_json", False) and kwargs.get("model_input_names") == NAMES_OF_FAST_INPUTS:
        del kwargs["model_input_names"]
    for name, token in kwargs.items():
        if name.endswith("_token") and isinstance(token, (str, AddedToken)) and str(token).startswith(MARK):
            kwargs[name] = str(token).removeprefix(MARK)


def _added_token(name: str, value: Any) -> Any:
    if isinstance(value, (str, AddedToken)):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise TokenizerError(
            f"`{name}` is {value!r}; expected the text of a token, or a dictionary with it as `content`. Mend it in "
            "tokenizer_config.json."
        )
    return AddedToken(**{key: value[key] for key in _KEYS_OF_ADDED_TOKENS if key in value})


@contextmanager
def other_class_is_expected() -> Iterator[None]:
    """Keeps transformers from warning that tokenizer_config.json names another class: the one of tokenizer.json."""

    def is_other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("The tokenizer class you load from this checkpoint")

    base = logging.getLogger(PreTrainedTokenizerBase.__module__)
    base.addFilter(is_other)
    try:
        yield
    finally:
        base.removeFilter(is_other)
