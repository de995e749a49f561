# SPDX-License-Identifier: Apache-2.0
"""Keeps the Python files of ChatGLM repositories from being run, whatever files, arguments and users say."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name

from ..configuration import ChatGLMConfig
from ..errors import CheckpointError
from ..tokenization import ChatGLMTokenizer
from ..tokenization.auto import ARGUMENTS_OF_AUTO_TOKENIZER


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
# Of `from_pretrained`: where the files are; other arguments have no part in finding them.
_HUB_ARGUMENTS = (
    "_commit_hash",
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


# This package's own way: files of a folder, read without asking anybody ---------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json, which every entry point of this package looks at before transformers does.

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
        CheckpointError: it is of another model type, or of none and not ChatGLM's (see [`is_chatglm`]).
    """
    model_type = config.get("model_type")
    if model_type == ChatGLMConfig.model_type:
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
    raise CheckpointError(
        f"{Path(name) / 'config.json'}: model_type is {found}, expected {ChatGLMConfig.model_type!r}, the only one "
        f"that is supported. No code of a repository is ever run; {advice}"
    )


# transformers' auto classes ------------------------------------------------------------------------------------------


def replace_remote_code(*auto_classes: type) -> None:
    """Makes `from_pretrained` of transformers' auto classes load ChatGLM repositories without running their code.

    Without it, transformers asks whether to run a repository's files where it does not know the model type, and runs
    them with `trust_remote_code=True`, some versions even in place of classes registered by a package. Only
    repositories of ChatGLM are concerned (see [`is_chatglm`]); every other one is loaded as before. One warning is
    logged for each repository. Calling this again changes nothing.

    Args:
        auto_classes: `AutoConfig`, `AutoTokenizer`, ...; all that transformers has by default.
    """
    for auto_class in auto_classes or _auto_classes():
        original = auto_class.from_pretrained.__func__
        if not getattr(original, "_ignores_chatglm_remote_code", False):
            auto_class.from_pretrained = classmethod(_without_remote_code(original))


def _auto_classes() -> Iterator[type]:
    for name in dir(transformers):
        found = getattr(transformers, name) if re.match("Auto[A-Z]", name) else None
        if getattr(found, "__module__", "").startswith("transformers.models.auto."):
            yield found


def _without_remote_code(original: Any) -> Any:
    @functools.wraps(original)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        name = str(pretrained_model_name_or_path)
        is_own, config = _look(pretrained_model_name_or_path, kwargs)
        if is_own:
            if kwargs.get("trust_remote_code"):
                warn_once(name)
            kwargs["trust_remote_code"] = False
            if config and config.get("model_type") not in CONFIG_MAPPING:
                check_model_type(config, name)
                if issubclass(cls, AutoConfig):
                    for argument in ("trust_remote_code", "code_revision"):
                        kwargs.pop(argument, None)
                    return ChatGLMConfig.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            if issubclass(cls, AutoTokenizer) and not _has_local_class(pretrained_model_name_or_path, kwargs):
                for argument in ARGUMENTS_OF_AUTO_TOKENIZER:
                    kwargs.pop(argument, None)
                return ChatGLMTokenizer.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        elif is_own is None and issubclass(cls, (AutoConfig, AutoTokenizer)) and kwargs.get("trust_remote_code"):
            kwargs["trust_remote_code"] = False  # what a second attempt reads must not be run
        return original(cls, pretrained_model_name_or_path, *args, **kwargs)

    from_pretrained._ignores_chatglm_remote_code = True
    return from_pretrained


def _look(pretrained_model_name_or_path: Any, kwargs: Mapping[str, Any]) -> tuple[bool | None, Mapping[str, Any]]:
    """Whether a folder or Hub repository is ChatGLM's, and its config.json, empty if there is none."""
    try:
        config, _ = PretrainedConfig.get_config_dict(pretrained_model_name_or_path, **_hub_arguments(kwargs))
    except Exception:  # perhaps a folder with a tokenizer alone; if not, transformers says what is wrong
        config = {}
    is_own = is_chatglm(config, {})
    if is_own is None:
        is_own = is_chatglm(config, _tokenizer_config(pretrained_model_name_or_path, kwargs))
    return is_own, config


def _has_local_class(pretrained_model_name_or_path: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether tokenizer_config.json names no tokenizer class, or one that transformers or this package has.

    The class that reads tokenizer.json does not count: that file is for programs without this package.
    """
    config = _tokenizer_config(pretrained_model_name_or_path, kwargs)
    name = config.get("tokenizer_class")
    if config.get("has_tokenizer_json"):
        return False
    return name is None or tokenizer_class_from_name(str(name)) is not None


def _tokenizer_config(pretrained_model_name_or_path: Any, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return get_tokenizer_config(pretrained_model_name_or_path, **_hub_arguments(kwargs))
    except Exception:  # as in `_look`
        return {}


def _hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}


def is_chatglm(config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> bool | None:
    """Whether a repository is ChatGLM's by its model type, its keys or the class names in `auto_map`.

    Of `auto_map`, the configuration class decides if it is there: others may use ChatGLM's tokenizer alone.

    Args:
        config: content of config.json, empty if there is none.
        tokenizer_config: the same of tokenizer_config.json; it decides where config.json tells nothing.

    Returns:
        `None` if neither tells.
    """
    if config.get("model_type") == ChatGLMConfig.model_type or any(keys <= config.keys() for keys in _KEYS):
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
    """Names of classes in an `auto_map`, whose entries are "file.Class", or two of them, the second often null."""
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
