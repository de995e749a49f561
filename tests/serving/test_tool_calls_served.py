# SPDX-License-Identifier: Apache-2.0
"""Tool calls over HTTP: definitions in the prompt, calls in the answer, results in the next prompt.

A tiny model calls nothing by itself. Here the engine says what a trained model would say: it is this test's, and
everything around it is the server's.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import openai
import pytest
from fast_tokenizer import make_tokenizer
from serving_support import NAME, Server, options, run_server
from torch_models import config as torch_config
from transformers import GenerationConfig

from optimum_chatglm_ov import ChatGLMConfig
from optimum_chatglm_ov.serving.app import app_of
from optimum_chatglm_ov.serving.engine import EngineState, GeneratedToken
from optimum_chatglm_ov.serving.model import ServedModel
from optimum_chatglm_ov.serving.vocabulary import TokenBytes
from optimum_chatglm_ov.tokenization import load_tokenizer
from optimum_chatglm_ov.tokenization.chat_rules import chat_rules
from optimum_chatglm_ov.tokenization.template_chat import TemplateTokenizer


MODELS = Path(__file__).parents[1] / "data" / "models"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name}!",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name in ("get_weather", "get_time")
]
ASKED = [{"role": "user", "content": "北京天气？"}]
# What a model of the generation writes to say something and call twice, and to call what the prompt has begun.
SAYS = {
    "chatglm3": (
        "好的 <|assistant|> get_weather\n ```python\ntool_call(city='北京')\n```"
        "<|assistant|> get_time\n ```python\ntool_call(city='上海')\n```",
        "city='北京')\n```",
    ),
    "glm4": (
        '\n好的<|assistant|>get_weather\n{"city": "北京"}<|assistant|>get_time\n{"city": "上海"}',
        '{"city": "北京"}',
    ),
    "codegeex4": (
        '\n好的\n```json\n{"name": "get_weather", "arguments": {"city": "北京"}}\n```\n'
        '```json\n{"name": "get_time", "arguments": {"city": "上海"}}\n```',
        '{"city": "北京"}}\n```',
    ),
}
FOLDERS = {"chatglm3": "chatglm3-6b", "glm4": "glm-4-9b-chat", "codegeex4": "glm-4-9b-chat"}
TEMPLATE = "glm4 by template"  # the tokenizer of transformers that GLM-4-0414 has


class ScriptedEngine:
    """Says one text whatever it is asked, and remembers the prompts."""

    name, prompt_and_answer = "script", 100_000

    def __init__(self, tokenizer):
        self._tokenizer, self.text, self.requests, self.given = tokenizer, "", [], 0

    async def start(self) -> None:
        pass

    def check(self, request) -> None:
        pass

    async def generate(self, request):
        self.requests.append(request)
        self.given = 0
        ids = _ids(self._tokenizer, self.text)
        for token_id in ids:
            self.given += 1
            yield GeneratedToken(token_id)
        yield GeneratedToken(request.stop_ids[0], finish_reason="stop")

    def state(self) -> EngineState:
        return EngineState()

    def problem(self) -> None:
        return None

    async def close(self) -> None:
        pass


def _ids(tokenizer, text: str) -> list[int]:
    """Tokens of `text`, with the control token between messages."""
    ids = []
    for number, message in enumerate(text.split("<|assistant|>")):
        ids += [*([tokenizer.convert_tokens_to_ids("<|assistant|>")] if number else [])]
        ids += tokenizer.encode(message, add_special_tokens=False)
    return ids


def tokenizer_and_config(name):
    if name == TEMPLATE:
        return TemplateTokenizer(make_tokenizer(), GenerationConfig(eos_token_id=[1, 2])), torch_config("glm4")
    folder = MODELS / FOLDERS[name]
    tokenizer = load_tokenizer(folder)
    if name == "codegeex4":
        tokenizer = type(tokenizer).from_pretrained(folder, chatglm_generation=name)
    assert tokenizer.chatglm_generation == name
    return tokenizer, ChatGLMConfig.from_pretrained(folder)


@contextlib.contextmanager
def serving_script(tokenizer, config):
    """A server whose engine says what it is told."""
    engine = ScriptedEngine(tokenizer)
    rules = chat_rules(tokenizer, config)
    model = ServedModel(NAME, tokenizer, config, rules, engine, options(), TokenBytes(tokenizer))
    with run_server(app_of(model)) as running:
        yield running, engine, tokenizer, tokenizer.chatglm_generation


@pytest.fixture(scope="module", params=[*SAYS, TEMPLATE])
def scripted(request):
    """Such a server of each family."""
    with serving_script(*tokenizer_and_config(request.param)) as server:
        yield server


def ask(server: Server, messages=ASKED, **arguments):
    return server.client.chat.completions.create(model=NAME, messages=messages, tools=TOOLS, **arguments)


def streamed(chunks) -> tuple[str, list[list[str]], str]:
    """Text, calls (name and arguments) and finish reason of a stream."""
    text, calls, reason = "", [], ""
    for chunk in chunks:
        delta = chunk.choices[0].delta
        text += delta.content or ""
        for call in delta.tool_calls or ():
            if call.index == len(calls):
                assert call.id.startswith("call_") and call.type == "function"
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments
        reason = chunk.choices[0].finish_reason or reason
    return text, calls, reason


def test_calls_and_their_results(scripted):
    server, engine, tokenizer, generation = scripted
    engine.text = SAYS[generation][0]
    message = ask(server).choices[0].message
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]
    assert calls == [("get_weather", {"city": "北京"}), ("get_time", {"city": "上海"})]
    assert message.content == "好的" and len({call.id for call in message.tool_calls}) == 2
    text, calls, reason = streamed(ask(server, stream=True))
    assert (text, reason) == ("好的", "tool_calls")
    assert calls == [["get_weather", '{"city": "北京"}'], ["get_time", '{"city": "上海"}']]
    prompt = tokenizer.apply_chat_template(ASKED, tools=TOOLS, add_generation_prompt=True, return_dict=True)
    assert engine.requests[-1].input_ids == prompt["input_ids"]
    assert "get_weather!" in tokenizer.decode(engine.requests[-1].input_ids)

    results = [{"role": "tool", "tool_call_id": call.id, "content": "晴"} for call in message.tool_calls]
    messages = [*ASKED, message.model_dump(exclude_none=True), *results]
    engine.text = "\n晴天"
    assert ask(server, messages).choices[0].message.content == "晴天"
    prompt = tokenizer.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=True, return_dict=True)
    ids = engine.requests[-1].input_ids
    assert ids == prompt["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|observation|>")) == 2


def test_choice_of_tools(scripted):
    server, engine, tokenizer, generation = scripted
    whole, arguments = SAYS[generation]
    engine.text = whole
    without = ask(server, tool_choice="none").choices[0]
    assert without.message.tool_calls is None and without.finish_reason == "stop"
    assert "get_weather!" not in tokenizer.decode(engine.requests[-1].input_ids)

    engine.text = arguments
    named = {"type": "function", "function": {"name": "get_weather"}}
    forced = ask(server, tool_choice=named).choices[0]
    assert [call.function.arguments for call in forced.message.tool_calls] == ['{"city": "北京"}']
    assert streamed(ask(server, tool_choice=named, stream=True))[1] == [["get_weather", '{"city": "北京"}']]
    prompt = tokenizer.decode(engine.requests[-1].input_ids)
    end = {"chatglm3": "tool_call(", "glm4": "get_weather\n", "codegeex4": '"arguments": '}[generation]
    assert prompt.endswith(end) or prompt.endswith(end.strip()), prompt[-40:]

    unknown = {"type": "function", "function": {"name": "no_such"}}
    with pytest.raises(openai.BadRequestError, match="not among `tools`"):
        ask(server, tool_choice=unknown)


def test_one_call_alone(scripted):
    server, engine, _, generation = scripted
    engine.text = SAYS[generation][0]
    calls = ask(server, parallel_tool_calls=False).choices[0].message.tool_calls
    assert [call.function.name for call in calls] == ["get_weather"]
    tokens_of_one = engine.given
    text, calls, reason = streamed(ask(server, parallel_tool_calls=False, stream=True))
    assert (text, reason) == ("好的", "tool_calls") and [name for name, _ in calls] == ["get_weather"]
    ask(server)
    assert tokens_of_one < engine.given  # the computation was stopped


def test_malformed_calls_are_text(scripted):
    server, engine, _, generation = scripted
    for text in (
        "get_weather\n{oops",
        "get_weather\n```python\ntool_call(city=open('x'))\n```",
        '```json\n{"name": 1}\n```',
    ):
        engine.text = text
        choice = ask(server).choices[0]
        assert choice.message.content == text and choice.finish_reason == "stop" and not choice.message.tool_calls
        assert streamed(ask(server, stream=True))[1] == []


def test_odd_tools_are_refused_or_written_down(scripted):
    server, engine, _, _ = scripted
    engine.text = "\nok"
    for function in (
        {"name": "f"},
        {"name": "查询"},
        {"name": "f", "parameters": {"type": None, "x": [1, {"y": None}]}},
    ):
        with contextlib.suppress(openai.BadRequestError):
            tools = [{"type": "function", "function": function}]
            server.client.chat.completions.create(model=NAME, messages=ASKED, tools=tools)
    for function in ({"name": "a b"}, {"name": "a\nb"}, {}, {"name": "x" * 200}):
        with pytest.raises(openai.BadRequestError):
            tools = [{"type": "function", "function": function}]
            server.client.chat.completions.create(model=NAME, messages=ASKED, tools=tools)


@pytest.mark.parametrize("begun", [False, True], ids=["by the answer", "by the prompt"])
def test_thoughts_are_given_apart(begun):
    """Of GLM-Z1, some of whose templates begin the thought in the prompt."""
    tokenizer, config = tokenizer_and_config(TEMPLATE)
    if begun:
        tokenizer.tokenizer.chat_template += "{%- if add_generation_prompt %}\n<think>\n{%- endif -%}"
    with serving_script(tokenizer, config) as (server, engine, _, _):
        engine.text = ("" if begun else "\n<think>") + "long 你<b></think>\nshort </think>"
        message = server.chat("hi").choices[0].message
        assert (message.reasoning_content, message.content) == ("long 你<b>", "short </think>")
        deltas = [chunk.choices[0].delta for chunk in server.chat("hi", stream=True)]
        thoughts = [delta.reasoning_content for delta in deltas if getattr(delta, "reasoning_content", None)]
        assert "".join(thoughts) == "long 你<b>" and len(thoughts) > 3
        assert "".join(delta.content or "" for delta in deltas) == "short </think>"
        engine.text = "never ends" if begun else "\n<thin air"
        message = server.chat("hi").choices[0].message
        found = getattr(message, "reasoning_content", ""), message.content
        assert found == (("never ends", "") if begun else ("", "<thin air"))
