# SPDX-License-Identifier: Apache-2.0
"""Answers that appear in the terminal while they are generated."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..tokenization.chat_rules import settled
from .session import Session


class Conversation:
    """A model, its tokenizer, and what has been said.

    Args:
        model, tokenizer: as `stream_chat` takes them.
        settings: its keyword arguments, for sampling and length.
        session: where it was begun and goes on later.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: dict[str, Any], session: Session | None = None):
        self._model = model
        self._tokenizer = tokenizer
        self._settings = settings
        self._session = session
        self.history: list[Any] = [] if session is None else session.load()

    def clear(self) -> None:
        """Forgets what has been said."""
        self.history = []
        self._save()

    def _save(self) -> None:
        if self._session is not None:
            self._session.save(self.history)

    def answer(self, query: str) -> bool:
        """Writes the answer to `query` to stdout, then its speed to stderr.

        Returns:
            Whether it was stopped by Ctrl-C; what was said until then stays in the history.
        """
        clock = _TokenClock()
        shown = ""
        stream = self._model.stream_chat(
            self._tokenizer,
            query,
            history=list(self.history),
            logits_processor=LogitsProcessorList([clock.begin]),
            stopping_criteria=StoppingCriteriaList([clock]),
            **self._settings,
        )
        with _stop_on_interrupt() as interrupts, closing(stream):
            response: Any = ""
            for response, self.history in stream:
                if interrupts:
                    break
                if isinstance(response, str):
                    shown = _show(settled(response), shown)
        _show(response if isinstance(response, str) else json.dumps(response, ensure_ascii=False), shown)
        print(flush=True)
        print(f"[{clock.summary()}{', stopped' if interrupts else ''}]", file=sys.stderr, flush=True)
        self._save()
        return bool(interrupts)


def _show(text: str, shown: str) -> str:
    """Writes what `text` has beyond `shown`, and returns what is on the screen now."""
    if shown.startswith(text):
        return shown
    if not text.startswith(shown):  # a new message took the place of the one on the screen
        sys.stdout.write("\n")
        shown = ""
    sys.stdout.write(text[len(shown) :])
    sys.stdout.flush()
    return text


class _PromptLength(LogitsProcessor):
    """Notes how many tokens the prompt has, and that some were computed; changes nothing."""

    tokens: int | None = None
    has_computed = False

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.tokens = input_ids.shape[1] if self.tokens is None else min(self.tokens, input_ids.shape[1])
        self.has_computed = True
        return scores


class _TokenClock(StoppingCriteria):
    """Notes when tokens became part of the answer, of which drafts bring several at once; stops nothing."""

    def __init__(self) -> None:
        self.begin = _PromptLength()
        self._start = time.perf_counter()
        self._steps: list[tuple[int, float]] = []  # tokens of the answer, and when there were so many

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if self.begin.has_computed:  # else these are drafts that are still to be checked
            self._steps.append((input_ids.shape[1] - self.begin.tokens, time.perf_counter()))
            self.begin.has_computed = False
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def summary(self) -> str:
        """Sums up, for example as "24 tokens, first after 0.31 s, then 18.2 tokens/s"."""
        if not self._steps:
            return "0 tokens"
        (first, began), (tokens, ended) = self._steps[0], self._steps[-1]
        text = f"{tokens} token{'' if tokens == 1 else 's'}, first after {began - self._start:.2f} s"
        if tokens > first:
            text += f", then {(tokens - first) / (ended - began):.1f} tokens/s"
        return text


@contextmanager
def _stop_on_interrupt() -> Iterator[list[int]]:
    """Yields a list that the first Ctrl-C makes true; the second raises KeyboardInterrupt.

    An exception in the middle of a step would leave the generation's thread behind.
    """
    interrupts: list[int] = []

    def note(number: int, frame: Any) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(number)

    earlier = signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, earlier)
