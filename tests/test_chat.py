# SPDX-License-Identifier: Apache-2.0
"""`chat()` and `stream_chat()` do what those of the original model classes did."""

import contextlib
import copy
import gzip
import json
import threading
from pathlib import Path

import pytest
import torch
from conftest import EXACT, says
from tokenization_cases import NAMES, golden, tokenizer
from transformers import AutoTokenizer, GenerationConfig, StoppingCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from optimum_chatglm_ov import OVChatGLMForCausalLM, ToolCallError
from optimum_chatglm_ov.chat import ChatMixin, InvalidScoreLogitsProcessor, chat_rules
from optimum_chatglm_ov.configuration import ChatGLMConfig
from optimum_chatglm_ov.errors import ContextLengthError
from optimum_chatglm_ov.runtime.engine import FusedEngine
from optimum_chatglm_ov.runtime.model import EngineForCausalLM


CHAT_IO = Path(__file__).parent / "data" / "chat_io"
CHECKPOINTS = sorted(path.name.removesuffix(".json.gz") for path in CHAT_IO.glob("*.json.gz"))
ONE_OF_EACH_GENERATION = ["chatglm-6b-3layer-untied", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"]
MESSAGES = [name for name in NAMES if "chatglm3" in name or "glm-4" in name]
TOOLS = [{"role": "system", "content": "", "tools": [{"name": "get_weather"}]}]


def chat_cases(name):
    with gzip.open(CHAT_IO / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)["cases"]


def history_of(items):
    """A history as the original takes it; JSON has lists where it has tuples."""
    return [tuple(item) if isinstance(item, list) else dict(item) for item in items]


def streamed(name, tok, case):
    """What the original streamed, without the texts of ChatGLM that end inside a character."""
    responses = case["stream_responses"]
    if not name.startswith("chatglm-6b"):
        return responses
    generated = case["output_ids"][len(case["input_ids"]) :]
    texts = [tok.decode(generated[: end + 1]) for end in range(len(responses))]
    return [response for response, text in zip(responses, texts) if not text.endswith("\ufffd")]


def rules(name):
    return chat_rules(tokenizer(name), ChatGLMConfig(seq_length=8192))


def role_of(case):
    return {"role": case["role"]} if case.get("role") else {}


@pytest.fixture(scope="module")
def exact_tokenizer(exported):
    return lambda name: AutoTokenizer.from_pretrained(exported(name))


# What becomes of the generated text --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if golden(name)["chat"]])
def test_process_response(name):
    for case in golden(name)["process_response"]:
        earlier = case.get("history", [{"role": "user", "content": "hi"}])
        arguments = (case["in"], earlier[-1]["content"], earlier[:-1])
        if isinstance(case["out"], dict) and "error" in case["out"]:
            with pytest.raises(ToolCallError, match="bad json"):
                rules(name).process_response(*arguments)
            continue
        response, history = rules(name).process_response(*arguments)
        if name in MESSAGES:
            assert [response, history] == case["out"]
        else:
            assert response == case["out"]
            assert history == [*earlier[:-1], ("hi", response)]


@pytest.mark.parametrize(
    "call",
    [
        "tool_call(__import__('os').getcwd())",
        "tool_call(a=__import__('os').getcwd())",
        "tool_call(a=1 + 1)",
        "tool_call('x')",
        "tool_call(**{'a': 1})",
        "tool_call(a=1, a=2)",
        "tool_call(a={[]: 1})",
        "get_weather(city='x')",
        "tool_call(a=1); tool_call(a=2)",
        "tool_call(a=",
        "a\0b",
        "(" * 5000,
        "",
    ],
)
def test_calls_are_read_and_never_evaluated(call):
    text = f"get_weather\n```python\n{call}\n```"
    with pytest.raises(ToolCallError, match="cannot be read.*expected a code block"):
        rules("models.chatglm3-6b").process_response(text, "hi", TOOLS)


def test_literals_of_calls():
    text = "f\n```python\ntool_call(a=-1.5, b=[1, (2, None)], c={'d': True}, e='你\\n好', from='a,)')\n```"
    response, _ = rules("models.chatglm3-6b").process_response(text, "hi", TOOLS)
    parameters = {"a": -1.5, "b": [1, (2, None)], "c": {"d": True}, "e": "你\n好", "from": "a,)"}
    assert response == {"name": "f", "parameters": parameters}


@pytest.mark.parametrize("name", ["models.chatglm3-6b", "models.glm-4-9b-chat"])
def test_incomplete_calls_are_shown_as_they_are(name):
    response, history = rules(name).process_response("f\n```python\ntool_c", "hi", TOOLS, incomplete=True)
    assert response == {"name": "f", "content": "```python\ntool_c"}
    assert history[-1] == {"role": "assistant", "metadata": "f", "content": "```python\ntool_c"}


def test_invalid_scores():
    processor = InvalidScoreLogitsProcessor(5)
    valid = torch.randn(2, 8)
    assert processor(None, valid) is valid
    for value in ("nan", "inf", "-inf"):
        scores = valid.clone()
        scores[1, 2] = float(value)
        expected = torch.zeros(2, 8)
        expected[:, 5] = 5e4
        torch.testing.assert_close(processor(None, scores), expected)


# What the model gets -----------------------------------------------------------------------------------------------


class Recorder(ChatMixin):
    """Generates the ids it is given; the golden prompts and arguments were recorded from the originals like this."""

    device = torch.device("cpu")

    def __init__(self, generated, **config):
        self.config = ChatGLMConfig(**config)
        self.generation_config = GenerationConfig()
        self.generated = generated

    def generate(self, input_ids, **arguments):
        self.input_ids, self.arguments = input_ids, arguments
        sequences = torch.cat((input_ids, torch.tensor([self.generated])), dim=1)
        return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=((),))

    def compile(self):
        pass

    def _turns(self, assistant):
        return contextlib.nullcontext()

    generate_turn = EngineForCausalLM.generate_turn


@pytest.mark.parametrize("name", [name for name in NAMES if golden(name)["chat"]])
def test_prompts_and_arguments(name):
    for case in golden(name)["chat"]:
        model = Recorder(case["fake_generated"], seq_length=8192)
        history = history_of(case["history"])
        response, new_history = model.chat(tokenizer(name), case["query"], history, max_length=64, **role_of(case))
        assert response == case["response"]
        assert new_history == history_of(case["new_history"])
        assert history == history_of(case.get("passed_history_after", case["history"]))
        input_ids = case["build_chat_input" if "build_chat_input" in case else "input_ids"]
        input_ids = input_ids["input_ids"] if isinstance(input_ids, dict) else input_ids
        assert model.input_ids.tolist() == (input_ids if isinstance(input_ids[0], list) else [input_ids])
        arguments = dict(case["generate_kwargs"], do_sample=True)
        if "128k" in name:  # which of the two models a tokenizer belongs to is not its business
            arguments.update(top_p=0.8, temperature=0.8)
        assert {key: model.arguments[key] for key in arguments} == arguments


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("models.chatglm-6b", {}, (2048, 0.7, 0.95, 5)),
        ("models.chatglm2-6b", {"seq_length": 32768}, (8192, 0.8, 0.8, 5)),
        ("models.chatglm2-6b", {"seq_length": 32768, "rope_ratio": 16}, (32768, 0.8, 0.8, 5)),
        ("models.codegeex2-6b", {"seq_length": 8192}, (8192, 0.8, 0.8, 5)),
        ("models.chatglm3-6b", {"seq_length": 8192}, (8192, 0.8, 0.8, 5)),
        ("models.chatglm3-6b", {"seq_length": 32768, "rope_ratio": 50}, (8192, 0.8, 0.8, 5)),
        ("models.chatglm3-6b", {"seq_length": 131072, "rope_ratio": 500}, (131072, 0.7, 0.95, 5)),
        ("models.glm-4-9b-chat", {"seq_length": 131072, "rope_ratio": 500}, (8192, 0.8, 0.8, 198)),
    ],
)
def test_defaults(name, config, expected):
    model = Recorder([300], **config)
    model.chat(tokenizer(name), "hi")
    arguments = model.arguments
    assert arguments["do_sample"] and arguments["num_beams"] == 1
    processor = arguments["logits_processor"][-1]
    assert expected == (
        arguments["max_length"],
        arguments["top_p"],
        arguments["temperature"],
        processor.token_id,
    )


def test_arguments_of_generate_are_passed_on():
    model = Recorder([300], seq_length=8192)
    first = InvalidScoreLogitsProcessor(7)
    processors = [first]
    model.chat(
        tokenizer("models.chatglm3-6b"), "hi", logits_processor=processors, max_new_tokens=4, top_k=3, eos_token_id=9
    )
    assert "max_length" not in model.arguments and model.arguments["max_new_tokens"] == 4
    assert model.arguments["top_k"] == 3 and model.arguments["eos_token_id"] == 9
    assert [processor.token_id for processor in model.arguments["logits_processor"]] == [7, 5]
    assert processors == [first]


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="expected a ChatGLM tokenizer"):
        Recorder([300]).chat(object(), "hi")


@pytest.mark.parametrize("name", ["models.chatglm-6b", "models.chatglm2-6b"])
def test_pairs_have_no_role(name):
    with pytest.raises(ValueError, match="role 'user' only; found 'observation'"):
        Recorder([300]).chat(tokenizer(name), "hi", [], "observation")


@pytest.mark.parametrize("name", ["models.chatglm-6b", "models.chatglm2-6b", "models.codegeex2-6b"])
def test_positions_of_the_first_generations(name):
    """`chat(tokenizer, query, history, max_length, num_beams, do_sample, top_p, temperature, logits_processor)`."""
    model, tok, processors = Recorder([300]), tokenizer(name), [InvalidScoreLogitsProcessor(7)]
    model.chat(tok, "hi", [], 64)
    assert model.arguments["max_length"] == 64
    model.chat(tok, "hi", [("a", "b")], 64, do_sample=False)
    assert (model.arguments["max_length"], model.arguments["do_sample"]) == (64, False)
    model.chat(tok, "hi", [], 65, 2, True, 0.6, 0.9, processors)
    names = ("max_length", "num_beams", "do_sample", "top_p", "temperature")
    assert [model.arguments[name] for name in names] == [65, 2, True, 0.6, 0.9]
    assert model.arguments["logits_processor"][0] is processors[0]
    model.chat(tok, "hi", [], "user", 66)  # as in the later generations
    assert model.arguments["max_length"] == 66


@pytest.mark.parametrize("name", ["models.chatglm3-6b", "models.glm-4-9b-chat"])
def test_positions_of_the_later_generations(name):
    model = Recorder([300])
    model.chat(tokenizer(name), "hi", [], "observation", 64, 2)
    assert (model.arguments["max_length"], model.arguments["num_beams"]) == (64, 2)
    assert "observation" in tokenizer(name).decode(model.input_ids[0].tolist())


# With a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_chat(name, either_model, exact_tokenizer):
    model, tok = either_model(name), exact_tokenizer(name)
    for case in chat_cases(name):
        history = history_of(case["history"])
        settings = dict(max_length=case["max_length"], do_sample=False, **role_of(case))
        response, new_history = model.chat(tok, case["query"], history, **settings)
        assert response == case["response"]
        assert new_history == history_of(case["new_history"])
        assert history == history_of(case["passed_history_after"])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_stream_chat(name, either_model, exact_tokenizer):
    model, tok = either_model(name), exact_tokenizer(name)
    for case in chat_cases(name):
        history = history_of(case["history"])
        settings = dict(max_length=case["max_length"], do_sample=False, **role_of(case))
        turns = list(model.stream_chat(tok, case["query"], history, **settings))
        assert [response for response, _ in turns] == streamed(name, tok, case)
        assert history == history_of(case["passed_history_after"])
        for response, new_history in turns:
            last = new_history[-1]
            assert response == (last["content"] if isinstance(last, dict) else last[1])
            assert new_history[:-1] == history_of(case["new_history"])[:-1]


@pytest.mark.parametrize("name", ["chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"])
def test_stream_goes_on_from_past_key_values(name, either_model, exact_tokenizer):
    model, tok = either_model(name), exact_tokenizer(name)
    case = chat_cases(name)[0]
    settings = dict(max_length=case["max_length"], do_sample=False)
    *_, (response, history, past) = model.stream_chat(
        tok, case["query"], history_of(case["history"]), return_past_key_values=True, **settings
    )
    assert response == case["stream_responses"][-1]
    assert past.input_ids.tolist() == [case["output_ids"][:-1]]

    if name == "chatglm2-6b":  # the round goes on in the same text
        full = tok.encode(tok.build_prompt("你好", history))
        following = tok.encode("\n\n[Round 2]\n\n问：你好\n\n答：", add_special_tokens=False)[1:]
        assert full[-len(following) :] == following
    else:
        following = tok.build_chat_input("你好")["input_ids"][0].tolist()
    prompt = torch.tensor([case["output_ids"][:-1] + following])
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :].tolist()
    *_, (_, new_history, past) = model.stream_chat(
        tok, "你好", history, past_key_values=past, max_new_tokens=8, do_sample=False, return_past_key_values=True
    )
    generated = past.input_ids[0, prompt.shape[1] :].tolist()
    assert past.input_ids[0, : prompt.shape[1]].tolist() == prompt[0].tolist()
    assert generated and generated == expected[: len(generated)]
    assert len(new_history) == len(history) + 1  # ChatGLM3 and GLM-4 have put the query into `history`


def test_chatglm_streams_without_past_key_values(either_model, exact_tokenizer):
    name = "chatglm-6b-3layer-untied"
    with pytest.raises(ValueError, match="without `past_key_values`"):
        next(either_model(name).stream_chat(exact_tokenizer(name), "hi", return_past_key_values=True))


class CountSteps(StoppingCriteria):
    """Never stops; counts the steps, and waits in the third until `go_on` is set."""

    def __init__(self):
        self.steps, self.go_on = 0, threading.Event()

    def __call__(self, input_ids, scores, **kwargs):
        self.steps += 1
        if self.steps == 3:
            self.go_on.wait()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("name", ONE_OF_EACH_GENERATION)
def test_closing_a_stream_stops_the_generation(name, either_model, exact_tokenizer):
    model, tok, case = either_model(name), exact_tokenizer(name), chat_cases(name)[0]
    threads, counter = threading.active_count(), CountSteps()
    settings = dict(do_sample=False, max_length=1500, eos_token_id=-1, stopping_criteria=[counter])
    stream = model.stream_chat(tok, case["query"], history_of(case["history"]), **settings)
    response, _ = next(stream)
    counter.go_on.set()
    stream.close()
    assert response == streamed(name, tok, case)[0]
    assert threading.active_count() == threads
    assert counter.steps < 1400
    steps = counter.steps
    # the model is free for the next call
    settings = dict(max_length=case["max_length"], do_sample=False)
    assert model.chat(tok, case["query"], history_of(case["history"]), **settings)[0] == case["response"]
    assert counter.steps == steps


@pytest.mark.parametrize("name", ONE_OF_EACH_GENERATION)
def test_errors_of_the_generation_reach_the_caller(name, either_model, exact_tokenizer):
    model, tok, case = either_model(name), exact_tokenizer(name), chat_cases(name)[0]
    history = history_of(case["history"])
    before, threads = copy.deepcopy(history), threading.active_count()
    too_many = model.config.max_position_embeddings
    with pytest.raises(ContextLengthError):
        list(model.stream_chat(tok, case["query"], history, max_new_tokens=too_many))
    with pytest.raises(ContextLengthError):
        model.chat(tok, case["query"], history, max_new_tokens=too_many)
    assert history == before
    assert threading.active_count() == threads


@pytest.mark.parametrize("name", ONE_OF_EACH_GENERATION)
def test_sampling_and_beams(name, either_model, exact_tokenizer):
    model, tok, query = either_model(name), exact_tokenizer(name), "你好"
    torch.manual_seed(0)
    first = model.chat(tok, query, max_new_tokens=8)
    torch.manual_seed(0)
    assert model.chat(tok, query, max_new_tokens=8) == first
    torch.manual_seed(0)
    *_, last = model.stream_chat(tok, query, max_new_tokens=8)
    assert isinstance(last[0], str) and last[1]
    response, history = model.chat(tok, query, max_new_tokens=8, num_beams=3, do_sample=False)
    assert isinstance(response, str) and history


@pytest.mark.parametrize("name", ["chatglm-6b-3layer-untied", "chatglm2-6b"])
def test_streams_have_the_positions_of_the_first_generations(name, either_model, exact_tokenizer):
    model, tok, case = either_model(name), exact_tokenizer(name), chat_cases(name)[0]
    history, length = history_of(case["history"]), case["max_length"]
    positions = (length, False) if "chatglm-6b" in name else (None, length, False)
    turns = model.stream_chat(tok, case["query"], history, *positions)
    assert [response for response, _ in turns] == streamed(name, tok, case)


@pytest.mark.parametrize("name", ONE_OF_EACH_GENERATION)
def test_streams_show_whole_characters(name, either_model, exact_tokenizer):
    model, tok = either_model(name), exact_tokenizer(name)
    ids = [*tok.encode("好😀 龘", add_special_tokens=False), tok.eos_token_id]
    shown = [response for response, _ in model.stream_chat(tok, "你好", **says(ids, len(ids)))]
    assert len(ids) > 7 and shown[-1] == "好😀 龘" and "好😀" in shown
    assert not [text for text in shown if "\ufffd" in text]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("chatglm3-6b", "```python\ntool_call(city='北京')\n```"), ("glm-4-9b-chat", '{"city": "北京"}')],
)
def test_a_call_is_shown_as_it_grows(name, arguments, either_model, exact_tokenizer):
    """As a text until its name is known, then as it is, and read once it is complete."""
    model, tok = either_model(name), exact_tokenizer(name)
    ids = [*tok.encode(f"get_weather\n{arguments}", add_special_tokens=False), tok.turn_end_ids[1]]
    settings = says(ids, len(ids))
    shown = [response for response, _ in model.stream_chat(tok, "天气？", copy.deepcopy(TOOLS), **settings)]
    kinds = [tuple(response) if isinstance(response, dict) else "text" for response in shown]
    assert list(dict.fromkeys(kinds)) == ["text", ("name", "content"), ("name", "parameters")]
    assert shown[-1] == {"name": "get_weather", "parameters": {"city": "北京"}}
    growing = [response["content"] for response in shown if "content" in response]
    assert all(arguments.startswith(content.strip()) for content in growing)


@pytest.mark.parametrize("name", ONE_OF_EACH_GENERATION)
@pytest.mark.parametrize("arguments", [{"num_beams": 2}, {"num_return_sequences": 2}, {"streamer": object()}])
def test_a_stream_is_one_sequence(name, arguments, either_model, exact_tokenizer):
    history = []
    with pytest.raises(ValueError, match=f"`stream_chat` .*{next(iter(arguments))}.*`chat`"):
        next(either_model(name).stream_chat(exact_tokenizer(name), "你好", history, **arguments))
    assert history == []
    settings = dict(num_beams=1, num_return_sequences=1, do_sample=False, max_new_tokens=8)
    assert list(either_model(name).stream_chat(exact_tokenizer(name), "你好", history, **settings))


def test_a_stream_is_one_sequence_whatever_the_checkpoint_samples(either_model, exact_tokenizer, monkeypatch):
    model, tok = either_model("chatglm2-6b"), exact_tokenizer("chatglm2-6b")
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    monkeypatch.setattr(model.generation_config, "num_return_sequences", 2)
    ids = tok.encode("a b c", add_special_tokens=False)
    *_, (response, _) = model.stream_chat(tok, "hi", **{**says(ids, len(ids)), "do_sample": True})
    assert response == "a b c"


# Caches kept between turns -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fused_model(exported):
    return lambda name: OVChatGLMForCausalLM.from_pretrained(exported(name), attention="fused", ov_config=EXACT)


@pytest.fixture
def calls_of(monkeypatch):
    """Gives a list that grows by each call of an engine: how many tokens it held, and the ids of the others."""

    def watch(model):
        calls, run = [], FusedEngine.run

        def watched(engine, inputs):
            if engine is model.engine:
                calls.append((engine.past_length, inputs["input_ids"][0].tolist()))
            return run(engine, inputs)

        monkeypatch.setattr(FusedEngine, "run", watched)
        return calls

    return watch


def talk(model, tok, turns, history=None, stream=False):
    """The conversation after the queries of `turns`."""
    history = [] if history is None else history
    for query in turns:
        settings = dict(max_new_tokens=6, do_sample=False)
        if stream:
            *_, (_, history) = model.stream_chat(tok, query, history, **settings)
        else:
            _, history = model.chat(tok, query, history, **settings)
    return history


@pytest.mark.parametrize("stream", [False, True], ids=["chat", "stream_chat"])
@pytest.mark.parametrize("name", ["chatglm2-6b", "chatglm2-6b-ptuning-v2", "chatglm3-6b", "glm-4-9b-chat"])
def test_only_new_tokens_of_a_turn_are_computed(name, stream, fused_model, exact_model, exact_tokenizer, calls_of):
    model, tok = fused_model(name), exact_tokenizer(name)
    calls = calls_of(model)
    history = talk(model, tok, ["你好", "晚上睡不着应该怎么办"], stream=stream)
    first = len(tok.build_chat_input("你好")["input_ids"][0])
    (past, computed), *_ = [call for call in calls[1:] if len(call[1]) > 1]
    # the query and what is around it; the first prompt at least is in the cache
    assert calls[0][0] == 0 and past >= first - 1 and len(calls[0][1]) == first
    assert history == talk(exact_model(name), tok, ["你好", "晚上睡不着应该怎么办"], stream=stream)

    # another first answer: the caches go back to where it begins
    calls.clear()
    edited = copy.deepcopy(history)
    if isinstance(edited[0], tuple):
        edited[0] = (edited[0][0], "好")
    else:
        edited[1]["content"] = "好"
    found = talk(model, tok, ["谢谢"], copy.deepcopy(edited), stream)
    past, computed = calls[0]
    prompt = tok.build_chat_input("谢谢", history=edited)["input_ids"][0].tolist()
    assert first - 1 <= past <= first + 2 and computed == prompt[past:]  # the template may begin the answer
    assert found == talk(exact_model(name), tok, ["谢谢"], copy.deepcopy(edited), stream)


def test_other_calls_between_turns(fused_model, exact_model, exact_tokenizer, calls_of):
    name = "chatglm3-6b"
    model, tok = fused_model(name), exact_tokenizer(name)
    expected = talk(exact_model(name), tok, ["你好", "谢谢"])
    calls = calls_of(model)
    for between in (
        lambda: model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2),
        lambda: model.chat(tok, "hi", num_beams=2, do_sample=False, max_new_tokens=2),
        lambda: model.chat(tok, "hi", num_return_sequences=2, max_new_tokens=2),
        lambda: model.chat(tok, "hi", use_cache=False, max_new_tokens=2),
        model.clear_requests,
    ):
        history = talk(model, tok, ["你好"])
        between()
        model.compile()
        calls.clear()
        assert talk(model, tok, ["谢谢"], history) == expected
        assert calls[0][0] == 0


def test_the_conversation_of_a_streamed_answer_that_was_left(fused_model, exact_model, exact_tokenizer, calls_of):
    name = "glm-4-9b-chat"
    model, tok = fused_model(name), exact_tokenizer(name)
    stream = model.stream_chat(tok, "你好", [], do_sample=False, max_new_tokens=100, eos_token_id=-1)
    next(stream)
    _, history = next(stream)
    stream.close()
    calls = calls_of(model)
    found = talk(model, tok, ["谢谢"], copy.deepcopy(history))
    assert calls[0][0] >= len(tok.build_chat_input("你好")["input_ids"][0])
    assert found == talk(exact_model(name), tok, ["谢谢"], copy.deepcopy(history))


def test_the_first_generation_computes_every_prompt(fused_model, exact_model, exact_tokenizer, calls_of):
    """Its prompt tokens see all of the prompt; only the very same prompt can go on."""
    name = "chatglm-6b-3layer-untied"
    model, tok = fused_model(name), exact_tokenizer(name)
    calls = calls_of(model)
    assert talk(model, tok, ["你好", "谢谢"]) == talk(exact_model(name), tok, ["你好", "谢谢"])
    assert {past for past, computed in calls if len(computed) > 1} == {0}
    history = talk(model, tok, ["你好"])
    calls.clear()
    assert talk(model, tok, ["你好"]) == history
    assert calls[0] == (len(tok.build_chat_input("你好")["input_ids"][0]) - 1, [tok.bos_token_id])
