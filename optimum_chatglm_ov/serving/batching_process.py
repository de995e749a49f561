# SPDX-License-Identifier: Apache-2.0
"""The process whose one thread owns openvino-genai's pipeline; `engine_batched` starts it and talks to it.

It is a process of its own because a step of the pipeline holds Python's lock from its beginning to its end: in the
server's process nothing could be received or sent meanwhile, and what crashes OpenVINO would end the server. It is
started by its path, and imports nothing of this package: it needs neither torch nor transformers.

Messages to it are `("add", number, input_ids, settings)`, `("cancel", number)`; from it come `("ready", facts)` or
`("failed", text)`, then `("step", tokens, cache_use)`, where `tokens` has (number, [(id, logprob)], finish_reason,
error) for each request of which something is new. A JSON schema that has no grammar ends as `REFUSED`.
"""

from __future__ import annotations

import itertools
import re
import signal
import sys
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules are not for others to find

import numpy as np  # noqa: E402
import openvino as ov  # noqa: E402
import openvino_genai  # noqa: E402


REFUSED = "refused"
_PLACE = re.compile(r"\[[\d:]+\] \S+:\d+: ")  # in the sources of the grammars' library
_FINISH_REASONS = {
    openvino_genai.GenerationFinishReason.STOP: "stop",
    openvino_genai.GenerationFinishReason.LENGTH: "length",
}
_ENDED = (
    openvino_genai.GenerationStatus.FINISHED,
    openvino_genai.GenerationStatus.IGNORED,
    openvino_genai.GenerationStatus.CANCEL,
    openvino_genai.GenerationStatus.STOP,
)


def make_pipeline(options: dict[str, Any]) -> openvino_genai.ContinuousBatchingPipeline:
    """Makes the pipeline of a model, with a cache that keeps the beginnings of earlier prompts."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks = options["blocks"]
    scheduler.max_num_seqs = options["max_running"]
    scheduler.enable_prefix_caching = True
    scheduler.dynamic_split_fuse = True
    properties = dict(options["ov_config"])
    if options["extension"]:
        properties["extensions"] = [options["extension"]]
    tokenizer = openvino_genai.Tokenizer(options["vocabulary"])
    return openvino_genai.ContinuousBatchingPipeline(
        options["folder"], tokenizer, scheduler, options["device"], **properties
    )


@dataclass
class Request:
    """What was asked for, and how far it has got.

    Args:
        handle: the pipeline's; `None` before it is added.
        computed: tokens since it was begun, or begun again.
        sent: tokens that were sent; a request that was begun again computes them once more.
    """

    input_ids: list[int]
    settings: dict[str, Any]
    handle: Any = None
    computed: int = 0
    sent: int = 0


class Batches:
    """Steps of a pipeline, with requests that come and go between them.

    A JSON schema without a grammar makes a step fail, with all requests in it, and not before. So schemas are tried
    one by one: when a step fails, the request on trial is refused, and the others are begun again. Their tokens follow
    from prompt and seed, so that nobody notices but by the time.
    """

    def __init__(self, pipeline: openvino_genai.ContinuousBatchingPipeline, connection: Connection):
        self._pipeline = pipeline
        self._connection = connection
        self._requests: dict[int, Request] = {}
        self._untried: deque[int] = deque()  # with schemas
        self._on_trial: int | None = None
        self._ids = itertools.count()  # the pipeline's own: a request that is begun again is another one

    def run(self) -> None:
        """Computes until the other end of the connection is closed."""
        while True:
            while self._connection.poll(0 if self._is_busy() else None):
                self._receive(*self._connection.recv())
            if self._on_trial is None and self._untried:
                self._on_trial = self._untried.popleft()
                self._begin(self._on_trial)
            try:
                self._pipeline.step()
            except RuntimeError as error:
                self._recover(str(error))
                continue
            new = [news for number in list(self._requests) if (news := self._news(number)) is not None]
            if new:
                self._connection.send(("step", new, self._pipeline.get_metrics().cache_usage / 100))

    def _is_busy(self) -> bool:
        return bool(self._untried) or self._pipeline.has_non_finished_requests()

    def _receive(self, kind: str, number: int, *request: Any) -> None:
        if kind == "cancel":
            self._end(number)
            return
        self._requests[number] = Request(*request)
        if "json_schema" in self._requests[number].settings:
            self._untried.append(number)
        else:
            self._begin(number)

    def _begin(self, number: int) -> None:
        request = self._requests[number]
        try:
            prompt = ov.Tensor(np.array([request.input_ids], dtype=np.int64))
            config = _generation_config(request.settings)
            request.handle = self._pipeline.add_request(next(self._ids), prompt, config)
            request.computed = 0
        except (RuntimeError, TypeError, ValueError) as error:
            self._fail([number], str(error))

    def _end(self, number: int) -> None:
        request = self._requests.pop(number, None)
        if request is not None and request.handle is not None:
            request.handle.cancel()
        if number == self._on_trial:
            self._on_trial = None
        elif number in self._untried:
            self._untried.remove(number)

    def _fail(self, numbers: list[int], error: str, reason: str | None = None) -> None:
        for number in numbers:
            self._end(number)
        self._connection.send(("step", [(number, [], reason, error) for number in numbers], 0.0))

    def _recover(self, error: str) -> None:
        """Goes on after a step that has failed."""
        if not self._requests:
            raise RuntimeError(error)
        guilty, others = self._on_trial, [number for number, request in self._requests.items() if request.handle]
        for number in others:
            self._requests[number].handle.cancel()
        for _ in range(3):  # what was cancelled may fail once more before it is gone
            try:
                if self._pipeline.has_non_finished_requests():
                    self._pipeline.step()
            except RuntimeError:
                continue
        if guilty is None:
            self._fail(others, error)
            return
        self._fail([guilty], _PLACE.sub("", error).strip(), REFUSED)
        for number in others:
            if number != guilty:
                self._begin(number)

    def _news(self, number: int) -> tuple[int, list[tuple[int, float]], str | None, str | None] | None:
        request = self._requests[number]
        if request.handle is None:
            return None
        tokens, reason, error = [], None, None
        status = request.handle.get_status()  # before reading: what is read is then all of an ended request
        while request.handle.can_read():
            for output in request.handle.read().values():
                tokens += zip(output.generated_ids, output.generated_log_probs)
                reason = _FINISH_REASONS.get(output.finish_reason, reason)
        if reason is None and status in _ENDED:
            error = "the key/value cache is too small for prompt and answer"
        if tokens and number == self._on_trial:
            self._on_trial = None
        known = max(0, request.sent - request.computed)
        request.computed += len(tokens)
        request.sent = max(request.sent, request.computed)
        tokens = tokens[known:]
        if reason is not None or error is not None:
            self._end(number)
        elif not tokens:
            return None
        return number, tokens, reason, error


def _generation_config(settings: dict[str, Any]) -> openvino_genai.GenerationConfig:
    config = openvino_genai.GenerationConfig()
    for name, value in settings.items():
        if name == "json_schema":
            config.structured_output_config = openvino_genai.StructuredOutputConfig(json_schema=value)
        else:
            setattr(config, name, value)
    config.validate()
    return config


def main() -> None:
    """Serves the connection whose file descriptor is the argument."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the server ends this process when it has drained
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    try:
        try:
            options = connection.recv()
            pipeline = make_pipeline(options)
        except (RuntimeError, ValueError) as error:
            connection.send(("failed", str(error)))
            return
        connection.send(("ready", {}))
        Batches(pipeline, connection).run()
    except (EOFError, ConnectionError):  # the server is gone
        pass


if __name__ == "__main__":
    main()
