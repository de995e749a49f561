# SPDX-License-Identifier: Apache-2.0
"""Recognises the folders and Hub repositories of ChatGLM by their files, of which none is run."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..architectures.families import MODEL_TYPES
from ..configuration import ChatGLMConfig
from ..errors import CheckpointError


logger = logging.getLogger(__name__)

# What `auto_map` of the original repositories names; none of that code is needed with this package.
_REPLACED_CLASSES = {
    "ChatGLM4Tokenizer",
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "ChatGLMForSequenceClassification",
    "ChatGLMModel",
    "ChatGLMTokenizer",
}
# Keys that every config.json of chatglm-6b, or of the generations after it, has together, and other models have not.
_KEYS = (
    {"inner_hidden_size", "max_sequence_length", "position_encoding_2d"},
    {"ffn_hidden_size", "kv_channels", "multi_query_group_num", "padded_vocab_size"},
)


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json, which every entry point of this package looks at before transformers does.

    A configuration of ChatGLM that only lost its `model_type` is recognised, with one warning.

    Raises:
        CheckpointError: config.json is missing, not JSON or of another model type.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file}: not found; expected the config.json of a ChatGLM checkpoint. Check the folder or Hub id."
        ) from error
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}). Download it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: a {type(config).__name__}, expected an object. Download it again.")
    check_model_type(config, str(folder))
    return config


def check_model_type(config: Mapping[str, Any], name: str) -> None:
    """Logs a warning if the configuration of the repository `name` is ChatGLM's and only lacks its `model_type`.

    Raises:
        CheckpointError: it is of another model type than its keys say, or of none and not ChatGLM's (see
            [`is_chatglm`]).
    """
    model_type = config.get("model_type")
    if model_type in MODEL_TYPES and (model_type == ChatGLMConfig.model_type or not has_chatglm_keys(config)):
        return
    is_own = is_chatglm(config, {})
    if not model_type and is_own:
        _warn_of_missing_type(name)
        return
    found = (
        f"{model_type!r}"
        if model_type
        else "missing, and neither its keys nor the classes in `auto_map` are those of ChatGLM"
    )
    advice = "use optimum-intel for other models."
    if is_own:
        advice = f'if this is a ChatGLM checkpoint, set "model_type": "{ChatGLMConfig.model_type}" in config.json.'
    supported = " or ".join(map(repr, sorted(MODEL_TYPES)))
    raise CheckpointError(
        f"{Path(name) / 'config.json'}: model_type is {found}, expected {supported}, the only ones "
        f"that are supported. No code of a repository is ever run; {advice}"
    )


def has_chatglm_keys(config: Mapping[str, Any]) -> bool:
    """Tells whether a config.json has the keys of ChatGLM, which no other model has together."""
    return any(keys <= config.keys() for keys in _KEYS)


def is_chatglm(config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> bool | None:
    """Tells whether a repository is ChatGLM's by its model type, its keys or the class names in `auto_map`.

    Of `auto_map`, the configuration class decides if it is there: others may use ChatGLM's tokenizer alone.

    Args:
        config: content of config.json, empty if there is none.
        tokenizer_config: the same of tokenizer_config.json; it decides where config.json tells nothing.

    Returns:
        `None` if neither tells.
    """
    if config.get("model_type") == ChatGLMConfig.model_type or has_chatglm_keys(config):
        return True
    auto_map = config.get("auto_map")
    if isinstance(auto_map, Mapping) and "AutoConfig" in auto_map:
        auto_map = auto_map["AutoConfig"]
    classes = _classes(auto_map)
    if not classes and not config.get("model_type"):
        if tokenizer_config.get("chatglm_generation"):  # written by this package
            return True
        classes = _classes(tokenizer_config.get("auto_map")) or _classes(tokenizer_config.get("tokenizer_class"))
    if classes:
        return classes <= _REPLACED_CLASSES
    return False if config.get("model_type") else None


def _classes(entry: Any) -> set[str]:
    """Collects the class names of an `auto_map`, whose entries are "file.Class", or two of them, one often null."""
    if isinstance(entry, str):
        return {entry.rpartition(".")[2]}
    entries = entry.values() if isinstance(entry, Mapping) else entry if isinstance(entry, (list, tuple)) else ()
    return set().union(*map(_classes, entries))


@functools.cache
def warn_once(name: str) -> None:
    """Logs that `trust_remote_code` has no effect for the repository `name`."""
    logger.warning(
        f"`trust_remote_code=True` has no effect for {name}: optimum_chatglm_ov has its own classes for ChatGLM, and "
        "no code of the repository is run."
    )


@functools.cache
def _warn_of_missing_type(name: str) -> None:
    logger.warning(
        f"{name}: config.json has no `model_type`; its keys or the classes in `auto_map` tell that it is "
        f"{ChatGLMConfig.model_type!r}."
    )
