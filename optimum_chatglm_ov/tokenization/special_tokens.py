# SPDX-License-Identifier: Apache-2.0
"""Special tokens as tokenizer_config.json has them."""

from __future__ import annotations

from typing import Any

from transformers import AddedToken
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .vocabulary import TokenizerError


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


def _added_token(name: str, value: Any) -> Any:
    if isinstance(value, (str, AddedToken)):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise TokenizerError(
            f"`{name}` is {value!r}; expected the text of a token, or a dictionary with it as `content`. Mend it in "
            "tokenizer_config.json."
        )
    return AddedToken(**{key: value[key] for key in _KEYS_OF_ADDED_TOKENS if key in value})
