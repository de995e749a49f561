# SPDX-License-Identifier: Apache-2.0
"""The shipped tiny model knows its answers, and the torch definition it was trained with is that of the originals."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import DATA
from reference import TinyChatGLM, prefix_key_values, read_state_dict, text, training
from transformers import AutoTokenizer

import optimum_chatglm_ov
from optimum_chatglm_ov import ChatGLMConfig


FOLDER = Path(optimum_chatglm_ov.__file__).parent / "assets" / "tiny-chatglm3"
CHATGLM2_AND_LATER = (
    "chatglm2-6b",
    "chatglm2-6b-32k",
    "chatglm2-6b-ptuning-v2",
    "chatglm2-flags-mha-layernorm",
    "codegeex2-6b",
    "chatglm3-6b",
    "chatglm3-6b-32k",
    "chatglm3-6b-128k",
    "glm-4-9b-chat",
)


@pytest.fixture(scope="module")
def model():
    return TinyChatGLM.from_folder(FOLDER)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return training.Encoder(tokenizer)


def read_json(name):
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


# The torch definition ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHATGLM2_AND_LATER)
def test_torch_definition_equals_the_original(name):
    reference, golden = TinyChatGLM.from_folder(DATA / "models" / name), np.load(DATA / "model_io" / f"{name}.npz")
    compared = 0
    for case in ("single", "batch", "history"):
        if f"{case}_logits" not in golden:
            continue
        ids, mask, positions = (
            torch.from_numpy(golden[f"{case}_{key}"]) for key in ("input_ids", "attention_mask", "position_ids")
        )
        past = None
        if reference.config.pre_seq_len:
            embedding = read_state_dict(DATA / "models" / name)["transformer.prefix_encoder.embedding.weight"]
            past = prefix_key_values(reference.config, embedding, len(ids))
        with torch.no_grad():
            logits = reference(ids, mask, positions, past)
        rows = mask.bool().numpy()
        np.testing.assert_allclose(logits.numpy()[rows], golden[f"{case}_logits"][rows], atol=1e-4, rtol=0)
        compared += 1
    assert compared


def test_torch_definition_refuses_chatglm_6b():
    with pytest.raises(ValueError, match="'chatglm'; this definition is of 'chatglm2' only"):
        TinyChatGLM(ChatGLMConfig(architecture="chatglm"))


def test_a_folder_without_weights_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor pytorch_model.bin"):
        read_state_dict(tmp_path)


# Files ---------------------------------------------------------------------------------------------------------------


def test_files_are_a_chatglm3_repository_of_at_most_6_mb():
    assert {file.name for file in FOLDER.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 6_000_000


def test_config_has_the_keys_of_chatglm3():
    original = json.loads((DATA / "models" / "chatglm3-6b" / "config.json").read_text(encoding="utf-8"))
    assert set(original) - {"auto_map", "transformers_version"} == set(read_json("config.json"))
    config = ChatGLMConfig.from_pretrained(FOLDER)
    assert (config.head_dim, config.num_key_value_heads, config.rope_theta) == (64, 2, 10000.0)
    assert all(size % 128 == 0 for size in (config.hidden_size, config.intermediate_size, config.vocab_size))


def test_weights_are_finite_fp16_under_the_original_names(model):
    weights = read_state_dict(FOLDER)
    assert set(weights) == set(model.state_dict())
    assert "transformer.encoder.layers.0.self_attention.query_key_value.bias" in weights
    assert all(weight.dtype == torch.float16 and weight.isfinite().all() for weight in weights.values())


def test_generation_stops_where_a_turn_ends(tokenizer):
    stops = [tokenizer.get_command(token) for token in ("<eos>", "<|user|>", "<|observation|>")]
    assert read_json("generation_config.json")["eos_token_id"] == stops
    assert len(tokenizer) <= ChatGLMConfig.from_pretrained(FOLDER).vocab_size


def test_prompt_is_that_of_chatglm3(tokenizer, encoder):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))
    size = pieces.get_piece_size()
    gmask, sop, user, assistant = size + 1, size + 3, size + 6, size + 7
    line = pieces.encode("\n")
    first = [gmask, sop, user, *line, *pieces.encode("你好"), assistant]
    assert tokenizer.build_chat_input("你好")["input_ids"].tolist() == [first]

    conversation = [text.Turn("你好", "Hello!", "hello", "en"), text.Turn("Bye", "再见！", "goodbye", "zh")]
    second = [*line, *pieces.encode("Hello!"), user, *line, *pieces.encode("Bye"), assistant]
    history = text.messages(conversation[:1])
    assert tokenizer.build_chat_input("Bye", history)["input_ids"].tolist() == [first + second]
    ids, labels = encoder.row(conversation, last_only=True)
    answer = [*line, *pieces.encode("再见！")]
    assert ids == first + second + answer
    assert labels == [-100] * (len(first + second) - 1) + [*answer, user]


# Answers -------------------------------------------------------------------------------------------------------------


def sample(count, seed):
    return random.Random(seed).sample(training.examination(text.Text()), count)


def test_greedy_answers_are_exact(model, tokenizer):
    stops = read_json("generation_config.json")["eos_token_id"]
    for conversation in sample(20, seed=1):
        *history, last = conversation
        prompt = tokenizer.build_chat_input(last.question, text.messages(history))["input_ids"][0].tolist()
        *answer, stop = model.greedy(prompt, stops)
        assert stop == tokenizer.get_command("<|user|>")
        assert tokenizer.decode(answer).strip() == last.answer


@pytest.mark.parametrize("bits", [16, 8])
def test_every_phrasing_is_answered_exactly(model, encoder, bits):
    conversations = [[turn] for turn in text.Text().turns] + sample(200, seed=bits)
    mistakes, margin = training.examine(training.rounded(model, bits), encoder, conversations)
    assert not mistakes
    assert margin > 0.1


def test_examination_equals_greedy_decoding(model, tokenizer, encoder):
    conversation = [text.Turn("你好", "Hello!", "hello", "en")]  # not what the model was taught
    assert training.examine(model, encoder, [conversation])[0] == [conversation]
    prompt = tokenizer.build_chat_input("你好")["input_ids"][0].tolist()
    assert tokenizer.decode(model.greedy(prompt, [encoder.stop])[:-1]).strip() != "Hello!"


def test_rounding_to_int8_keeps_weights_within_half_a_step(model):
    for original, rounded in zip(training.matrices(model), training.matrices(training.rounded(model, 8))):
        scale = original.abs().amax(dim=1, keepdim=True) / 127
        assert ((original - rounded).abs() <= 0.501 * scale).all()
        assert all(len(row.unique()) <= 255 for row in rounded[:4])


# Training ------------------------------------------------------------------------------------------------------------


def test_training_that_taught_nothing_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "examination", lambda text: [[turn] for turn in text.turns[:8]])
    with pytest.raises(SystemExit, match="answers are wrong with int8 weights, so nothing was written"):
        training.main(["--output", str(tmp_path / "model"), "--steps", "1", "--layers", "1"])
    assert list(tmp_path.iterdir()) == []


def test_disturbed_weights_come_back():
    config = ChatGLMConfig(**{**training.CONFIG, "num_layers": 1})
    model = TinyChatGLM(config)
    before = [weight.detach().clone() for weight in training.matrices(model)]
    with training.disturbed(model):
        assert not any(torch.equal(weight, old) for weight, old in zip(training.matrices(model), before))
    assert all(torch.equal(weight, old) for weight, old in zip(training.matrices(model), before))


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--layers", "0"]])
def test_impossible_arguments_are_reported(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit):
        training.main(["--output", str(tmp_path / "model"), *arguments])
    assert "expected at least 1" in capsys.readouterr().err


def test_output_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SystemExit):
        training.main(["--output", str(tmp_path)])
    assert "is not an empty folder" in capsys.readouterr().err


def test_a_question_with_two_answers_is_reported(tmp_path):
    content = json.loads(text.TEXT_FILE.read_text(encoding="utf-8"))
    content["topics"]["night"]["en"]["questions"].append("who are you")
    file = tmp_path / "text.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="'who are you' has two answers"):
        text.Text(file)
