# SPDX-License-Identifier: Apache-2.0
"""What a server serves: a model's tokenizer, rules and engine, and the limits of requests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..ir import load_config
from ..tokenization import load_tokenizer
from ..tokenization.chat_rules import ChatRules, chat_rules
from ..tokenization.template_chat import TemplateTokenizer, has_template
from .engine import Engine, EngineOptions, make_engine
from .vocabulary import TokenBytes


@dataclass(frozen=True)
class ServerOptions:
    """How a server answers.

    Args:
        name: of the model, as clients name it; `None`: that of its folder.
        greedy: answers are not sampled unless a request names a temperature.
        api_key: what clients must send; `None`: nothing.
        max_body: bytes of a request.
        request_seconds: how long an answer may take, its wait included.
        log_prompts: write prompts and answers to the log.
        web: answer at `/` with a page to talk to.
    """

    name: str | None = None
    greedy: bool = False
    api_key: str | None = None
    max_body: int = 4 << 20
    request_seconds: float = 600.0
    log_prompts: bool = False
    web: bool = False


@dataclass(frozen=True)
class ServedModel:
    """A model whose engine answers requests."""

    name: str
    tokenizer: Any
    config: Any
    rules: ChatRules
    engine: Engine
    options: ServerOptions
    bytes_of: TokenBytes

    @property
    def generation(self) -> str:
        """Of its prompts and calls."""
        return self.tokenizer.chatglm_generation


def load_served_model(folder: Path, options: ServerOptions, engine_options: EngineOptions) -> ServedModel:
    """Loads the model of an exported folder; its engine is not started yet.

    Raises:
        ValueError, OSError: the folder cannot be read, or has not the engine that was asked for.
    """
    folder = Path(folder)
    tokenizer, config = load_tokenizer(folder), load_config(folder)
    if has_template(config):
        tokenizer = TemplateTokenizer(tokenizer, GenerationConfig.from_pretrained(folder))
    return ServedModel(
        name=options.name or folder.name,
        tokenizer=tokenizer,
        config=config,
        rules=chat_rules(tokenizer, config),
        engine=make_engine(folder, tokenizer, config, engine_options),
        options=options,
        bytes_of=TokenBytes(tokenizer),
    )
