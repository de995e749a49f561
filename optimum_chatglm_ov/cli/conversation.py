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

from transformers import LogitsProcessor, LogitsProcessorList

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
            logits_processor=LogitsProcessorList([clock]),
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


class _TokenClock(LogitsProcessor):
    """Notes when each token was computed; changes nothing."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self._times.append(time.perf_counter())
        return scores

    def summary(self) -> str:
        """Sums up, for example as "24 tokens, first after 0.31 s, then 18.2 tokens/s"."""
        tokens = len(self._times)
        text = f"{tokens} token{'' if tokens == 1 else 's'}"
        if tokens:
            text += f", first after {self._times[0] - self._start:.2f} s"
        if tokens > 1:
            text += f", then {(tokens - 1) / (self._times[-1] - self._times[0]):.1f} tokens/s"
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
