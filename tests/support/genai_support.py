# SPDX-License-Identifier: Apache-2.0
"""Settings of openvino-genai's pipelines, and prompts, for tests."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import openvino_genai


PROMPT = "hello 你好 soprano"
_GOLDEN = Path(__file__).parents[1] / "data" / "model_io"


@functools.cache
def golden_prompt(name: str) -> tuple[str, bool]:
    """The text whose answer the original implementation recorded, `PROMPT` without one, and whether it was a turn of a
    conversation."""
    file = _GOLDEN / f"{name}.json"
    if not file.is_file():
        return PROMPT, False
    return json.loads(file.read_text(encoding="utf-8"))["texts"]["single"], name.startswith(("chatglm3", "glm-4"))


def genai_settings(max_new_tokens: int = 20, **settings: Any) -> openvino_genai.GenerationConfig:
    """Greedy, of a prompt as it is."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.apply_chat_template = max_new_tokens, False, False
    for name, value in settings.items():
        setattr(config, name, value)
    return config


def scheduler() -> openvino_genai.SchedulerConfig:
    """With a cache of prefixes."""
    config = openvino_genai.SchedulerConfig()
    config.cache_size, config.enable_prefix_caching = 1, True
    return config


def same_characters(text: str) -> str:
    """Without what stands for broken UTF-8, of which libraries write different numbers."""
    return re.sub("\ufffd+", "\ufffd", text)


def without_broken_bytes(ids: list[int], tokenizer: Any) -> list[int]:
    """`ids` without runs of byte pieces (`<0x41>`) that are no UTF-8: tokenizer.json has no text for such a run."""
    kept: list[int] = []
    run: list[int] = []

    def end_run() -> None:
        try:
            bytes(int(token[3:5], 16) for token in tokenizer.convert_ids_to_tokens(run)).decode()
        except UnicodeDecodeError:
            run.clear()
        kept.extend(run)
        run.clear()

    for token_id in ids:
        token = tokenizer.convert_ids_to_tokens(token_id)
        if isinstance(token, str) and re.fullmatch("<0x[0-9A-F]{2}>", token):
            run.append(token_id)
        else:
            end_run()
            kept.append(token_id)
    end_run()
    return kept
