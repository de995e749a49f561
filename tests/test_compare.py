# SPDX-License-Identifier: Apache-2.0
"""`chatglm-ov compare`: a model equals itself, and the measurements are those that torch computes."""

import argparse
import json
import math

import pytest
import torch
from conftest import DATA, EXACT
from reference import text as reference_text
from transformers import AutoTokenizer

from optimum_chatglm_ov import OVChatGLMForCausalLM, export_model
from optimum_chatglm_ov.assets import TINY_CHATGLM3
from optimum_chatglm_ov.cli import compare as command
from optimum_chatglm_ov.compare import compare


TEXT = (
    "The quick brown fox jumps over the lazy dog.\n\n今天天气很好，我们去公园散步。\n\nHello world, how are you?\n\n"
    * 4
)
LENGTHS = {"block_length": 48, "max_tokens": 144, "prompts": 2, "prompt_length": 8, "new_tokens": 6}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    return export_model(DATA / "models" / "chatglm3-6b", tmp_path_factory.mktemp("int8") / "ir", weight_format="int8")


@pytest.mark.parametrize("name", ["chatglm-6b-3layer-untied", "chatglm3-6b", "glm-4-9b-chat"])
def test_a_model_equals_itself(name, exported, text):
    folder = exported(name)
    found = compare(folder, folder, text, reference_config=EXACT, candidate_config=EXACT, **LENGTHS)
    assert found.tokens == 3 * 47
    assert found.kl_divergence == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == 1
    assert found.candidate_perplexity == pytest.approx(found.reference_perplexity, rel=1e-6)
    assert found.greedy_prefixes == found.greedy_tokens
    assert len(found.greedy_tokens) == 2


def test_attention_is_a_choice(exported, text):
    folder = exported("chatglm3-6b")
    exact = {"reference_config": EXACT, "candidate_config": EXACT}
    found = compare(folder, folder, text, reference_attention="sdpa", candidate_attention="fused", **exact, **LENGTHS)
    assert 0 < found.kl_divergence < 1e-6 and found.greedy_prefixes == found.greedy_tokens


def test_measurements_are_those_of_torch(exported, exact_model, int8, text):
    """Perplexity, divergence and agreement computed once more, block by block, in float64."""
    folder = exported("chatglm3-6b")
    found = compare(folder, int8, text, reference_config=EXACT, candidate_config=EXACT, **LENGTHS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [
        token
        for part in TEXT.split("\n\n")
        if part
        for token in tokenizer.encode(part + "\n", add_special_tokens=False)
    ]
    models = exact_model("chatglm3-6b"), OVChatGLMForCausalLM.from_pretrained(int8, ov_config=EXACT)
    rows = [[], []]
    targets = []
    for start in range(0, 144, 48):
        block = ids[start : start + 48]
        targets += block[1:]
        for kept, model in zip(rows, models):
            logits = model(torch.tensor([tokenizer.build_inputs_with_special_tokens(block)])).logits[0]
            kept.append(logits[-48:-1].double().log_softmax(-1))
    reference, candidate = map(torch.cat, rows)
    picked = torch.arange(len(targets)), torch.tensor(targets)
    assert found.reference_perplexity == pytest.approx(math.exp(-reference[picked].mean()), rel=1e-4)
    assert found.candidate_perplexity == pytest.approx(math.exp(-candidate[picked].mean()), rel=1e-4)
    divergence = (reference.exp() * (reference - candidate)).sum(-1).mean()
    assert found.kl_divergence == pytest.approx(divergence.item(), rel=1e-2)
    assert 0 < found.kl_divergence < 5e-3
    agreement = (reference.argmax(-1) == candidate.argmax(-1)).double().mean()
    assert found.top1_agreement == pytest.approx(agreement.item())
    assert all(0 <= common <= most for common, most in zip(found.greedy_prefixes, found.greedy_tokens))


def run(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_command(exported, int8, text, tmp_path, capsys):
    short = ("--max-tokens", 96, "--block-length", 48, "--prompts", 1, "--new-tokens", 4)
    properties = ("--candidate-property", "KV_CACHE_PRECISION=u8", "--reference-property", "KV_CACHE_PRECISION=f32")
    properties += ("--candidate-attention", "fused", "--reference-attention", "sdpa")
    output = tmp_path / "report.json"
    assert run(exported("chatglm3-6b"), int8, "--text", text, "--json", output, *short, *properties) == 0
    assert "| mean KL divergence (nats)" in capsys.readouterr().out
    assert json.loads(output.read_text())["tokens"] == 94
    assert run(exported("chatglm3-6b"), int8, "--text", text, "--json", "-", *short) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 94


@pytest.mark.parametrize("argument", ["KV_CACHE_PRECISION", "=u8", "KV_CACHE_PRECISION="])
def test_properties_must_be_pairs(argument, capsys):
    with pytest.raises(SystemExit):
        run("a", "b", "--text", "c", "--candidate-property", argument)
    assert "is not KEY=VALUE" in capsys.readouterr().err


def test_what_cannot_be_compared(exported, text, tmp_path):
    folder = exported("chatglm3-6b")
    with pytest.raises(ValueError, match="vocabularies differ: 768 ids.*640"):
        compare(folder, exported("glm-4-9b-chat"), text, **LENGTHS)
    with pytest.raises(ValueError, match="cannot read the text"):
        compare(folder, folder, tmp_path / "none.txt")
    with pytest.raises(ValueError, match="No text found"):
        compare(folder, folder, [" "])
    with pytest.raises(ValueError, match="`block_length` is 1"):
        compare(folder, folder, text, block_length=1)


@pytest.mark.parametrize("weight_format, divergence, agreement", [("int8", 0.001, 0.99), ("int4", 0.05, 0.94)])
def test_what_the_tiny_model_loses(weight_format, divergence, agreement, tmp_path):
    """Quantised, it answers the same; on text it was not trained for, its distributions move as little as stated."""
    turns = [turn for turn in reference_text.Text().turns if turn.topic != "unknown"]
    reference = export_model(TINY_CHATGLM3, tmp_path / "fp32", weight_format="fp32")
    candidate = export_model(TINY_CHATGLM3, tmp_path / weight_format, weight_format=weight_format)
    sentences = [f"{turn.question}\n{turn.answer}" for turn in turns]
    found = compare(reference, candidate, sentences, reference_config=EXACT, candidate_config=EXACT, prompts=0)
    assert found.kl_divergence < divergence and found.top1_agreement > agreement
    assert abs(found.candidate_perplexity / found.reference_perplexity - 1) < 0.05
    model = OVChatGLMForCausalLM.from_pretrained(candidate, ov_config=EXACT)
    tokenizer = AutoTokenizer.from_pretrained(candidate)
    for turn in turns[::10]:
        assert model.chat(tokenizer, turn.question, do_sample=False)[0] == turn.answer
