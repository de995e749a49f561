# SPDX-License-Identifier: Apache-2.0
"""Generation stops where a turn ends, and no text shows the token that ended it."""

import json
import logging
import shutil

import pytest
from conftest import DATA, says
from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig, TextStreamer, pipeline

from optimum_chatglm_ov import OVChatGLMForCausalLM, export_model
from optimum_chatglm_ov.tokenization import ChatGLMTextStreamer


ENDS = {
    "chatglm-6b-3layer-untied": ["<eop>"],
    "chatglm2-6b": ["</s>"],
    "codegeex2-6b": ["</s>"],
    "chatglm3-6b": ["</s>", "<|user|>", "<|observation|>"],
    "glm-4-9b-chat": ["<|endoftext|>", "<|user|>", "<|observation|>"],
}
EACH_END = [(name, token) for name, tokens in ENDS.items() for token in tokens]
MESSAGES = [{"role": "user", "content": "你好"}]


def end_ids(folder, tokens):
    return AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(tokens)


def stored_ends(folder):
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    return ends if isinstance(ends, list) else [ends]


@pytest.fixture(scope="module")
def exported_before(exported, tmp_path_factory):
    """An export whose generation_config.json names no id, or one, as the checkpoint's own did."""

    def copy(name, eos_token_id=None):
        folder = shutil.copytree(exported(name), tmp_path_factory.mktemp("before") / name)
        config = {} if eos_token_id is None else {"eos_token_id": eos_token_id}
        (folder / "generation_config.json").write_text(json.dumps(config))
        return folder

    return copy


@pytest.mark.parametrize("name", ENDS)
def test_the_exported_folder_names_every_end(name, exported):
    assert stored_ends(exported(name)) == end_ids(exported(name), ENDS[name])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"eos_token_id": 2}, [2, 706, 708]),
        ({"eos_token_id": [704]}, [704, 2, 706, 708]),
        ({}, [2, 706, 708]),
    ],
)
def test_ends_of_the_checkpoint_are_kept(config, expected, tmp_path):
    source = shutil.copytree(DATA / "models" / "chatglm3-6b", tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps(config))
    assert stored_ends(export_model(source, tmp_path / "ir")) == expected


@pytest.mark.parametrize("name", ["THUDM/chatglm3-6b-base"])
def test_a_chat_model_made_of_a_base_model_ends_its_turns(name, tmp_path):
    source = shutil.copytree(DATA / "models" / "chatglm3-6b", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"_name_or_path": name}))
    output = export_model(source, tmp_path / "ir")
    assert stored_ends(output) == [2, 706, 708]
    assert OVChatGLMForCausalLM.from_pretrained(output, compile=False).generation_config.eos_token_id == [2, 706, 708]


@pytest.mark.parametrize(("name", "token"), EACH_END)
def test_generate_stops_at_every_end(name, token, either_model, exported):
    model, tok = either_model(name), AutoTokenizer.from_pretrained(exported(name))
    answer = tok.encode("好", add_special_tokens=False)
    end = tok.convert_tokens_to_ids(token)
    prompt = tok.build_chat_input("你好")["input_ids"]
    ids = model.generate(prompt, **says([*answer, end]))[0, prompt.shape[1] :].tolist()
    assert ids == [*answer, end]
    assert tok.decode(ids, skip_special_tokens=True).strip() == "好"
    response, history = model.chat(tok, "你好", **says([*answer, end]))
    assert response == "好" and "<" not in json.dumps(history)


@pytest.mark.parametrize(("name", "token"), EACH_END)
@pytest.mark.parametrize("answer", ["好", ""])
def test_pipeline_stops_and_shows_no_end(name, token, answer, exported_before):
    folder = exported_before(name)
    generator = pipeline("text-generation", model=str(folder))
    tok = generator.tokenizer
    ids = [*tok.encode(answer, add_special_tokens=False), tok.convert_tokens_to_ids(token)]
    conversation = generator(MESSAGES, **says(ids))[0]["generated_text"]
    assert [message["role"] for message in conversation] == ["user", "assistant"]
    assert conversation[-1]["content"].strip() == answer


@pytest.mark.parametrize(("name", "tokens"), ENDS.items())
def test_an_older_export_stops_as_well(name, tokens, exported_before):
    folder = exported_before(name, end_ids(exported_before(name), tokens[0]))
    model = OVChatGLMForCausalLM.from_pretrained(folder, compile=False)
    ends = model.generation_config.eos_token_id
    assert (ends if isinstance(ends, list) else [ends]) == end_ids(folder, tokens)


def test_a_generation_configuration_of_the_caller_is_left_alone(exported):
    given = GenerationConfig(eos_token_id=7)
    model = OVChatGLMForCausalLM.from_pretrained(exported("chatglm3-6b"), compile=False, generation_config=given)
    assert model.generation_config.eos_token_id == 7


def test_a_damaged_tokenizer_is_told_and_no_error(exported_before, caplog):
    folder = exported_before("chatglm3-6b", 2)
    (folder / "tokenizer.model").write_bytes(b"\n damaged")
    with caplog.at_level(logging.WARNING, logger="optimum_chatglm_ov"):
        model = OVChatGLMForCausalLM.from_pretrained(folder, compile=False)
    assert model.generation_config.eos_token_id == 2
    assert "the tokenizer cannot be read" in caplog.text


@pytest.mark.parametrize("name", ["chatglm3-6b", "glm-4-9b-chat"])
def test_other_tools_read_the_ends_in_the_folder(name, exported):
    model = OVModelForCausalLM.from_pretrained(exported(name), compile=False)
    assert model.generation_config.eos_token_id == end_ids(exported(name), ENDS[name])


@pytest.mark.parametrize("streamer_class", [TextStreamer, ChatGLMTextStreamer])
def test_streamers_show_no_end(streamer_class, either_model, exported, capsys):
    model, tok = either_model("chatglm3-6b"), AutoTokenizer.from_pretrained(exported("chatglm3-6b"))
    ids = [*tok.encode("好", add_special_tokens=False), tok.get_command("<|user|>")]
    streamer = streamer_class(tok, skip_prompt=True, skip_special_tokens=True)
    model.generate(tok.build_chat_input("你好")["input_ids"], streamer=streamer, **says(ids))
    assert capsys.readouterr().out.strip() == "好"


def test_padding_after_an_end_is_no_text(exported):
    tok = AutoTokenizer.from_pretrained(exported("chatglm3-6b"))
    answer = [*tok.encode("好", add_special_tokens=False), tok.get_command("<|observation|>")]
    assert tok.decode([*answer, tok.pad_token_id, tok.pad_token_id], skip_special_tokens=True) == "好"
    assert tok.decode([*answer, tok.eos_token_id, tok.eos_token_id], skip_special_tokens=True) == "好"
    assert tok.decode(answer).endswith("<|observation|>")  # without being asked to skip it


@pytest.mark.parametrize("name", ["chatglm3-6b", "glm-4-9b-chat"])
def test_ends_alone_are_no_text(name, exported):
    tok = AutoTokenizer.from_pretrained(exported(name))
    for end in end_ids(exported(name), ENDS[name]):
        for ids in (end, [end], [end, tok.eos_token_id, tok.eos_token_id], [end, tok.pad_token_id, end]):
            assert tok.decode(ids, skip_special_tokens=True) == ""


def test_batches_padded_with_an_end_show_none(exported):
    tok = AutoTokenizer.from_pretrained(exported("chatglm3-6b"))
    good, user = tok.encode("好", add_special_tokens=False), tok.get_command("<|user|>")
    rows = [[*good, user, *[tok.eos_token_id] * len(good)], tok.encode("好好", add_special_tokens=False) + [user]]
    assert tok.batch_decode(rows, skip_special_tokens=True) == ["好", "好好"]
