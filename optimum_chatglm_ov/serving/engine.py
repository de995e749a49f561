# SPDX-License-Identifier: Apache-2.0
"""What an engine is: prompts as token ids go in, tokens come out, for several requests at once."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..architectures.registry import architecture_of
from ..errors import ChatGLMError


logger = logging.getLogger(__name__)


class EngineError(ChatGLMError, RuntimeError):
    """The engine cannot go on with a request; the next one may succeed."""


class UnsupportedError(ChatGLMError, ValueError):
    """The engine has no such setting.

    Args:
        parameter: the field of the request.
    """

    def __init__(self, message: str, parameter: str):
        super().__init__(message)
        self.parameter = parameter


@dataclass(frozen=True)
class GenerationRequest:
    """One answer to compute.

    Args:
        input_ids: the prompt.
        max_new_tokens: at least 1.
        stop_ids: ids that end the answer; they are given, too.
        do_sample, temperature, top_p, top_k, repetition_penalty, frequency_penalty, presence_penalty: as transformers
            and OpenAI mean them; `top_k` 0 is all.
        seed: of sampling.
        logprobs: give the logarithm of the probability of each token.
        json_schema: the answer is JSON by this schema, in JSON.
        client: who asks; clients take turns.
    """

    input_ids: list[int]
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    logprobs: bool = False
    json_schema: str | None = None
    client: str = ""


@dataclass(frozen=True)
class GeneratedToken:
    """The next token of an answer; the last has a `finish_reason`, "stop" (it is one of `stop_ids`) or "length"."""

    token_id: int
    logprob: float | None = None
    finish_reason: str | None = None


@dataclass
class EngineState:
    """What the engine is doing, for /health and /metrics.

    Args:
        running: requests that are computed now.
        waiting: requests that wait for their turn.
        cache_use: share of the key/value cache that is in use, 0 to 1; `None` where the engine has no shared cache.
    """

    running: int = 0
    waiting: int = 0
    cache_use: float | None = None


class Engine(Protocol):
    """Owner of a compiled model; all methods are called in one event loop.

    Attributes:
        name: for /health.
        prompt_and_answer: tokens that a prompt and its answer may have together.
    """

    name: str
    prompt_and_answer: int

    async def start(self) -> None:
        """Loads the model."""

    def check(self, request: GenerationRequest) -> None:
        """Raises `UnsupportedError` if the engine has no such setting."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[GeneratedToken]:
        """Computes an answer; closing the iterator stops it within a step.

        Raises:
            QueueFullError, QueueTimeoutError: see [`Admission`].
            EngineError: the engine has failed.
        """

    def state(self) -> EngineState:
        """Tells what it is doing."""

    def problem(self) -> str | None:
        """Tells why it cannot compute now; `None` if it can."""

    async def close(self) -> None:
        """Gives the model back."""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine computes.

    Args:
        kind: "batched" (openvino-genai), "queue" (this package's class), or "auto": the former, unless it is not
            installed, or does not take the model.
        device: OpenVINO device.
        ov_config: OpenVINO properties.
        attention, linear: see `OVChatGLMForCausalLM.from_pretrained`; of the queue.
        max_running: requests that are computed at once by a batched engine.
        max_waiting: requests that wait.
        queue_seconds: how long one waits.
        prefix_cache, prefix_cache_size: see `OVChatGLMForCausalLM.from_pretrained`; of the queue, which keeps prompts
            in memory unless a folder is named.
        prompt_lookup: draft tokens from the prompt while that is faster; of the queue.
        cache_tokens: tokens that the key/value cache of a batched engine holds; `None`: as many as `max_running`
            conversations of full length need, if a quarter of the free memory holds them.
    """

    kind: str = "auto"
    device: str = "CPU"
    ov_config: dict[str, str] = field(default_factory=dict)
    attention: str | None = None
    linear: str | None = None
    max_running: int = 32
    max_waiting: int = 256
    queue_seconds: float = 60.0
    cache_tokens: int | None = None
    prefix_cache: str | None = None
    prefix_cache_size: int | None = None
    prompt_lookup: bool = False


def make_engine(folder: Path, tokenizer: Any, config: Any, options: EngineOptions) -> Engine:
    """Makes the engine that `options` choose for the model in `folder`, not started yet.

    Raises:
        ValueError: "batched" was asked for and cannot be had.
    """
    reason = _why_not_batched(config, options)
    if options.kind == "batched" and reason:
        raise ValueError(f"{folder}: no batched engine: {reason}. Leave it to auto, or choose queue.")
    if options.kind == "queue" or reason:
        from .engine_queue import QueueEngine

        if reason and options.kind == "auto":
            logger.warning("Requests are computed one at a time: %s.", reason)
        return QueueEngine(folder, tokenizer, config, options)
    from .engine_batched import BatchedEngine

    return BatchedEngine(folder, tokenizer, config, options)


def _why_not_batched(config: Any, options: EngineOptions) -> str | None:
    if options.prefix_cache is not None or options.prompt_lookup:
        option = "prompt lookup" if options.prefix_cache is None else "a prefix cache in a folder"
        return f"{option} is this package's own"
    if importlib.util.find_spec("openvino_genai") is None:
        return 'openvino-genai is not installed (pip install "optimum-chatglm-ov[serve]")'
    return architecture_of(config).paged_attention_error()
