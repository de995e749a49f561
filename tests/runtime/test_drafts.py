# SPDX-License-Identifier: Apache-2.0
"""Drafts from the prompt stop where they do not pay, and come back where they do."""

import pytest
import torch
from transformers.generation.candidate_generator import CandidateGenerator

from optimum_chatglm_ov.runtime.drafts import DraftsWhileFaster


class Three(CandidateGenerator):
    def get_candidates(self, input_ids):
        return torch.cat((input_ids, torch.tensor([[7, 8, 9]])), dim=1), None

    def update_candidate_strategy(self, input_ids, scores, num_matches):
        self.matches = num_matches


class Generation:
    """Calls of a model on a clock of their own: 1 s without drafts, 2 s with some."""

    def __init__(self, max_length=100_000):
        self.now, self.length = 0.0, 10
        self.drafts = DraftsWhileFaster(Three(), max_length, clock=lambda: self.now)

    def calls(self, count, right):
        """Of `count` calls, how many had drafts, of which `right` were right."""
        drafted = 0
        for _ in range(count):
            ids = torch.zeros((1, self.length), dtype=torch.long)
            candidates, logits = self.drafts.get_candidates(ids)
            assert logits is None
            has_drafts = candidates.shape[1] > self.length
            drafted += has_drafts
            self.now += 2 if has_drafts else 1
            self.length += 1 + right * has_drafts
        return drafted


def test_right_drafts_go_on():
    generation = Generation()
    assert generation.calls(400, right=3) > 250


def test_wrong_drafts_stop_and_are_tried_again_ever_more_rarely():
    generation = Generation()
    first, later = generation.calls(400, right=0), generation.calls(4000, right=0)
    assert 6 <= first < 40 and 0 < later < 120
    assert generation.calls(2000, right=3) > 1000  # the text has become repetitive


def test_drafts_end_before_the_length_limit():
    generation = Generation(max_length=13)
    candidates, _ = generation.drafts.get_candidates(torch.zeros((1, 10), dtype=torch.long))
    assert candidates.shape == (1, 12)
    assert generation.drafts.get_candidates(torch.zeros((1, 12), dtype=torch.long))[0].shape == (1, 12)


def test_the_strategy_is_told(monkeypatch):
    drafts = Generation().drafts
    drafts.update_candidate_strategy(torch.zeros((1, 3)), torch.zeros((1, 1, 5)), 2)
    assert drafts.generator.matches == 2


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_prompt_is_not_counted(steps):
    generation = Generation()
    ids = torch.zeros((1, 10), dtype=torch.long)
    generation.drafts.get_candidates(ids)
    generation.now += 1e6  # the prompt
    generation.length = 11
    assert generation.calls(300, right=3) > 150
