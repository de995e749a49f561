# SPDX-License-Identifier: Apache-2.0
"""What Prometheus reads at /metrics."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from .engine import Engine


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts of one server."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        common = {"registry": self.registry}
        for name, text, value in (
            ("chatglm_requests_running", "Answers that are computed now", lambda: engine.state().running),
            ("chatglm_requests_waiting", "Answers that wait for their turn", lambda: engine.state().waiting),
            (
                "chatglm_cache_use_ratio",
                "Share of the key/value cache in use; 0 without a shared cache",
                lambda: engine.state().cache_use or 0.0,
            ),
        ):
            Gauge(name, text, **common).set_function(value)
        self.requests = Counter("chatglm_requests", "Answers by how they ended", ["finish_reason"], **common)
        self.prompt_tokens = Counter("chatglm_prompt_tokens", "Tokens of prompts", **common)
        self.generated_tokens = Counter("chatglm_generated_tokens", "Tokens of answers", **common)
        self.first_token = Histogram(
            "chatglm_first_token_seconds", "From a request to its first token", buckets=_SECONDS, **common
        )
        self.next_token = Histogram(
            "chatglm_next_token_seconds", "From each token to the next", buckets=_SECONDS, **common
        )


class AnswerClock:
    """Times the tokens of one answer."""

    def __init__(self, metrics: Metrics, prompt_tokens: int):
        self._metrics, self._last, self._has_begun = metrics, time.perf_counter(), False
        metrics.prompt_tokens.inc(prompt_tokens)

    def token(self) -> None:
        """Counts a token that has arrived."""
        now = time.perf_counter()
        (self._metrics.next_token if self._has_begun else self._metrics.first_token).observe(now - self._last)
        self._last, self._has_begun = now, True
        self._metrics.generated_tokens.inc()

    def end(self, reason: str) -> None:
        """Counts an answer that has ended: "stop", "length", "tool_calls", "cancelled" or "error"."""
        self._metrics.requests.labels(reason).inc()
