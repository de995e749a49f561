# SPDX-License-Identifier: Apache-2.0
"""Token ids of an answer while it is computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


_END = object()


class TokenStream(BaseStreamer, StoppingCriteria):
    """Runs `generate(**kwargs)` in a thread and iterates over the ids it generates, for one sequence.

    Use it in a `with` statement: leaving it stops the generation after the step that is under way and waits for the
    thread. What the generation raises, the iteration raises.
    """

    def __init__(self, generate: Callable[..., Any], **kwargs: Any):
        self._arrived: queue.SimpleQueue = queue.SimpleQueue()
        self._closed = threading.Event()
        self._prompt_is_next = True
        criteria = StoppingCriteriaList([*(kwargs.pop("stopping_criteria", None) or ()), self])
        arguments = {**kwargs, "streamer": self, "stopping_criteria": criteria}
        self._thread = threading.Thread(target=self._run, args=(generate, arguments), daemon=True)

    def _run(self, generate: Callable[..., Any], arguments: dict[str, Any]) -> None:
        try:
            generate(**arguments)
            self._arrived.put(_END)
        except BaseException as error:  # it belongs to the thread that iterates
            self._arrived.put(error)

    def __enter__(self) -> TokenStream:
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._closed.set()
        self._thread.join()

    def __iter__(self) -> Iterator[int]:
        while (item := self._arrived.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item

    # What `generate` calls -----------------------------------------------------------------------------------------

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt [1, L], then each new id [1]."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        for token in value.flatten().tolist():
            self._arrived.put(token)

    def end(self) -> None:
        """Does nothing: the thread ends after `generate` has returned."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        """Tells whether to stop, bool [batch]."""
        return torch.full((input_ids.shape[0],), self._closed.is_set(), dtype=torch.bool, device=input_ids.device)
