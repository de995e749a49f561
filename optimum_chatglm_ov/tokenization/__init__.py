# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of every ChatGLM generation, without remote code."""

from transformers import AutoTokenizer, PretrainedConfig

from .base import ChatGLMTokenizer
from .chatglm import ChatGLM1Tokenizer
from .chatglm2 import ChatGLM2Tokenizer
from .chatglm3 import ChatGLM3Tokenizer
from .glm4 import ChatGLM4Tokenizer
from .streamers import ChatGLMTextIteratorStreamer, ChatGLMTextStreamer
from .vocabulary import TokenizerError


__all__ = [
    "ChatGLM1Tokenizer",
    "ChatGLM2Tokenizer",
    "ChatGLM3Tokenizer",
    "ChatGLM4Tokenizer",
    "ChatGLMTextIteratorStreamer",
    "ChatGLMTextStreamer",
    "ChatGLMTokenizer",
    "TokenizerError",
    "register",
]


def register(config_class: type[PretrainedConfig]) -> None:
    """Lets `AutoTokenizer` find the two class names that ChatGLM repositories have in tokenizer_config.json.

    Args:
        config_class: the configuration class of model type `chatglm`.
    """
    # AutoTokenizer keeps one class per configuration class and looks classes up by name among them.
    name_carrier = type("ChatGLM4Config", (config_class,), {"__doc__": "Carries the name ChatGLM4Tokenizer."})
    AutoTokenizer.register(name_carrier, slow_tokenizer_class=ChatGLM4Tokenizer, exist_ok=True)
    AutoTokenizer.register(config_class, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)
