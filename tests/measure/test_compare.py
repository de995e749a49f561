# SPDX-License-Identifier: Apache-2.0
"""`chatglm-ov compare`: a model equals itself, and the measurements are those that torch computes."""

import argparse
import json
import math
import textwrap

import pytest
import torch
from conftest import DATA, EXACT
from reference import text as reference_text
from transformers import AutoTokenizer

from optimum_chatglm_ov import OVChatGLMForCausalLM, export_model
from optimum_chatglm_ov.assets import TINY_CHATGLM3
from optimum_chatglm_ov.cli import compare as command
from optimum_chatglm_ov.cli.main import main
from optimum_chatglm_ov.export import quantization, texts
from optimum_chatglm_ov.measure.accuracy import compare


TEXT = (
    "The quick brown fox jumps over the lazy dog.\n\n今天天气很好，我们去公园散步。\n\nHello world, how are you?\n\n"
    * 4
)
# 47 tokens of each block are measured.
LENGTHS = {"block_length": 48, "max_tokens": 141, "prompts": 2, "prompt_length": 8, "new_tokens": 6}


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
    found = compare(
        folder, folder, text, reference_attention="openvino", candidate_attention="native", **exact, **LENGTHS
    )
    assert 0 < found.kl_divergence < 1e-6 and found.greedy_prefixes == found.greedy_tokens


def test_who_computes_linear_layers_is_a_choice(int8, text):
    config = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    settings = {"reference_config": EXACT, "candidate_config": config, "candidate_attention": "openvino"}
    found = compare(int8, int8, text, reference_attention="openvino", candidate_linear="native", **settings, **LENGTHS)
    assert 1e-7 < found.kl_divergence < 1e-2
    with pytest.raises(ValueError, match="`linear='native'` .* rounds activations"):
        compare(int8, int8, text, reference_linear="native", **settings, **LENGTHS)


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


@pytest.mark.parametrize(
    "max_tokens, block_length", [(1, 32), (2, 32), (31, 32), (32, 32), (40, 32), (63, 32), (9, 2)]
)
def test_exactly_as_many_tokens_as_asked_for(max_tokens, block_length, exported, exact_model, text):
    """They are the first of the text but for the first of each block, and their perplexity is that of torch."""
    folder = exported("chatglm3-6b")
    found = compare(
        folder,
        folder,
        text,
        reference_config=EXACT,
        candidate_config=EXACT,
        max_tokens=max_tokens,
        block_length=block_length,
        prompts=0,
    )
    assert found.tokens == max_tokens
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = next(texts.blocks(texts.read_texts(text), tokenizer, 1000))
    losses = []
    for start in range(0, len(ids), block_length):
        block = ids[start : start + block_length]
        logits = exact_model("chatglm3-6b")(torch.tensor([tokenizer.build_inputs_with_special_tokens(block)])).logits[
            0
        ]
        losses += logits[-len(block) : -1].log_softmax(-1)[range(len(block) - 1), block[1:]].tolist()
    expected = math.exp(-sum(losses[:max_tokens]) / max_tokens)
    assert found.reference_perplexity == pytest.approx(expected, rel=1e-3)


def test_a_checkpoint_is_compared_in_its_stored_precision(exported, text, monkeypatch):
    """Also one so large that it would become int8 where nothing is said."""
    monkeypatch.setattr(quantization, "_INT8_BY_DEFAULT_ABOVE", 1000)
    checkpoint = DATA / "models" / "chatglm3-6b"
    found = compare(
        checkpoint,
        exported("chatglm3-6b"),
        text,
        reference_config=EXACT,
        candidate_config=EXACT,
        **LENGTHS | {"prompts": 0},
    )
    assert abs(found.kl_divergence) < 1e-6  # int8: above 1e-4


@pytest.mark.usefixtures("may_mount")
def test_no_room_for_the_log_probabilities(exported, text, tmp_path, python):
    """On a real file system that is full: an error and not a bus error."""
    script = """
        import sys
        from fork_server import mount_tmpfs
        from optimum_chatglm_ov.cli.main import main
        _, disk, folder, text = sys.argv
        mount_tmpfs(disk, "size=200k")
        sys.exit(main(["compare", folder, folder, "--text", text, "--prompts", "0", "--max-tokens", "90"]))
    """
    arguments = ["-c", textwrap.dedent(script), tmp_path, exported("chatglm3-6b"), text]
    done = python.run(arguments, env=python.environment(TMPDIR=str(tmp_path)))
    assert done.returncode == 1, done.stderr
    assert f"{tmp_path}: no room for the log-probabilities of 90 tokens, 0.3 MB" in done.stderr


def run(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_command(exported, int8, text, tmp_path, capsys):
    short = ("--max-tokens", 94, "--block-length", 48, "--prompts", 1, "--new-tokens", 4)
    properties = ("--candidate-property", "KV_CACHE_PRECISION=u8", "--reference-property", "KV_CACHE_PRECISION=f32")
    properties += ("--candidate-attention", "native", "--reference-attention", "openvino")
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
    with pytest.raises(ValueError, match="character 4 is half of a character"):
        compare(folder, folder, ["half\udc00"])
    with pytest.raises(ValueError, match="`block_length` is 99999; the context of .* holds at most"):
        compare(folder, folder, text, block_length=99999)
    for number in (
        {"block_length": 1},
        {"max_tokens": 0},
        {"prompts": -1},
        {"prompt_length": 0},
        {"prompt_length": -3},
        {"new_tokens": 0},
    ):
        ((name, value),) = number.items()
        with pytest.raises(ValueError, match=f"`{name}` is {value}; expected at least"):
            compare(folder, folder, text, **number)


def test_a_report_that_cannot_be_written_is_found_first(exported, text, tmp_path, capsys):
    arguments = ["compare", "no/such/model", "no/such/model", "--text", str(text), "--json"]
    for file in (tmp_path / "none" / "report.json", tmp_path):
        assert main([*arguments, str(file)]) == 2
        assert f"{file}: cannot be written" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "report.json")]) == 1
    assert "no/such/model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


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
