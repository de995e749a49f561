# SPDX-License-Identifier: Apache-2.0
"""Drafts from the prompt, as long as they pay."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.generation.candidate_generator import CandidateGenerator


# Calls with drafts between two looks at what they cost, and the calls without that they are compared with.
_TRIAL, _BASELINE = 6, 2
# Calls without drafts after a trial that did not pay; each such trial doubles them.
_PAUSE, _LONGEST_PAUSE = 24, 384


@dataclass
class _Pace:
    """Tokens that calls have brought, and their seconds."""

    tokens: int = 0
    seconds: float = 0.0
    calls: int = 0

    def add(self, tokens: int, seconds: float) -> None:
        self.tokens, self.seconds, self.calls = self.tokens + tokens, self.seconds + seconds, self.calls + 1

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / max(self.tokens, 1)


class DraftsWhileFaster(CandidateGenerator):
    """Drafts of another generator that cost nothing by themselves, such as prompt lookup, while they are faster.

    A call that checks drafts costs more than one that does not: what is gained depends on how many are right. Both are
    timed as they come; where drafts are slower, they pause, for longer each time. They never exceed the length limit.
    """

    def __init__(self, generator: CandidateGenerator, max_length: int, clock: Callable[[], float] = time.perf_counter):
        """
        Args:
            generator: drafts without computing.
            max_length: of the sequence.
            clock: seconds.
        """
        self.generator = generator
        self.max_length = max_length
        self._clock = clock
        self._plain, self._drafted = _Pace(), _Pace()
        self._pause, self._next_pause = 0, _PAUSE
        self._length = self._began = None  # of the call before
        self._had_drafts = False
        self._is_prompt = True

    def get_candidates(self, input_ids: torch.LongTensor) -> tuple[torch.LongTensor, torch.FloatTensor | None]:
        """See transformers: the ids and drafts int64 `[1, L + drafts]`, and no logits, as nothing was computed."""
        self._note(input_ids.shape[1])
        candidates = input_ids
        if self._may_draft():
            found, _ = self.generator.get_candidates(input_ids)
            candidates = found[:, : max(self.max_length - 1, input_ids.shape[1])]
        self._had_drafts = candidates.shape[1] > input_ids.shape[1]
        self._length, self._began = input_ids.shape[1], self._clock()
        return candidates, None

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, num_matches: int):
        """See transformers."""
        self.generator.update_candidate_strategy(input_ids, scores, num_matches)

    def _note(self, length: int) -> None:
        """Takes notice of the call that has ended; the one that computed the prompt tells nothing."""
        if self._length is None:
            return
        if not self._is_prompt:
            pace = self._drafted if self._had_drafts else self._plain
            pace.add(length - self._length, self._clock() - self._began)
        self._is_prompt = False

    def _may_draft(self) -> bool:
        if self._pause:
            self._pause -= 1
            return False
        if self._drafted.calls < _TRIAL:
            return True
        if self._plain.calls < _BASELINE:
            return False
        if self._drafted.seconds_per_token > self._plain.seconds_per_token:
            self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, _LONGEST_PAUSE)
        else:
            self._next_pause = _PAUSE
        self._plain, self._drafted = _Pace(), _Pace()
        return not self._pause
