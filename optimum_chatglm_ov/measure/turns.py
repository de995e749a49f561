# SPDX-License-Identifier: Apache-2.0
"""Times several ways to compute the same, in turns, so that other load on the machine hits them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any


PAUSE_SECONDS = 0.05
"""How long threads of another library may spin where they have just computed."""


def best_seconds(
    calls: Mapping[str, Callable[[], Any]], repetitions: int, warm_up_each: bool = False
) -> dict[str, float]:
    """Seconds of one call of each way, the best of the repetitions.

    Args:
        calls: the ways by name, in the order of their turns.
        repetitions: how often each is timed.
        warm_up_each: call before every timed one, too, and not only before the first: where one way takes the
            processor's caches from the next.
    """
    best = dict.fromkeys(calls, float("inf"))
    for repetition in range(repetitions):
        for way, call in calls.items():
            time.sleep(PAUSE_SECONDS)
            if warm_up_each or repetition == 0:
                call()
            start = time.perf_counter()
            call()
            best[way] = min(best[way], time.perf_counter() - start)
    return best
