# SPDX-License-Identifier: Apache-2.0
"""The process whose one thread owns openvino-genai's pipeline; `engine_batched` starts it and talks to it.

It is a process of its own because a step of the pipeline holds Python's lock from its beginning to its end: in the
server's process nothing could be received or sent meanwhile, and what crashes OpenVINO would end the server. It is
started by its path, and imports nothing of this package: it needs neither torch nor transformers.

Messages to it are `("add", number, input_ids, settings)`, `("cancel", number)`; from it come `("ready", facts)` or
`("failed", text)`, then `("step", tokens, cache_use)`, where `tokens` has (number, [(id, logprob)], finish_reason,
error) for each request of which something is new.
"""

from __future__ import annotations

import signal
import sys
from multiprocessing.connection import Connection
from typing import Any


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules are not for others to find

import numpy as np  # noqa: E402
import openvino as ov  # noqa: E402
import openvino_genai  # noqa: E402


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
    """The pipeline of a model, with a cache that keeps the beginnings of earlier prompts."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks = options["blocks"]
    scheduler.max_num_seqs = options["max_running"]
    scheduler.enable_prefix_caching = True
    scheduler.dynamic_split_fuse = True
    properties = dict(options["ov_config"])
    if options["extension"]:
        properties["extensions"] = [options["extension"]]
    arguments = [options["folder"]]
    if options["vocabulary"]:
        arguments.append(openvino_genai.Tokenizer(options["vocabulary"]))
    return openvino_genai.ContinuousBatchingPipeline(*arguments, scheduler, options["device"], **properties)


class Batches:
    """Steps of a pipeline, with requests that come and go between them."""

    def __init__(self, pipeline: openvino_genai.ContinuousBatchingPipeline, connection: Connection):
        self._pipeline = pipeline
        self._connection = connection
        self._handles: dict[int, Any] = {}

    def run(self) -> None:
        """Computes until the other end of the connection is closed."""
        while True:
            while self._connection.poll(0 if self._pipeline.has_non_finished_requests() else None):
                self._receive(*self._connection.recv())
            try:
                self._pipeline.step()
            except RuntimeError as error:  # which of the requests it was is not known
                if not self._handles:
                    raise
                failed = [(number, [], None, str(error)) for number in self._handles]
                for handle in self._handles.values():
                    handle.cancel()
                self._handles.clear()
                self._connection.send(("step", failed, 0.0))
                continue
            new = [news for number in list(self._handles) if (news := self._news(number)) is not None]
            if new:
                self._connection.send(("step", new, self._pipeline.get_metrics().cache_usage / 100))

    def _receive(self, kind: str, number: int, *request: Any) -> None:
        if kind == "cancel":
            handle = self._handles.pop(number, None)
            if handle is not None:
                handle.cancel()
            return
        input_ids, settings = request
        try:
            prompt = ov.Tensor(np.array([input_ids], dtype=np.int64))
            self._handles[number] = self._pipeline.add_request(number, prompt, _generation_config(settings))
        except (RuntimeError, TypeError, ValueError) as error:
            self._connection.send(("step", [(number, [], None, str(error))], 0.0))

    def _news(self, number: int) -> tuple[int, list[tuple[int, float]], str | None, str | None] | None:
        handle = self._handles[number]
        tokens, reason, error = [], None, None
        status = handle.get_status()  # before reading: what is read is then all of an ended request
        while handle.can_read():
            for output in handle.read().values():
                tokens += zip(output.generated_ids, output.generated_log_probs)
                reason = _FINISH_REASONS.get(output.finish_reason, reason)
        if reason is None and status in _ENDED:
            error = "the key/value cache is too small for prompt and answer"
        if reason is not None or error is not None:
            del self._handles[number]
        elif not tokens:
            return None
        return number, tokens, reason, error


def _generation_config(settings: dict[str, Any]) -> openvino_genai.GenerationConfig:
    config = openvino_genai.GenerationConfig()
    schema = settings.pop("json_schema", None)
    for name, value in settings.items():
        setattr(config, name, value)
    if schema is not None:
        config.structured_output_config = openvino_genai.StructuredOutputConfig(json_schema=schema)
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
