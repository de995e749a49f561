# SPDX-License-Identifier: Apache-2.0
"""openvino-genai runs an exported folder from text, with the text that this package's class gives."""

import json
import re

import numpy as np
import openvino as ov
import openvino_genai
import pytest
import torch
from conftest import DATA, EXACT, Golden
from genai_support import PROMPT, genai_settings, golden_prompt, same_characters, scheduler, without_broken_bytes
from torch_models import TORCH_MODELS
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from optimum_chatglm_ov import OVChatGLMForCausalLM, export_model, extension_path
from optimum_chatglm_ov.assets import TINY_CHATGLM3


RECORDED = sorted(folder.name for folder in (DATA / "models").iterdir())
CHECKPOINTS = [*RECORDED, TINY_CHATGLM3.name, *TORCH_MODELS]
BATCHED = ("chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat", "glm", "glm4")
NEW_TOKENS = 24


def has_batching(name):
    return not name.startswith("chatglm-6b") and "ptuning" not in name


def prompt_ids(tokenizer, text, is_turn=False):
    if not is_turn:
        return tokenizer(text)["input_ids"]
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def new_ids(model, ids, max_new_tokens=NEW_TOKENS):
    """What this package's class answers."""
    settings = {"max_new_tokens": max_new_tokens, "max_length": None, "do_sample": False}
    return model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist()


def exact_text(tokenizer, ids):
    return same_characters(tokenizer.decode(ids, skip_special_tokens=True))


def answer_of_class(model, folder, prompt, max_new_tokens=NEW_TOKENS):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return exact_text(tokenizer, new_ids(model, prompt_ids(tokenizer, prompt), max_new_tokens))


def native_properties():
    return {"extensions": [str(extension_path())], **EXACT}


# The same text everywhere --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_text_of_every_checkpoint(name, exported, exact_model):
    """The original implementation, this package's class, tokenizer.json alone, and every back end of GenAI."""
    folder, (text, is_turn) = str(exported(name)), golden_prompt(name)
    exact, alone = AutoTokenizer.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    ids = prompt_ids(exact, text, is_turn)
    assert prompt_ids(alone, text, is_turn) == ids
    answer = new_ids(exact_model(name), ids)
    if name in RECORDED:
        assert [*ids, *answer] == Golden(name)["greedy_single"][0].tolist()
    whole = without_broken_bytes(answer, exact)
    assert whole and alone.decode(whole, skip_special_tokens=True) == exact.decode(whole, skip_special_tokens=True)
    expected = exact_text(exact, answer)
    tokenizer = openvino_genai.Tokenizer(folder)
    settings = genai_settings(NEW_TOKENS, apply_chat_template=is_turn)
    for backend in ({}, {"ATTENTION_BACKEND": "SDPA"}):
        pipeline = openvino_genai.LLMPipeline(folder, tokenizer, "CPU", **backend, **EXACT)
        pieces = []
        found = pipeline.generate(text, settings, lambda piece, pieces=pieces: bool(pieces.append(piece)))
        assert same_characters(found) == expected, backend
        assert same_characters("".join(pieces)) == expected, backend
    if has_batching(name):
        pipeline = openvino_genai.ContinuousBatchingPipeline(folder, tokenizer, scheduler(), "CPU", **EXACT)
        (result,) = pipeline.generate([text], [settings])
        assert same_characters(result.m_generation_ids[0]) == expected


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_text_with_native_linear_layers(name, checkpoint, tmp_path):
    """Of int8 weights, or of the integers that the checkpoint has."""
    integers = {} if name.endswith(("-int4", "-int8")) else {"weight_format": "int8"}
    folder = str(export_model(checkpoint(name), tmp_path / "native", linear="native", **integers))
    text, is_turn = golden_prompt(name)
    exact = AutoTokenizer.from_pretrained(folder)
    model = OVChatGLMForCausalLM.from_pretrained(folder, attention="sdpa", ov_config=EXACT)
    expected = exact_text(exact, new_ids(model, prompt_ids(exact, text, is_turn)))
    pipeline = openvino_genai.LLMPipeline(folder, "CPU", **native_properties())
    settings = genai_settings(NEW_TOKENS, apply_chat_template=is_turn)
    assert same_characters(pipeline.generate(text, settings)) == expected


def test_queries_of_long_contexts_are_scaled(exported, exact_model):
    folder, ids = exported("chatglm3-6b-128k"), Golden("chatglm3-6b-128k")["long_input_ids"]
    assert ids.shape[1] > 2048
    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", scheduler_config=scheduler(), **EXACT)
    inputs = openvino_genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
    found = pipeline.generate(inputs, genai_settings(8)).tokens[0]
    assert found == new_ids(exact_model("chatglm3-6b-128k"), ids[0].tolist(), 8)


@pytest.mark.parametrize("name", ["chatglm-6b-3layer-untied", "chatglm2-6b-ptuning-v2"])
def test_continuous_batching_refuses_what_it_cannot_compute(name, exported):
    with pytest.raises(RuntimeError, match="beam_idx"):
        openvino_genai.ContinuousBatchingPipeline(str(exported(name)), scheduler(), "CPU", EXACT)


# What GenAI does beside ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BATCHED)
def test_continuous_batching(name, exported, exact_model):
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(exported(name)), scheduler(), "CPU", EXACT)
    prompts = [PROMPT, "你好", PROMPT + " and more"]
    expected = [answer_of_class(exact_model(name), exported(name), prompt) for prompt in prompts]
    for _ in range(2):  # the second time from the cache of prefixes
        results = pipeline.generate(prompts, [genai_settings(NEW_TOKENS)] * 3)
        assert [same_characters(result.m_generation_ids[0]) for result in results] == expected


@pytest.mark.parametrize("name", ["chatglm3-6b", "glm4"])
def test_drafts(name, exported, exact_model):
    folder = str(exported(name))
    expected = answer_of_class(exact_model(name), folder, PROMPT)
    lookup = openvino_genai.LLMPipeline(folder, "CPU", prompt_lookup=True, **EXACT)
    found = lookup.generate(PROMPT, genai_settings(NEW_TOKENS, num_assistant_tokens=3, max_ngram_size=2))
    assert same_characters(found) == expected
    draft = openvino_genai.draft_model(folder, "CPU", **EXACT)
    drafted = openvino_genai.LLMPipeline(folder, "CPU", draft_model=draft, **EXACT)
    found = drafted.generate(PROMPT, genai_settings(NEW_TOKENS, num_assistant_tokens=3))
    assert same_characters(found) == expected


@pytest.mark.parametrize("name", ["chatglm-6b-3layer-untied", *BATCHED])
def test_structured_output(name, exported):
    pipeline = openvino_genai.LLMPipeline(str(exported(name)), "CPU", **EXACT)
    structured = openvino_genai.StructuredOutputConfig(regex=r'\{"城市": "[a-z]{2}", "x": (true|false)\}')
    found = json.loads(pipeline.generate(PROMPT, genai_settings(60, structured_output_config=structured)))
    assert len(found["城市"]) == 2 and isinstance(found["x"], bool)
    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2}
    structured = openvino_genai.StructuredOutputConfig(json_schema=json.dumps(schema))
    text = pipeline.generate(PROMPT, genai_settings(60, structured_output_config=structured))
    # a model of random weights may never end the blanks that JSON allows
    assert re.fullmatch(r'\s*\[(\s*"[ab]"\s*(,\s*("([ab]("\s*\]?)?)?)?)?|\s*("[ab]?)?)?\s*', text), text
    structured = openvino_genai.StructuredOutputConfig(grammar='root ::= "好" [0-9] "。" root2\nroot2 ::= "😀"')
    text = pipeline.generate(PROMPT, genai_settings(60, structured_output_config=structured))
    assert re.fullmatch("好[0-9]。😀", text), text


@pytest.mark.parametrize("name", ["glm-4-9b-chat", "glm4"])
def test_chat_history(name, exported):
    folder = exported(name)
    exact = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "你好"}]
    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **EXACT)
    found = pipeline.generate(openvino_genai.ChatHistory(messages), genai_settings(apply_chat_template=True))
    ids = exact.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    inputs = openvino_genai.TokenizedInputs(ov.Tensor(np.array([ids])), ov.Tensor(np.ones((1, len(ids)), np.int64)))
    expected = pipeline.generate(inputs, genai_settings()).tokens[0]
    assert found.texts[0] == pipeline.get_tokenizer().decode(expected)


# Native linear layers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def native_folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("native") / "chatglm3"
    return export_model(TINY_CHATGLM3, output, weight_format="int8", linear="native")


def test_native_linear_layers_with_many_requests(native_folder):
    """The output layer stays OpenVINO's, of which GenAI computes one position."""
    xml = (native_folder / "openvino_model.xml").read_text(encoding="utf-8")
    assert 'type="ChatGLMMLP"' in xml and xml.count('type="MatMul"') == 1
    card = (native_folder / "README.md").read_text(encoding="utf-8")
    assert "extension_path()" in card and "--cpu_extension" in card
    model = OVChatGLMForCausalLM.from_pretrained(native_folder, attention="sdpa", ov_config=EXACT)
    prompts = [PROMPT + " 好" * count for count in range(8)]
    expected = [answer_of_class(model, native_folder, prompt, 12) for prompt in prompts]
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(native_folder), scheduler(), "CPU", native_properties())
    for asked in (prompts[:1], prompts):
        results = pipeline.generate(asked, [genai_settings(12)] * len(asked))
        assert [same_characters(result.m_generation_ids[0]) for result in results] == expected[: len(asked)]


def test_other_packing_is_refused(native_folder, tmp_path):
    xml = (native_folder / "openvino_model.xml").read_text(encoding="utf-8")
    assert 'packing="1"' in xml
    (tmp_path / "openvino_model.xml").write_text(xml.replace('packing="1"', 'packing="7"'), encoding="utf-8")
    (tmp_path / "openvino_model.bin").hardlink_to(native_folder / "openvino_model.bin")
    core = ov.Core()
    core.add_extension(str(extension_path()))
    with pytest.raises(RuntimeError, match="packed in form 7, and this library of optimum-chatglm-ov reads form 1"):
        core.read_model(tmp_path / "openvino_model.xml")


def test_native_linear_layers_need_integers(tmp_path):
    with pytest.raises(ValueError, match="leave `attention` out"):
        export_model(DATA / "models" / "chatglm3-6b", tmp_path / "a", linear="native", attention="fused")
    with pytest.raises(Exception, match="no int8 or int4 linear layers that the native operations take"):
        export_model(DATA / "models" / "chatglm3-6b", tmp_path / "b", linear="native", weight_format="fp16")
    assert not (tmp_path / "b").exists()
