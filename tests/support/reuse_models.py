# SPDX-License-Identifier: Apache-2.0
"""What tests of kept prompts share."""

from pathlib import Path

import pytest
import torch
from conftest import EXACT

from optimum_chatglm_ov import OVChatGLMForCausalLM
from optimum_chatglm_ov.architectures.registry import architecture_of


CHATGLM3 = "chatglm3-6b"
PIECE = 64  # tokens


@pytest.fixture(scope="module")
def load(exported):
    def load(name=CHATGLM3, attention="native", ov_config=EXACT, **arguments):
        model = OVChatGLMForCausalLM.from_pretrained(
            exported(name), attention=attention, ov_config=dict(ov_config), **arguments
        )
        model.generation_config.do_sample = False
        return model

    return load


@pytest.fixture(scope="module")
def fresh(load):
    """A model that computes every prompt."""
    models = {}

    def fresh(name=CHATGLM3):
        if name not in models:
            models[name] = load(name, prefix_cache=False)
        return models[name]

    return fresh


class Computed:
    """Tokens of each row that the engine of a model computes, call by call."""

    def __init__(self, model):
        self.lengths, self._run = [], model.engine.run
        model.engine.run = self._count

    def _count(self, inputs):
        self.lengths.append(inputs["input_ids"].shape[1])
        return self._run(inputs)

    def first(self):
        """Of the first call since the last question."""
        first = self.lengths[0]
        self.lengths.clear()
        return first


def prompt(model, length, seed=0):
    return architecture_of(model.config).example_prompt(length, seed)


def answer(model, ids, **settings):
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    settings = {"max_new_tokens": 3, "pad_token_id": 0, "do_sample": False, **settings}
    return model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings)


def assert_same(found, expected):
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)


def files_of(folder):
    return sorted(Path(folder).glob("*.safetensors"))


def stored(model):
    """Waits until the folder has all that the model has put there."""
    model._prefixes.store.wait()
