# SPDX-License-Identifier: Apache-2.0
"""The loop around openvino-genai's pipeline, told step by step what comes from the server."""

from __future__ import annotations

import pytest
from conftest import DATA
from serving_support import EXACT

from optimum_chatglm_ov import export_model
from optimum_chatglm_ov.serving.batching_process import REFUSED, Batches, make_pipeline
from optimum_chatglm_ov.serving.vocabulary import save_vocabulary
from optimum_chatglm_ov.tokenization import load_tokenizer


PROMPT = [5, 6, 7]


class Server:
    """The other end of the connection: sends `asked`, and `later` after that many steps, then leaves.

    Attributes:
        steps: for each step number, ids and finish reason of the requests of which something came.
    """

    def __init__(self, asked: list, later: dict[int, list]):
        self._asked, self._later, self.steps = list(asked), later, []

    def poll(self, seconds):
        return bool(self._asked) or seconds is None

    def recv(self):
        if not self._asked:
            raise EOFError
        return self._asked.pop(0)

    def send(self, message):
        _, news, _ = message
        self.steps.append(
            [(number, [token_id for token_id, _ in tokens], reason) for number, tokens, reason, _ in news]
        )
        self._asked += self._later.get(len(self.steps), [])

    def ids(self, number: int) -> list[int]:
        """All tokens of a request."""
        return [token_id for step in self.steps for found, ids, _ in step if found == number for token_id in ids]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """That of a model with random weights, which seldom ends a turn."""
    folder = export_model(DATA / "models" / "chatglm3-6b", tmp_path_factory.mktemp("random") / "ir")
    save_vocabulary(load_tokenizer(folder), str(folder.parent))
    options = {"device": "CPU", "ov_config": EXACT, "extension": None, "max_running": 4, "blocks": 64}
    return make_pipeline({**options, "folder": str(folder), "vocabulary": str(folder.parent)})


def steps(pipeline, *asked, later=None) -> Server:
    """What the loop sends to a server."""
    server = Server(list(asked), later or {})
    with pytest.raises(EOFError):
        Batches(pipeline, server).run()
    assert not pipeline.has_non_finished_requests()
    return server


def settings(count: int, **others) -> dict:
    return {"max_new_tokens": count, "ignore_eos": True, **others}


def test_a_request_that_is_cancelled_makes_no_step_more(pipeline):
    server = steps(pipeline, ("add", 1, PROMPT, settings(100)), later={5: [("cancel", 1)]})
    assert len(server.steps) == len(server.ids(1)) == 5


def test_a_request_that_is_begun_again_repeats_nothing(pipeline):
    """Two schemas without a grammar, of which the second is found when what went before is being repeated."""
    alone = steps(pipeline, ("add", 1, PROMPT, settings(20))).ids(1)
    refused = [("add", number, PROMPT, settings(5, json_schema='{"type": "objekt"}')) for number in (2, 3)]
    server = steps(pipeline, ("add", 1, PROMPT, settings(20)), later={8: refused})
    assert server.ids(1) == alone and len(alone) == 20
    reasons = [(number, reason) for step in server.steps for number, _, reason in step if reason]
    assert reasons == [(2, REFUSED), (3, REFUSED), (1, "length")]
