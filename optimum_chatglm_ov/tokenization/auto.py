# SPDX-License-Identifier: Apache-2.0
"""Lets `AutoTokenizer` find the tokenizers of this package."""

from __future__ import annotations

import functools
from typing import Any

import transformers
from packaging.version import Version
from transformers import AutoTokenizer, PretrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from .base import ChatGLMTokenizer
from .glm4 import ChatGLM4Tokenizer


# The class names that ChatGLM repositories have in tokenizer_config.json.
_CLASSES = {"ChatGLMTokenizer": ChatGLMTokenizer, "ChatGLM4Tokenizer": ChatGLM4Tokenizer}
ARGUMENTS_OF_AUTO_TOKENIZER = (
    "config",
    "use_fast",
    "tokenizer_type",
    "backend",
    "trust_remote_code",
    "code_revision",
)


def register(config_class: type[PretrainedConfig]) -> None:
    """Registers the tokenizers with `AutoTokenizer`; calling it again changes nothing.

    Args:
        config_class: the configuration class of model type `chatglm`.
    """
    # AutoTokenizer keeps one class per configuration class and looks classes up by name among them.
    name_carrier = type("ChatGLM4Config", (config_class,), {"__doc__": "Carries the name ChatGLM4Tokenizer."})
    AutoTokenizer.register(name_carrier, slow_tokenizer_class=ChatGLM4Tokenizer, exist_ok=True)
    AutoTokenizer.register(config_class, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)
    if Version("5.0") <= Version(transformers.__version__) < Version("5.3"):
        _prefer_registered_classes()


def _prefer_registered_classes() -> None:
    """transformers 5.0 to 5.2 tries to make a `tokenizers` tokenizer of every repository without `auto_map` whose
    class is not its own, before it looks at registered classes. For ChatGLM that succeeds, with wrong token ids."""
    original = AutoTokenizer.from_pretrained.__func__
    if getattr(original, "_prefers_chatglm_classes", False):
        return

    @functools.wraps(original)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        config = get_tokenizer_config(pretrained_model_name_or_path, **kwargs)
        tokenizer_class = _CLASSES.get(config.get("tokenizer_class"))
        if tokenizer_class is None:
            return original(cls, pretrained_model_name_or_path, *args, **kwargs)
        for name in ARGUMENTS_OF_AUTO_TOKENIZER:
            kwargs.pop(name, None)
        return tokenizer_class.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    from_pretrained._prefers_chatglm_classes = True
    AutoTokenizer.from_pretrained = classmethod(from_pretrained)
