# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of every ChatGLM generation, without remote code."""

from .base import ChatGLMTokenizer
from .chatglm import ChatGLM1Tokenizer
from .chatglm2 import ChatGLM2Tokenizer
from .chatglm3 import ChatGLM3Tokenizer
from .codegeex4 import CodeGeeX4Tokenizer
from .glm4 import ChatGLM4Tokenizer
from .loading import has_vocabulary, load_tokenizer
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
    "CodeGeeX4Tokenizer",
    "TokenizerError",
    "has_vocabulary",
    "load_tokenizer",
]
