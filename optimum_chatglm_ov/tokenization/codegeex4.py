# SPDX-License-Identifier: Apache-2.0
"""Tokenizer of CodeGeeX4."""

from __future__ import annotations

from .glm4 import ChatGLM4Tokenizer


class CodeGeeX4Tokenizer(ChatGLM4Tokenizer, saved_as="ChatGLM4Tokenizer"):
    """As GLM-4's."""

    chatglm_generation = "codegeex4"
