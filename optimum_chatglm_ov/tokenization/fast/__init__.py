# SPDX-License-Identifier: Apache-2.0
"""tokenizer.json: the tokenizer of every generation in the form that programs without this package read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..base import ChatGLMTokenizer
from ..chat_templates import is_own_template
from ..special_tokens import MARK, NAMES_OF_FAST_INPUTS
from . import chatglm, chatglm2, glm4
from .templates import TEMPLATES


__all__ = ["MARK", "NAMED_TOKENS", "TOKENIZER_FILES", "build_backend", "chat_template_of", "save_fast"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_BUILDERS = {
    "chatglm": chatglm.build,
    "chatglm2": chatglm2.build,
    "chatglm3": chatglm2.build,
    "glm4": glm4.build,
    "codegeex4": glm4.build,
}
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")


def build_backend(tokenizer: ChatGLMTokenizer) -> Tokenizer:
    """Builds the tokenizer in the library `tokenizers`: the same ids, and the same text of ids.

    What it cannot express, and so does otherwise, is listed in README.md, "Limits".

    Raises:
        TokenizerError: the tokenizer was made with an option that it has no form for.
    """
    return _BUILDERS[tokenizer.chatglm_generation](tokenizer)


def save_fast(tokenizer: ChatGLMTokenizer, folder: str | Path) -> None:
    """Saves `tokenizer` so that programs without this package load it, too, as a `PreTrainedTokenizerFast`.

    With this package `AutoTokenizer` gives the exact class of the generation, which reads its vocabulary file, and has
    `build_chat_input` and the original's masks and positions.

    Raises:
        TokenizerError: see [`build_backend`]; nothing was written then.
    """
    folder = Path(folder)
    backend = build_backend(tokenizer)
    tokenizer.save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"), pretty=False)
    names = {
        name: backend.id_to_token(getattr(tokenizer, f"{name}_id"))
        for name in NAMED_TOKENS
        if getattr(tokenizer, name, None) is not None and getattr(tokenizer, f"{name}_id") is not None
    }
    changes: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "has_tokenizer_json": True,
        "model_input_names": NAMES_OF_FAST_INPUTS,
        "padding_side": tokenizer.padding_side,
        "backend": None,
        **names,
    }
    if tokenizer.chatglm_generation == "chatglm" and tokenizer.clean_up_tokenization_spaces:
        changes["clean_up_tokenization_spaces"] = None  # tokenizer.json does it, and ChatGLM's class by default
    template = chat_template_of(tokenizer) if is_own_template(tokenizer.chat_template) else None
    _update(folder / "tokenizer_config.json", changes, template)
    if (folder / "special_tokens_map.json").is_file():
        _update(folder / "special_tokens_map.json", names)
    if template is not None and (folder / "chat_template.jinja").is_file():
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def chat_template_of(tokenizer: ChatGLMTokenizer) -> str:
    """Finds the template for tokenizer.json: the checkpoint's, or this package's."""
    if is_own_template(tokenizer.chat_template):
        return TEMPLATES[tokenizer.chatglm_generation]
    return tokenizer.chat_template


def _update(file: Path, changes: dict[str, Any], template: str | None = None) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    content = {name: value for name, value in (content | changes).items() if value is not None}
    if template is not None and "chat_template" in content:
        content["chat_template"] = template
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
