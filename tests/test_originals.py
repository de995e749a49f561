# SPDX-License-Identifier: Apache-2.0
"""What people's scripts call on the original model classes works as there, or says what to use instead."""

import gzip
import json

import pytest
import torch
from conftest import DATA, Golden
from tokenization_cases import NAMES, golden
from transformers import AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList

from optimum_chatglm_ov import ChatGLMConfig, OVChatGLMForCausalLM, ToolCallError
from optimum_chatglm_ov.originals import OriginalsMixin


CHECKPOINTS = ["chatglm-6b-3layer-untied", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"]


class Unloaded(OriginalsMixin):
    """The methods that need a configuration and no weights."""

    def __init__(self, name, **config):
        own = {"architecture": "chatglm"} if "chatglm-6b" in name else {}
        self.config = ChatGLMConfig(padded_vocab_size=151552 if "glm-4" in name else 65024, **own, **config)


@pytest.mark.parametrize("name", [name for name in NAMES if golden(name)["chat"]])
def test_process_response(name):
    model, has_messages = Unloaded(name), "chatglm3" in name or "glm-4" in name
    for case in golden(name)["process_response"]:
        history = [case["history"]] if has_messages else []
        if isinstance(case["out"], dict) and "error" in case["out"]:
            with pytest.raises(ToolCallError):
                model.process_response(case["in"], *history)
            continue
        before = json.dumps(history)
        found = model.process_response(case["in"], *history)
        assert (list(found) if has_messages else found) == case["out"]
        assert json.dumps(history) == before


@pytest.mark.parametrize("name", ["models.chatglm-6b", "chatglm2-6b"])
def test_process_response_takes_the_text_by_either_name(name):
    model = Unloaded(name)
    assert model.process_response(response=" a ") == model.process_response(output=" a ") == "a"
    for arguments in ({}, {"output": "a", "response": "a"}):
        with pytest.raises(TypeError, match="one text, as `output` or `response`"):
            model.process_response(**arguments)


def test_process_response_of_chatglm_has_no_history():
    with pytest.raises(TypeError, match="leave `history` out"):
        Unloaded("models.chatglm-6b").process_response("text", [])


@pytest.mark.parametrize(
    "name, stored_name, expected",
    [
        ("chatglm3-6b", "", {"name": "weather", "parameters": {"city": "北京"}}),
        ("chatglm2-6b", "/data/glm-4/THUDM/chatglm3-6b", {"name": "weather", "parameters": {"city": "北京"}}),
        ("glm-4-9b-chat", "", {"name": "weather", "parameters": {"city": "上海"}}),
        ("glm-4-9b-chat", "/data/codegeex4/chatglm3-6b", {"name": "weather", "parameters": {"city": "上海"}}),
        ("glm-4-9b-chat", "THUDM/codegeex4-all-9b", {"name": "rain", "parameters": {"city": "广州"}}),
    ],
)
def test_process_response_goes_by_vocabulary_and_name(name, stored_name, expected):
    texts = {
        "北京": "weather\n```python\ntool_call(city='北京')\n```",
        "上海": 'weather\n{"city": "上海"}',
        "广州": '```json\n{"name": "rain", "arguments": {"city": "广州"}}\n```',
    }
    tools = [{"name": "weather", "description": "", "parameters": {}}]
    history = [{"role": "system", "content": "", "tools": tools}, {"role": "user", "content": "天气？"}]
    model = Unloaded(name, _name_or_path=stored_name)
    response, messages = model.process_response(texts[expected["parameters"]["city"]], history)
    assert response == expected and [message["role"] for message in messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_build_inputs_and_stream_generate(name, exact_model, exported):
    """The golden conversation, put together as the originals' own `stream_chat()` does."""
    model, tokenizer = exact_model(name), AutoTokenizer.from_pretrained(exported(name))
    with gzip.open(DATA / "chat_io" / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        case = json.load(file)["cases"][0]
    inputs = model.build_inputs(tokenizer, case["query"], history=[])
    assert inputs["input_ids"].tolist() == [case["input_ids"]]
    steps = list(model.stream_generate(**inputs, max_length=case["max_length"], do_sample=False))
    prompt = len(case["input_ids"])
    assert [step.shape for step in steps] == [(1, prompt + i + 1) for i in range(len(steps))]
    for step in steps:
        assert step.tolist() == [case["output_ids"][: step.shape[1]]]
    expected = model.generate(**inputs, max_length=case["max_length"], do_sample=False)
    assert steps[-1].tolist() == expected.tolist()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_stream_generate_of_a_batch(name, either_model):
    model, inputs = either_model(name), Golden(name).inputs("batch")
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    *_, last = model.stream_generate(**inputs, max_new_tokens=6, do_sample=False)
    assert last.tolist() == expected.tolist()


@pytest.mark.parametrize("settings", [{"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2}])
def test_stream_generate_shows_one_sequence_of_each_row(settings, exact_model):
    model, ids, name = exact_model("chatglm2-6b"), torch.tensor([[64, 65]]), next(iter(settings))
    for arguments in (settings, {"generation_config": GenerationConfig(**settings)}):
        with pytest.raises(ValueError, match=f"`{name}` is 1"):
            next(model.stream_generate(ids, max_new_tokens=2, **arguments))


def test_stream_generate_goes_on(either_model):
    model, ids = either_model("chatglm2-6b"), torch.tensor([[64, 65, 66, 67]])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_past_key_values": True}
    *_, (first, past) = model.stream_generate(ids, **settings)
    assert first.shape == (1, 9) and past.input_ids.tolist() == first[:, :-1].tolist()
    more = torch.cat((first[:, -1:], torch.tensor([[70, 71]])), dim=1)
    mask = torch.ones(1, 11, dtype=torch.long)
    *_, (second, _) = model.stream_generate(more, past_key_values=past, attention_mask=mask, **settings)
    whole = torch.cat((first, torch.tensor([[70, 71]])), dim=1)
    expected = model.generate(whole, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert second.tolist() == expected[:, 8:].tolist()


def test_stream_generate_takes_processors_and_can_be_left(exact_model):
    class Only(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([77]), 0)

    model, only = exact_model("chatglm2-6b"), Only()
    stream = model.stream_generate(
        torch.tensor([[64, 65]]), logits_processor=LogitsProcessorList([only]), max_new_tokens=1000, do_sample=False
    )
    assert next(stream).tolist() == [[64, 65, 77]]
    assert next(stream).tolist() == [[64, 65, 77, 77]]
    stream.close()
    assert only.calls < 1000


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda"), 0])
def test_cuda_means_the_cpu(device, exported, caplog):
    model = OVChatGLMForCausalLM.from_pretrained(exported("chatglm2-6b"), device=device, compile=False)
    assert model._device == "CPU"
    (record,) = [record for record in caplog.records if record.name.startswith("optimum_chatglm_ov")]
    assert 'device="GPU"' in record.getMessage()


@pytest.mark.parametrize("device", ["mps", "xpu:0", torch.device("xpu"), None])
def test_devices_of_torch_are_refused(device, exported, exact_model):
    with pytest.raises(ValueError, match="`device` is .*expected a device of OpenVINO, here .*CPU"):
        OVChatGLMForCausalLM.from_pretrained(exported("chatglm2-6b"), device=device)
    if device is not None:
        with pytest.raises(ValueError, match="`device` is .*expected a device of OpenVINO, here .*CPU"):
            exact_model("chatglm2-6b").to(device)


@pytest.mark.parametrize(
    "name, arguments, advice",
    [
        ("float", (), "dtype=torch.float32"),
        ("half", (), "dtype=torch.float16"),
        ("bfloat16", (), "dtype=torch.bfloat16"),
        ("cuda", (), 'device="GPU"'),
        ("cuda", (0,), 'device="GPU"'),
        ("to", ("cuda:0",), 'device="GPU"'),
        ("to", (torch.device("cuda"),), 'device="GPU"'),
        ("to", (0,), 'device="GPU"'),
        ("cpu", (), 'device="CPU"'),
        ("quantize", (4,), 'quantization_config={"bits": 4}'),
    ],
)
def test_what_has_no_effect_returns_the_model(name, arguments, advice, exact_model, caplog):
    model, ids = exact_model("chatglm2-6b"), torch.tensor([[64, 65, 66]])
    before, request = model(ids).logits, model.request
    assert getattr(model, name)(*arguments) is model
    (record,) = caplog.records
    assert advice in record.getMessage() and "has no effect" in record.getMessage()
    assert model.request is request
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
