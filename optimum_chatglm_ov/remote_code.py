# SPDX-License-Identifier: Apache-2.0
"""Keeps the Python files of ChatGLM repositories from being run, whatever `trust_remote_code` says."""

from __future__ import annotations

import functools
import logging
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config


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
_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


def replace_remote_code(*auto_classes: type) -> None:
    """Makes `from_pretrained` of transformers' auto classes ignore `trust_remote_code=True` for ChatGLM repositories.

    Without it, some versions of transformers prefer a repository's files to the classes registered by a package as
    soon as `trust_remote_code=True` is given. Only repositories of model type `chatglm` whose `auto_map` names the
    original ChatGLM classes are concerned; every other one is loaded as before. One warning is logged for each
    repository. Calling this again changes nothing.

    Args:
        auto_classes: `AutoConfig`, `AutoTokenizer`, `AutoModelForCausalLM`, ...
    """
    for auto_class in auto_classes:
        original = auto_class.from_pretrained.__func__
        if not getattr(original, "_ignores_chatglm_remote_code", False):
            auto_class.from_pretrained = classmethod(_without_remote_code(original))


def _without_remote_code(original: Any) -> Any:
    @functools.wraps(original)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("trust_remote_code"):
            is_other, classes = remote_code(pretrained_model_name_or_path, **kwargs)
            kwargs["trust_remote_code"] = is_other
            if classes and not is_other:
                warn_once(str(pretrained_model_name_or_path))
        return original(cls, pretrained_model_name_or_path, *args, **kwargs)

    from_pretrained._ignores_chatglm_remote_code = True
    return from_pretrained


def remote_code(pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[bool, set[str]]:
    """Whether a folder or Hub repository belongs to other models than ChatGLM, and the classes its `auto_map` names.

    One that cannot be read counts as ChatGLM without classes: it needs no trust, and what a second attempt reads must
    not be run. Neither is an unknown class of a ChatGLM repository, which is remote code, whatever it is.

    Args:
        pretrained_model_name_or_path: folder or Hub id.
        kwargs: `revision`, `token`, `cache_dir` and the like; others are ignored.
    """
    hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    try:
        config, _ = PretrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub_arguments)
    except (OSError, ValueError):
        config = {}  # perhaps a folder with a tokenizer alone
    try:
        auto_map = get_tokenizer_config(pretrained_model_name_or_path, **hub_arguments).get("auto_map") or {}
    except (OSError, ValueError):
        auto_map = {}
    # In a config the entries are "file.Class"; in a tokenizer_config there is a pair of them, the second often null.
    entries = list((config.get("auto_map") or {}).values())
    for entry in auto_map.values() if isinstance(auto_map, dict) else [auto_map]:
        entries += entry if isinstance(entry, (list, tuple)) else [entry]
    classes = {entry.rpartition(".")[2] for entry in entries if isinstance(entry, str)}
    if "model_type" in config:
        return config["model_type"] != "chatglm", classes
    return not classes <= _REPLACED_CLASSES, classes


@functools.cache
def warn_once(name: str) -> None:
    """Logs that `trust_remote_code` has no effect for the repository `name`."""
    logger.warning(
        f"`trust_remote_code=True` has no effect for {name}: optimum_chatglm_ov has its own classes for ChatGLM, and "
        "no code of the repository is run."
    )
