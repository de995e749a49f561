# SPDX-License-Identifier: Apache-2.0
"""Logits, greedy and beam results of every architecture against those of the original implementations."""

import numpy as np
import pytest
import torch
from conftest import FLOATING, Golden
from torch_models import TORCH_MODELS


TOLERANCE = 1e-3
NAMES = (*FLOATING, *TORCH_MODELS)


def kept_rows(inputs):
    mask = inputs["attention_mask"]
    return (mask if mask.dim() == 2 else ~mask[:, 0].all(dim=1)).bool().numpy()


@pytest.mark.parametrize("name", NAMES)
def test_logits(name, either_model):
    golden, model = Golden(name), either_model(name)
    cases = [case for case in golden.cases("_logits") if case != "long"]
    assert {"single", "batch"} <= set(cases)
    for case in cases:
        inputs = golden.inputs(case)
        if case == "both_masks_model":  # the ids alone: the model finds the positions itself
            inputs = {"input_ids": inputs["input_ids"]}
        logits = model(**inputs).logits.numpy()
        rows = kept_rows(golden.inputs(case)) if "attention_mask" in inputs else slice(None)
        np.testing.assert_allclose(logits[rows], golden[f"{case}_logits"][rows], atol=TOLERANCE, rtol=0, err_msg=case)


@pytest.mark.parametrize("name", NAMES)
def test_last_logits_of_history(name, either_model):
    golden, model = Golden(name), either_model(name)
    for case in golden.cases("_logits_last"):
        logits = model(**golden.inputs(case), logits_to_keep=1).logits.numpy()
        np.testing.assert_allclose(logits, golden[f"{case}_logits_last"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_cached_steps(name, either_model):
    golden, model = Golden(name), either_model(name)
    cases = golden.cases("_logits", prefix="step_")
    assert cases
    for case in cases:
        inputs = golden.inputs(case)
        mask = torch.from_numpy(kept_rows(inputs).astype(np.int64))
        output = model(**inputs, logits_to_keep=1)
        for step, tokens in enumerate(golden[f"step_{case}_tokens"]):
            expected = golden[f"step_{case}_logits"][step]
            np.testing.assert_allclose(output.logits[:, -1].numpy(), expected, atol=TOLERANCE, rtol=0)
            mask = torch.cat([mask, mask.new_ones(len(tokens), 1)], dim=1)
            past = output.past_key_values
            output = model(torch.from_numpy(tokens)[:, None], attention_mask=mask, past_key_values=past)


@pytest.mark.parametrize("name", NAMES)
def test_greedy(name, either_model):
    golden, model = Golden(name), either_model(name)
    cases = golden.cases("", prefix="greedy_")
    assert {"single", "batch"} <= set(cases)
    for case in cases:
        ids = model.generate(**golden.inputs(case), max_new_tokens=24, do_sample=False).numpy()
        np.testing.assert_array_equal(ids, golden[f"greedy_{case}"], err_msg=case)


@pytest.mark.parametrize("name", NAMES)
def test_beams(name, either_model):
    golden, model = Golden(name), either_model(name)
    cases = golden.cases("", prefix="beam_")
    assert {"single", "batch"} <= set(cases)
    for case in cases:
        output = model.generate(
            **golden.inputs(case),
            max_new_tokens=16,
            num_beams=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        np.testing.assert_array_equal(output.sequences.numpy(), golden[f"beam_{case}"], err_msg=case)
        np.testing.assert_allclose(output.sequences_scores.numpy(), golden[f"beam_{case}_scores"], atol=TOLERANCE)


def test_early_stop_in_a_batch(either_model):
    golden, model = Golden("chatglm3-6b"), either_model("chatglm3-6b")
    ids = model.generate(
        **golden.inputs("batch"),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=int(golden["eos_batch_eos"]),
        pad_token_id=int(golden["eos_batch_pad"]),
    )
    np.testing.assert_array_equal(ids.numpy(), golden["greedy_eos_batch"])


def test_long_context_scales_queries(either_model):
    golden, model = Golden("chatglm3-6b-128k"), either_model("chatglm3-6b-128k")
    output = model(torch.from_numpy(golden["long_input_ids"]))
    logits = output.logits[:, torch.from_numpy(golden["long_positions"])].numpy()
    expected = golden["long_logits"]
    np.testing.assert_allclose(logits.reshape(expected.shape), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["chatglm-6b-3layer-untied", "chatglm3-6b", *TORCH_MODELS])
def test_tokens_in_pieces_equal_tokens_at_once(name, either_model):
    golden, model = Golden(name), either_model(name)
    ids = torch.from_numpy(golden["single_input_ids"])
    ids = torch.cat([ids, ids[:, :7]], dim=1)
    prompt = golden["single_input_ids"].shape[1]
    whole = model(ids).logits
    first = model(ids[:, :prompt])
    rest = model(ids[:, prompt:], attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, atol=1e-4, rtol=0)
