# SPDX-License-Identifier: Apache-2.0
"""Requests made up from the server's own schema get an answer or a reason, never a failure of the server."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings


pytest_plugins = ["serving_support"]


def fuzz(server, examples: int) -> int:
    """Makes up requests for every operation; returns how many were sent.

    Raises:
        AssertionError: the server failed.
    """
    schema = schemathesis.openapi.from_asgi("/openapi.json", server.app)
    sent = 0
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
        @given(case=operation.as_strategy())
        def ask(case) -> None:
            nonlocal sent
            if isinstance(case.body, dict) and sent % 2:  # half of them get past the name
                case.body["model"] = "tiny"
            response = case.call(base_url=server.url, timeout=30)
            sent += 1
            assert response.status_code < 500, (response.status_code, case.body, response.text)

        ask()
    return sent


def test_no_request_makes_the_server_fail(server):
    assert fuzz(server, 15) > 45
    assert server.chat("你好").choices
