# SPDX-License-Identifier: Apache-2.0
"""Requests made up from the server's own schema get an answer or a reason, never a failure of the server."""

from __future__ import annotations

from collections import Counter
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings, strategies


pytest_plugins = ["serving_support"]

# What no engine does: a request with one of these comes no further.
REFUSED = (
    "logit_bias",
    "top_logprobs",
    "functions",
    "function_call",
    "modalities",
    "audio",
    "echo",
    "suffix",
    "best_of",
)


def fuzz(url: str, examples: int) -> Counter[tuple[str, int]]:
    """Makes up requests for every operation of the server at `url`; returns how many had each status.

    Raises:
        AssertionError: the server failed.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    statuses: Counter[tuple[str, int]] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(), kind=strategies.sampled_from(("raw", "named", "sound", "sound")))
        def ask(case, kind) -> None:
            if isinstance(case.body, dict) and kind != "raw":
                _let_through(case.body, kind == "sound")
            response = case.call(base_url=url, timeout=30)
            statuses[case.operation.path, response.status_code] += 1
            assert response.status_code < 500, (response.status_code, case.body, response.text)

        ask()
    return statuses


def _let_through(body: dict[str, Any], is_sound: bool) -> None:
    """Gives a request the model's name, so that more of it is read; and all that it needs to be computed."""
    body["model"] = "tiny"
    if not is_sound:
        return
    for name in REFUSED:
        body.pop(name, None)
    if "messages" in body:
        body["messages"] = [{"role": "user", "content": "你好"}]
    if "prompt" in body:
        body["prompt"] = "你好"
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name):
            body[name] = body[name] % 8 + 1


def test_no_request_makes_the_server_fail(server):
    statuses = fuzz(server.url, 15)
    assert statuses.total() > 45 and statuses["/v1/chat/completions", 400]
    assert statuses["/v1/chat/completions", 200] and statuses["/v1/completions", 200]
    assert server.chat("你好").choices
