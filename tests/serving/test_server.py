# SPDX-License-Identifier: Apache-2.0
"""The server, asked by OpenAI's own client."""

from __future__ import annotations

import concurrent.futures
import json
import re

import httpx
import openai
import pytest
from conftest import DATA
from serving_support import NAME, engine_options, options, serving

from optimum_chatglm_ov import OVChatGLMForCausalLM, export_model
from optimum_chatglm_ov.assets import TINY_CHATGLM3
from optimum_chatglm_ov.runtime.engine import FusedEngine
from optimum_chatglm_ov.serving.app import create_app
from optimum_chatglm_ov.tokenization import load_tokenizer


pytest_plugins = ["serving_support"]

QUESTIONS = ("你好", "你是谁？", "Hello", "讲个笑话", "1+1=", "天气怎么样？", "OpenVINO 是什么？", "再见")


@pytest.fixture(scope="module")
def expected(tiny):
    """What the model class answers."""
    model = OVChatGLMForCausalLM.from_pretrained(tiny, attention="sdpa", ov_config={"INFERENCE_PRECISION_HINT": "f32"})
    tokenizer = load_tokenizer(tiny)
    return {text: model.chat(tokenizer, text, do_sample=False)[0] for text in QUESTIONS}


@pytest.fixture(scope="module", params=["batched", "queue"])
def either(request, tiny, server):
    """A server with either engine."""
    if request.param == "batched":
        yield server
        return
    with serving(tiny, options(), engine_options(kind="queue")) as running:
        yield running


def test_answers_are_those_of_chat(either, expected):
    for text, answer in expected.items():
        response = either.chat(text)
        assert response.choices[0].message.content == answer
        assert response.choices[0].finish_reason == "stop" and response.model == NAME
        usage = response.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and usage.completion_tokens > 1


def test_native_linear_layers_answer_many_at_once(tmp_path, expected):
    folder = export_model(TINY_CHATGLM3, tmp_path / "ir", weight_format="int8", linear="native")
    with serving(folder, options(), engine_options(kind="batched")) as running:
        with concurrent.futures.ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(lambda text: running.chat(text).choices[0].message.content, expected))
    assert answers == list(expected.values())


def test_streams_are_the_same_answers(either, expected):
    for text, answer in list(expected.items())[:3]:
        chunks = list(either.chat(text, stream=True, stream_options={"include_usage": True}))
        *parts, usage = chunks
        assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == answer
        assert parts[0].choices[0].delta.role == "assistant" and len(parts) > 4
        assert [chunk.choices[0].finish_reason for chunk in parts if chunk.choices[0].finish_reason] == ["stop"]
        assert usage.choices == [] and usage.usage.prompt_tokens == either.chat(text).usage.prompt_tokens
    body = {"model": NAME, "messages": [{"role": "user", "content": "你好"}], "stream": True}
    lines = httpx.post(f"{either.url}/v1/chat/completions", json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and "usage" not in json.loads(lines[0].removeprefix("data: "))


def test_answers_at_once_are_those_computed_alone(either, expected):
    seeds = range(4)
    alone = {seed: either.chat("你好", temperature=8.0, top_p=1.0, seed=seed, max_tokens=12) for seed in seeds}
    assert len({response.choices[0].message.content for response in alone.values()}) > 1
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        greedy = [(text, pool.submit(either.chat, text)) for text in QUESTIONS * 3]
        sampled = [
            (seed, pool.submit(either.chat, "你好", temperature=8.0, top_p=1.0, seed=seed, max_tokens=12))
            for seed in (*seeds, *seeds)
        ]
        for text, future in greedy:
            assert future.result().choices[0].message.content == expected[text]
        for seed, future in sampled:
            assert future.result().choices[0].message == alone[seed].choices[0].message


def test_several_answers(either):
    one = [either.chat("你好", temperature=8.0, seed=seed, max_tokens=6).choices[0].message.content for seed in (3, 4)]
    both = either.chat("你好", temperature=8.0, seed=3, n=2, max_tokens=6)
    assert [choice.message.content for choice in both.choices] == one
    texts = ["", ""]
    for chunk in either.chat("你好", temperature=8.0, seed=3, n=2, max_tokens=6, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == one and both.usage.prompt_tokens == either.chat("你好").usage.prompt_tokens


def test_stop_and_length(either, expected):
    whole = expected["你好"]
    stop = whole[5:8]
    response = either.chat("你好", stop=[stop, "nowhere"])
    assert response.choices[0].message.content == whole[: whole.index(stop)].strip()
    assert response.choices[0].finish_reason == "stop"
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in either.chat("你好", stop=stop, stream=True))
    assert streamed.strip() == response.choices[0].message.content
    short = either.chat("你好", max_completion_tokens=3)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 3


def test_logprobs(either, expected):
    choice = either.chat("你好", logprobs=True).choices[0]
    entries = choice.logprobs.content
    assert bytes(sum((entry.bytes for entry in entries), [])).decode().strip() == expected["你好"]
    assert all(-1 < entry.logprob <= 0 for entry in entries)
    streamed = [
        entry
        for chunk in either.chat("你好", logprobs=True, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.bytes for entry in streamed] == [entry.bytes for entry in entries]


def test_completions(either, tiny):
    tokenizer = load_tokenizer(tiny)
    texts = ["你好", "世界"]
    response = either.client.completions.create(model=NAME, prompt=texts, max_tokens=4, logprobs=1)
    assert [choice.index for choice in response.choices] == [0, 1]
    by_ids = either.client.completions.create(model=NAME, prompt=tokenizer(texts[0])["input_ids"], max_tokens=4)
    assert by_ids.choices[0].text == response.choices[0].text and by_ids.choices[0].finish_reason == "length"
    assert len(response.choices[0].logprobs.token_logprobs) == 4
    stream = either.client.completions.create(model=NAME, prompt=texts[0], max_tokens=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == response.choices[0].text


def test_json_by_schema(server):
    colours = {"name": "colour", "schema": {"enum": ["红", "绿"]}}
    for seed in range(3):
        response = server.chat(
            "你好", temperature=2.0, seed=seed, response_format={"type": "json_schema", "json_schema": colours}
        )
        assert json.loads(response.choices[0].message.content) in ("红", "绿")
        assert response.choices[0].finish_reason == "stop"


def test_facts(either, tiny):
    assert [model.id for model in either.client.models.list()] == [NAME] and either.client.models.retrieve(
        NAME
    ).id == NAME
    health = httpx.get(f"{either.url}/health").json()
    assert health["status"] == "ok" and health["engine"] == either.engine.name and health["running"] == 0
    messages = [{"role": "user", "content": "你好"}]
    tokens = httpx.post(f"{either.url}/tokenize", json={"messages": messages}).json()
    assert tokens["tokens"] == load_tokenizer(tiny).build_chat_input("你好")["input_ids"][0].tolist()
    assert tokens["count"] == either.chat("你好").usage.prompt_tokens
    metrics = httpx.get(f"{either.url}/metrics").text
    values = {name: float(value) for name, value in re.findall(r"^(chatglm_\w+) ([\d.e+-]+)$", metrics, re.MULTILINE)}
    assert values["chatglm_requests_running"] == values["chatglm_requests_waiting"] == 0
    assert values["chatglm_generated_tokens_total"] == (
        values["chatglm_first_token_seconds_count"] + values["chatglm_next_token_seconds_count"]
    )
    assert "chatglm_cache_use_ratio" in values and 'chatglm_requests_total{finish_reason="stop"}' in metrics


@pytest.mark.parametrize(
    ("arguments", "status", "parameter", "message"),
    [
        ({"model": "gpt"}, 404, "model", "There is no model 'gpt' here; expected 'tiny'"),
        ({"messages": []}, 400, "messages", "at least 1 item"),
        ({"messages": [{"role": "pope", "content": "x"}]}, 400, "messages", "has no role 'pope'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "reads text alone"),
        ({"max_tokens": 10**6}, 400, "messages", "more than the"),
        ({"messages": [{"role": "user", "content": "啊" * 20000}]}, 400, "messages", "more than the"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"extra_body": {"repetition_penalty": 1e-300}}, 400, "repetition_penalty", "greater than or equal to 0.0001"),
        ({"top_logprobs": 3}, 400, "top_logprobs", "not supported"),
        ({"logit_bias": {"1": 1}}, 400, "logit_bias", "not supported"),
        ({"tool_choice": "required"}, 400, "tool_choice", "not supported"),
        ({"functions": [{}]}, 400, "functions", "give `tools`"),
        ({"stop": [""]}, 400, "stop", "not empty"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_openai_s_form(server, arguments, status, parameter, message, stream):
    body = {"model": NAME, "messages": [{"role": "user", "content": "你好"}], "stream": stream, **arguments}
    with pytest.raises(openai.APIStatusError) as failure:
        server.client.chat.completions.create(**body)
    error = failure.value
    assert (error.status_code, error.param) == (status, parameter) and message in error.message
    assert set(error.body) == {"message", "type", "param", "code"}


def test_unknown_fields_are_ignored_and_unknown_paths_refused(server):
    assert server.chat("你好", extra_body={"no_such_field": 1}, metadata={"a": "b"}, store=False).choices
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405
    for body in (b"", b"{", b"[]", b'{"model": "\\ud800"}', b"\xff", b"[" * 100_000):
        headers = {"Content-Type": "application/json"}
        response = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
        assert response.status_code in (400, 404) and "error" in response.json()


def test_models_that_cannot_be_batched(tmp_path, server):
    """ChatGLM-6B has an engine of its own, whose answers are those of `chat()`."""
    folder = export_model(DATA / "models" / "chatglm-6b-3layer-untied", tmp_path / "ir")
    with serving(folder, options(), engine_options()) as running:
        assert "one request at a time" in httpx.get(f"{running.url}/health").json()["engine"]
        model = OVChatGLMForCausalLM.from_pretrained(folder, ov_config=running.engine._options.ov_config)
        history = [("hello", "hi")]
        said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
        answer, _ = model.chat(load_tokenizer(folder), "world", history, do_sample=False, max_new_tokens=12)
        messages = [*said, {"role": "user", "content": "world"}]
        for stream in (False, True):
            found = running.client.chat.completions.create(
                model=NAME, messages=messages, max_tokens=12, temperature=0, stream=stream
            )
            text = (
                "".join(chunk.choices[0].delta.content or "" for chunk in found)
                if stream
                else found.choices[0].message.content
            )
            assert text == answer
        with pytest.raises(openai.BadRequestError, match="needs openvino-genai"):
            running.chat("x", response_format={"type": "json_object"})
        with pytest.raises(openai.BadRequestError, match="was not trained to call"):
            running.chat("x", tools=[{"type": "function", "function": {"name": "f"}}])


def test_the_queue_computes_no_beginning_twice_and_drafts(tiny, tmp_path, server, monkeypatch):
    text, computed, run = "What is OpenVINO? " + "请详细说明。" * 40, [], FusedEngine.run

    def counted(engine, inputs):
        computed.append(inputs["input_ids"].shape[1])
        return run(engine, inputs)

    monkeypatch.setattr(FusedEngine, "run", counted)
    asked = {"temperature": 0, "max_tokens": 8}
    expected = server.chat(text, **asked).choices[0].message.content
    with serving(tiny, options(), engine_options(kind="queue")) as queue:
        probable = queue.chat(text, logprobs=True, **asked).choices[0].logprobs.content
    for most in (1000, 64):  # the second server has the folder of the first
        with serving(tiny, options(), engine_options(prefix_cache=str(tmp_path), prompt_lookup=True)) as queue:
            assert "one request at a time" in queue.engine.name
            for longest in (most, 11):  # drafts of 10 tokens
                computed.clear()
                assert queue.chat(text, **asked).choices[0].message.content == expected
                assert computed[0] <= longest
            found = queue.chat(text, logprobs=True, **asked).choices[0].logprobs.content
            assert [entry.token for entry in found] == [entry.token for entry in probable]
            assert [entry.logprob for entry in found] == pytest.approx([e.logprob for e in probable], abs=0.1)
    with pytest.raises(ValueError, match="a prefix cache in a folder is this package's own"):
        create_app(tiny, options(), engine_options(kind="batched", prefix_cache=str(tmp_path)))
