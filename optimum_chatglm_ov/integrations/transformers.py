# SPDX-License-Identifier: Apache-2.0
"""Everything that is told to transformers or changed in it: its auto classes know ChatGLM, and run none of its code.

What is changed says which versions of transformers need it; a test of each says when none does any more.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name
from transformers.utils import cached_file

from ..architectures.families import MODEL_TYPES_OF_TRANSFORMERS
from ..checkpoint.shards import WEIGHT_FILES
from ..configuration import ChatGLMConfig
from ..errors import CheckpointError
from ..ir import MODEL_FILE, has_openvino_model
from ..tokenization import ChatGLM4Tokenizer, ChatGLMTokenizer
from .recognition import check_model_type, has_chatglm_keys, is_chatglm, read_config, warn_once


RUNS_REMOTE_CODE = SpecifierSet(">=4.51")
"""Versions that ask whether to run the code of a repository of unknown model type, or run it with
`trust_remote_code=True`: all so far."""
SKIPS_REGISTERED_TOKENIZERS = SpecifierSet(">=5.0,<5.3")
"""Versions that try to make a `tokenizers` tokenizer of every repository without `auto_map` whose class is not their
own, before they look at registered classes. For ChatGLM that succeeds, with wrong token ids."""

LOADS_TORCH_WEIGHTS_ALONE = SpecifierSet(">=4.51")
"""Versions whose `AutoModelForCausalLM` has a class of torch for model types that this package exports, and looks for
its weights where an exported model is: all so far."""

# The class names that ChatGLM repositories have in tokenizer_config.json.
_TOKENIZERS = {"ChatGLMTokenizer": ChatGLMTokenizer, "ChatGLM4Tokenizer": ChatGLM4Tokenizer}
_ARGUMENTS_OF_AUTO_TOKENIZER = (
    "config",
    "use_fast",
    "tokenizer_type",
    "backend",
    "trust_remote_code",
    "code_revision",
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


# What transformers offers to be told ---------------------------------------------------------------------------------


def register_tokenizers() -> None:
    """Registers the configuration and the tokenizers with `AutoConfig` and `AutoTokenizer`; twice changes nothing."""
    AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)
    # AutoTokenizer keeps one class per configuration class and looks classes up by name among them.
    name_carrier = type("ChatGLM4Config", (ChatGLMConfig,), {"__doc__": "Carries the name ChatGLM4Tokenizer."})
    AutoTokenizer.register(name_carrier, slow_tokenizer_class=ChatGLM4Tokenizer, exist_ok=True)
    AutoTokenizer.register(ChatGLMConfig, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)


def register_model(model_class: type) -> None:
    """Registers a model class with `AutoModelForCausalLM`, and with `AutoModel` as the original repositories do."""
    AutoModelForCausalLM.register(ChatGLMConfig, model_class, exist_ok=True)
    AutoModel.register(ChatGLMConfig, model_class, exist_ok=True)


# What is changed in transformers -------------------------------------------------------------------------------------


def patch() -> None:
    """Makes the changes that the installed transformers needs; twice changes nothing."""
    version = Version(transformers.__version__)
    if SKIPS_REGISTERED_TOKENIZERS.contains(version, prereleases=True):
        prefer_registered_tokenizers()
    if RUNS_REMOTE_CODE.contains(version, prereleases=True):
        replace_remote_code()
    if LOADS_TORCH_WEIGHTS_ALONE.contains(version, prereleases=True):
        load_exported_models()


def prefer_registered_tokenizers() -> None:
    """Makes `AutoTokenizer` load the tokenizers of this package by their names, see `SKIPS_REGISTERED_TOKENIZERS`."""
    original = AutoTokenizer.from_pretrained.__func__
    if getattr(original, "_prefers_chatglm_classes", False):
        return

    @functools.wraps(original)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        config = get_tokenizer_config(pretrained_model_name_or_path, **kwargs)
        tokenizer_class = _TOKENIZERS.get(config.get("tokenizer_class"))
        if tokenizer_class is None:
            return original(cls, pretrained_model_name_or_path, *args, **kwargs)
        for name in _ARGUMENTS_OF_AUTO_TOKENIZER:
            kwargs.pop(name, None)
        return tokenizer_class.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    vars(from_pretrained)["_prefers_chatglm_classes"] = True
    AutoTokenizer.from_pretrained = classmethod(from_pretrained)


def load_exported_models() -> None:
    """Makes `AutoModelForCausalLM` load exported models of transformers' types, see `LOADS_TORCH_WEIGHTS_ALONE`."""
    original = AutoModelForCausalLM.from_pretrained.__func__
    if getattr(original, "_loads_exported_models", False):
        return

    @functools.wraps(original)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_exported_folder(pretrained_model_name_or_path, kwargs.get("subfolder")):
            try:
                return original(cls, pretrained_model_name_or_path, *args, **kwargs)
            except (OSError, AttributeError):  # there are no weights of torch; version 4 trips over that offline
                if not _is_exported_repository(pretrained_model_name_or_path, kwargs):
                    raise
        from ..modeling import OVChatGLMForCausalLM

        return OVChatGLMForCausalLM.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    vars(from_pretrained)["_loads_exported_models"] = True
    AutoModelForCausalLM.from_pretrained = classmethod(from_pretrained)


def _is_exported_folder(name_or_path: Any, subfolder: str | None) -> bool:
    if not isinstance(name_or_path, (str, os.PathLike)):
        return False
    folder = Path(name_or_path, subfolder or "")
    if not has_openvino_model(folder) or any((folder / name).is_file() for name in WEIGHT_FILES):
        return False
    try:
        return read_config(folder).get("model_type") in MODEL_TYPES_OF_TRANSFORMERS
    except CheckpointError:  # of another package
        return False


def _is_exported_repository(name_or_path: Any, kwargs: Mapping[str, Any]) -> bool:
    """Tells whether a repository of the Hub, or what the cache has of it, holds an exported model."""
    if not isinstance(name_or_path, str) or os.path.exists(name_or_path):
        return False
    arguments = _hub_arguments(kwargs)
    try:
        config, _ = PretrainedConfig.get_config_dict(name_or_path, **arguments)
        if config.get("model_type") not in MODEL_TYPES_OF_TRANSFORMERS:
            return False
        return cached_file(name_or_path, MODEL_FILE, **arguments) is not None
    except Exception:  # then what transformers said first is what is wrong
        return False


def replace_remote_code(*auto_classes: Any) -> None:
    """Makes `from_pretrained` of transformers' auto classes load ChatGLM repositories without running their code.

    See `RUNS_REMOTE_CODE`; some versions run it even in place of classes registered by a package. Only repositories
    of ChatGLM are concerned (see `is_chatglm`); every other one is loaded as before. One warning is logged for each
    repository. Calling this again changes nothing.

    Args:
        auto_classes: `AutoConfig`, `AutoTokenizer`, ...; all that transformers has by default.
    """
    for auto_class in auto_classes or _auto_classes():
        original = auto_class.from_pretrained.__func__
        if not getattr(original, "_ignores_chatglm_remote_code", False):
            auto_class.from_pretrained = classmethod(_without_remote_code(original))


def _auto_classes() -> Iterator[Any]:
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
            is_unknown = bool(config) and config.get("model_type") not in CONFIG_MAPPING
            if is_unknown or has_chatglm_keys(config):
                check_model_type(config, name)
                if is_unknown and issubclass(cls, AutoConfig):
                    for argument in ("trust_remote_code", "code_revision"):
                        kwargs.pop(argument, None)
                    return ChatGLMConfig.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            if issubclass(cls, AutoTokenizer) and not _has_local_class(pretrained_model_name_or_path, kwargs):
                for argument in _ARGUMENTS_OF_AUTO_TOKENIZER:
                    kwargs.pop(argument, None)
                return ChatGLMTokenizer.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        elif is_own is None and issubclass(cls, (AutoConfig, AutoTokenizer)) and kwargs.get("trust_remote_code"):
            kwargs["trust_remote_code"] = False  # what a second attempt reads must not be run
        return original(cls, pretrained_model_name_or_path, *args, **kwargs)

    vars(from_pretrained)["_ignores_chatglm_remote_code"] = True
    return from_pretrained


def _look(pretrained_model_name_or_path: Any, kwargs: Mapping[str, Any]) -> tuple[bool | None, Mapping[str, Any]]:
    """Tells whether a folder or Hub repository is ChatGLM's, and reads its config.json, empty if there is none."""
    try:
        config, _ = PretrainedConfig.get_config_dict(pretrained_model_name_or_path, **_hub_arguments(kwargs))
    except Exception:  # perhaps a folder with a tokenizer alone; if not, transformers says what is wrong
        config = {}
    is_own = is_chatglm(config, {})
    if is_own is None:
        is_own = is_chatglm(config, _tokenizer_config(pretrained_model_name_or_path, kwargs))
    return is_own, config


def _has_local_class(pretrained_model_name_or_path: Any, kwargs: Mapping[str, Any]) -> bool:
    """Tells whether tokenizer_config.json names no class, or one that transformers or this package has.

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
