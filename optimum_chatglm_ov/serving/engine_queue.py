# SPDX-License-Identifier: Apache-2.0
"""One request at a time, by this package's own class: for ChatGLM-6B, P-Tuning, and without openvino-genai."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ..chat import InvalidScoreLogitsProcessor
from ..choices import PROMPT_LOOKUP_TOKENS
from ..modeling import OVChatGLMForCausalLM
from ..runtime.token_stream import TokenStream
from ..tokenization.chat_rules import RULES
from .admission import Admission
from .engine import EngineError, EngineOptions, EngineState, GeneratedToken, GenerationRequest, UnsupportedError


_END = object()


class QueueEngine:
    """Owner of a model whose requests take turns."""

    name = "optimum-chatglm-ov, one request at a time"

    def __init__(self, folder: Path, tokenizer: Any, config: Any, options: EngineOptions):
        self._folder, self._options = folder, options
        self._invalid_score_token_id = RULES[tokenizer.chatglm_generation].invalid_score_token_id
        self.prompt_and_answer = config.max_position_embeddings
        self._admission = Admission(1, options.max_waiting, options.queue_seconds)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")  # which owns the model
        self._model: OVChatGLMForCausalLM | None = None
        self._problem: str | None = "the model is being loaded"

    async def start(self) -> None:
        """Loads the model."""
        self._loop = asyncio.get_running_loop()
        await self._loop.run_in_executor(self._thread, self._load)
        self._problem = None

    def _load(self) -> None:
        options = self._options
        self._model = OVChatGLMForCausalLM.from_pretrained(
            self._folder,
            device=options.device,
            ov_config=options.ov_config,
            attention=options.attention,
            linear=options.linear,
            prefix_cache=True if options.prefix_cache is None else options.prefix_cache,
            prefix_cache_size=options.prefix_cache_size,
        )

    def check(self, request: GenerationRequest) -> None:
        """Raises `UnsupportedError` for what only a batched engine does."""
        for field, neutral, name in (
            ("json_schema", None, "response_format"),
            ("frequency_penalty", 0, "frequency_penalty"),
            ("presence_penalty", 0, "presence_penalty"),
        ):
            if getattr(request, field) != neutral:
                raise UnsupportedError(
                    f"`{name}` needs openvino-genai's continuous batching; this model runs without.", name
                )

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GeneratedToken]:
        """See [`Engine.generate`]."""
        async with self._admission.turn(request.client):
            if self._problem:
                raise EngineError(f"The engine cannot compute: {self._problem}.")
            arrived: asyncio.Queue[Any] = asyncio.Queue()
            is_closed = threading.Event()
            work = self._loop.run_in_executor(self._thread, self._compute, request, arrived, is_closed)
            try:
                while (item := await arrived.get()) is not _END:
                    if isinstance(item, BaseException):
                        raise EngineError(f"The answer could not be computed: {item}") from item
                    yield item
            finally:
                is_closed.set()
                # the next request waits until this one has left the model, also when the task is cancelled again
                while not work.done():
                    try:
                        await asyncio.shield(work)
                    except asyncio.CancelledError:
                        continue

    def _compute(self, request: GenerationRequest, arrived: asyncio.Queue[Any], is_closed: threading.Event) -> None:
        def give(item: Any) -> None:
            self._loop.call_soon_threadsafe(arrived.put_nowait, item)

        try:
            probabilities = _Probabilities() if request.logprobs else None
            settings = self._settings(request, probabilities)
            count = 0
            with TokenStream(self._model.generate, **settings) as tokens:
                for count, token_id in enumerate(tokens, 1):
                    is_stop = token_id in request.stop_ids
                    reason = "stop" if is_stop else "length" if count == request.max_new_tokens else None
                    give(GeneratedToken(token_id, probabilities.of(token_id) if probabilities else None, reason))
                    if is_closed.is_set() or reason is not None:
                        break
            give(_END)
        except BaseException as error:
            give(error)

    def _settings(self, request: GenerationRequest, probabilities: _Probabilities | None) -> dict[str, Any]:
        prompt = torch.tensor([request.input_ids])
        processors: list[LogitsProcessor] = [InvalidScoreLogitsProcessor(self._invalid_score_token_id)]
        if probabilities is not None:
            processors.append(probabilities)
        torch.manual_seed(request.seed)
        drafts = {"prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS} if self._options.prompt_lookup else {}
        sampling = {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k}
        return {
            "input_ids": prompt,
            "attention_mask": torch.ones_like(prompt),
            "max_new_tokens": request.max_new_tokens,
            "eos_token_id": list(request.stop_ids),
            "pad_token_id": request.stop_ids[0],
            "do_sample": request.do_sample,
            **(sampling if request.do_sample else {"temperature": 1.0, "top_p": 1.0}),
            "repetition_penalty": request.repetition_penalty,
            "logits_processor": LogitsProcessorList(processors),
            **drafts,
        }

    def state(self) -> EngineState:
        """What it is doing."""
        return EngineState(self._admission.running, self._admission.waiting)

    def problem(self) -> str | None:
        """Why it cannot compute now; `None` if it can."""
        return self._problem

    async def close(self) -> None:
        """Gives the model back."""
        self._problem = "the server is closing"
        await asyncio.to_thread(self._thread.shutdown)
        self._model = None


class _Probabilities(LogitsProcessor):
    """Remembers the scores of each step; changes nothing."""

    def __init__(self) -> None:
        self._scores: dict[int, torch.Tensor] = {}  # by the tokens before them: drafts that were wrong come again
        self._next = 0  # tokens before the next one of the answer; 0 until the prompt is known

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        length = input_ids.shape[1]
        self._next = self._next or length
        self._scores[length] = scores[0].log_softmax(-1)
        return scores

    def of(self, token_id: int) -> float:
        """Logarithm of the probability of the next token of the answer."""
        self._next += 1
        return self._scores.pop(self._next - 1)[token_id].item()
