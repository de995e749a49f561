# SPDX-License-Identifier: Apache-2.0
"""Calls of tools in answers, whole and cut into pieces in every way."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from optimum_chatglm_ov.tokenization.tool_calls import (
    CallArguments,
    CallBegin,
    CallBroken,
    ParsedAnswer,
    ParsedCall,
    Text,
    answer_parser,
    fold,
    read_answer,
)


TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("get_weather", "get_weather_report", "查询")
]
PYTHON = "```python\ntool_call({})\n```"


def block(name: str, arguments: str) -> str:
    return f'```json\n{{"name": "{name}", "arguments": {arguments}}}\n```'


def call(name: str, **arguments: object) -> ParsedCall:
    return ParsedCall(name, json.dumps(arguments, ensure_ascii=False))


WEATHER = call("get_weather", city="北京", days=3)
ODD = {"text": 'a"b\\c\n(d], #é', "list": [1, -2.5, {"x": None}], "flag": True, "nothing": None}
# Generation, what the model wrote, what it says.
ANSWERS = {
    "chatglm3 call": (
        "chatglm3",
        " get_weather\n " + PYTHON.format("city='北京', days=3"),
        ParsedAnswer("", (WEATHER,)),
    ),
    "chatglm3 literals": (
        "chatglm3",
        "查询\n " + PYTHON.format(", ".join(f"{key}={value!r}" for key, value in ODD.items())),
        ParsedAnswer("", (call("查询", **ODD),)),
    ),
    "chatglm3 quotes": (
        "chatglm3",
        "查询\n" + PYTHON.format("a='''it's''', b=\"\", c=(1, 2), d='x' 'y',"),
        ParsedAnswer("", (call("查询", a="it's", b="", c=[1, 2], d="xy"),)),
    ),
    "chatglm3 no arguments, no fence": ("chatglm3", "查询\n```\ntool_call( )", ParsedAnswer("", (call("查询"),))),
    "chatglm3 text, then two calls": (
        "chatglm3",
        "\n 我来查。 <|assistant|> get_weather\n "
        + PYTHON.format("city='北京', days=3")
        + "<|assistant|>get_weather_report\n"
        + PYTHON.format(""),
        ParsedAnswer("我来查。", (WEATHER, call("get_weather_report"))),
    ),
    "glm4 call": ("glm4", 'get_weather\n{"city": "北京", "days": 3}', ParsedAnswer("", (WEATHER,))),
    "glm4 literals": (
        "glm4",
        "get_weather_report\n " + json.dumps(ODD, ensure_ascii=False) + "\n",
        ParsedAnswer("", (call("get_weather_report", **ODD),)),
    ),
    "glm4 escapes": (
        "glm4",
        "查询\n" + json.dumps({"e": "北\t\ud83d\ude00"}),
        ParsedAnswer("", (ParsedCall("查询", json.dumps({"e": "北\t\ud83d\ude00"})),)),
    ),
    "glm4 text, then two calls": (
        "glm4",
        '\n好的。<|assistant|> get_weather\n{"city": "北京", "days": 3}<|assistant|> 查询\n{}',
        ParsedAnswer("好的。", (WEATHER, call("查询"))),
    ),
    "glm4 text": ("glm4", "\nget_weather 是工具\n{}", ParsedAnswer("get_weather 是工具\n{}")),
    "glm4 two texts": ("glm4", "\n一 <|assistant|>\n 二[[训练时间]]\n", ParsedAnswer("一\n二2023年")),
    "codegeex4 call": (
        "codegeex4",
        "\n" + block("get_weather", '{"city": "北京", "days": 3}'),
        ParsedAnswer("", (WEATHER,)),
    ),
    "codegeex4 text and two calls": (
        "codegeex4",
        "查一下：\n" + block("get_weather", '{"city": "北京", "days": 3}') + "\n" + block("查询", "{}"),
        ParsedAnswer("查一下：", (WEATHER, call("查询"))),
    ),
    "codegeex4 other blocks": (
        "codegeex4",
        '```json\n{"name": "x"}\n```\n```python\nf()\n```',
        ParsedAnswer('```json\n{"name": "x"}\n```\n```python\nf()\n```'),
    ),
}
MALFORMED = {
    "chatglm3": [
        "get_weather\n" + PYTHON.format(arguments)
        for arguments in (
            "city=__import__('os').getcwd()",
            "city=f'{1}'",
            "'北京'",
            "**{'a': 1}",
            "a=1, a=2",
            "a=b'x'",
            "a={1, 2}",
            "a=1e999",
            "a=1 # )",
            "a=(1]",
            "a=",
            "a=1,, b=2",
            "a='\n'",
        )
    ]
    + ["get_weather\n```python\ntool_call(city='北", "get_weather\n```python\nother(1)\n```", "get_weather"],
    "glm4": [
        "get_weather\n" + arguments
        for arguments in (
            "[1]",
            '"x"',
            '{"a": nope}',
            '{"a": 01}',
            '{"a": 1.}',
            '{"a": "\\x"}',
            '{"a": "\n"}',
            '{"a" 1}',
            '{"a": 1,}',
            '{"a": [1}',
            "{'a': 1}",
            '{"a": NaN}',
            '{"a": ' + "[" * 100,
            '{"a": "北',
            "",
        )
    ]
    + ["unknown\n{}"],
    "codegeex4": [
        block("unknown", "{}"),
        block("get_weather", "[]"),
        block("get_weather", '{"a": }'),
        '```json\n{"name": "get_weather", "arguments": {"a": 1}, "b": 2}\n```',
        '```json\n{"name": "get_weather", "argu',
        "```json\n",
    ],
}


def stream(generation: str, pieces: list[str]) -> list[object]:
    """All events, with neighbouring texts, and pieces of arguments, put together."""
    parser = answer_parser(generation, TOOLS)
    events: list[object] = []
    for event in [*itertools.chain.from_iterable(parser.feed(piece) for piece in pieces), *parser.finish()]:
        last = events[-1] if events else None
        if isinstance(event, Text) and isinstance(last, Text):
            events[-1] = Text(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments) and last.index == event.index:
            events[-1] = CallArguments(event.index, last.text + event.text)
        else:
            events.append(event)
    return events


def cuts(text: str) -> list[list[str]]:
    """Single characters; every way to make two and three pieces of `text`; and a hundred others."""
    middles = range(1, len(text))
    ways = [(i,) for i in middles] + list(itertools.combinations(middles, 2))[:: 1 if len(text) < 40 else 11]
    rng = random.Random(len(text))
    ways += [sorted(rng.sample(middles, rng.randrange(1, len(text)))) for _ in range(100)] if len(text) > 2 else []
    return [list(text)] + [[text[a:b] for a, b in zip((0, *way), (*way, len(text)))] for way in ways]


@pytest.mark.parametrize("case", ANSWERS)
def test_answers_and_all_their_pieces(case):
    generation, text, expected = ANSWERS[case]
    assert read_answer(generation, text, TOOLS) == expected
    whole = stream(generation, [text])
    for pieces in cuts(text):
        assert stream(generation, pieces) == whole, pieces


@pytest.mark.parametrize("length", [1, 2, 7])
def test_every_cut_of_tokens(length):
    """All 2^n ways to join the first tokens of a call into pieces."""
    for generation, text in (
        ("glm4", 'get_weather\n{"a":[1,"b\\n"]}<|assistant|>\nok'),
        ("chatglm3", "get_weather\n```python\ntool_call(a='b,)',c=1)\n```"),
        ("codegeex4", "x" + block("get_weather", '{"a":1}')),
    ):
        size = -(-len(text) // 12)
        tokens = [text[i : i + size] for i in range(0, len(text), size)]
        if length == 1:
            tokens = list(text[:12]) + [text[12:]]
        elif length == 2:
            tokens = [text[:-12]] + list(text[-12:])
        whole = stream(generation, [text])
        for choice in itertools.product((False, True), repeat=len(tokens) - 1):
            pieces = [tokens[0]]
            for is_cut, token in zip(choice, tokens[1:]):
                pieces = [*pieces, token] if is_cut else [*pieces[:-1], pieces[-1] + token]
            assert stream(generation, pieces) == whole, pieces


@pytest.mark.parametrize("generation", MALFORMED)
def test_malformed_calls_are_text(generation):
    for text in MALFORMED[generation]:
        answer = read_answer(generation, text, TOOLS)
        assert answer == ParsedAnswer(text.strip()) or answer == ParsedAnswer(text), text
        whole = stream(generation, [text])
        for pieces in cuts(text):
            assert stream(generation, pieces) == whole, pieces
        # whoever reads the stream gets every character of it, the call's head aside
        given = "".join(event.text for event in whole if isinstance(event, Text | CallArguments))
        if generation != "chatglm3":
            broken = next((event for event in whole if isinstance(event, CallBroken)), None)
            assert text.strip().endswith(given[-20:].strip()) and (broken is None or given.startswith("{"))


@pytest.mark.parametrize(
    ("generation", "pieces", "arguments"),
    [
        (
            "glm4",
            ["get_weather", "\n{", '"city": "北', '京", "n": 1', "2", "}"],
            ['{"city": "北', '京", "n": ', "12}"],
        ),
        ("chatglm3", ["get_weather\n```python\ntool_call(", "a='x", "', b=2", ")\n```"], ['{"a": "x"', ', "b": 2}']),
        ("codegeex4", ['```json\n{"name": "get_weather", "arguments": ', '{"a', '": 1}', "}\n```"], ['{"a', '": 1}']),
    ],
)
def test_arguments_stream_as_they_grow(generation, pieces, arguments):
    parser = answer_parser(generation, TOOLS)
    events = [*itertools.chain.from_iterable(map(parser.feed, pieces)), *parser.finish()]
    assert [event.text for event in events if isinstance(event, CallArguments)] == arguments
    assert [event.name for event in events if isinstance(event, CallBegin)] == ["get_weather"]


@pytest.mark.parametrize(
    ("generation", "pieces", "given"),
    [
        ("glm4", ["get", "_weath", "er is", " a tool"], ["", "", "get_weather is", " a tool"]),
        ("glm4", ["Go", " on"], ["Go", " on"]),
        ("chatglm3", ["\n g", "et"], ["g", "et"]),
        ("codegeex4", ["a `", "``", "python"], ["a", " ``", "`python"][:1] + ["", " ```python"]),
    ],
)
def test_text_is_held_back_only_while_it_may_be_a_call(generation, pieces, given):
    parser = answer_parser(generation, TOOLS)
    assert ["".join(event.text for event in parser.feed(piece)) for piece in pieces] == given


@pytest.mark.parametrize(
    ("generation", "text"),
    [
        ("glm4", '{"city": "北京", "days": 3}'),
        ("chatglm3", "city='北京', days=3)\n```"),
        ("codegeex4", '{"city": "北京", "days": 3}}\n```'),
    ],
)
def test_a_call_that_the_prompt_has_begun(generation, text):
    assert read_answer(generation, text, TOOLS, forced="get_weather") == ParsedAnswer("", (WEATHER,))
    assert read_answer(generation, "北京", TOOLS, forced="get_weather") == ParsedAnswer("北京")


def test_without_tools_everything_is_text():
    for generation, text, _ in ANSWERS.values():
        assert read_answer(generation, text).calls == ()
    assert fold([]) == ParsedAnswer("")
    with pytest.raises(ValueError, match="'chatglm2' calls no tools; expected one of chatglm3"):
        answer_parser("chatglm2", TOOLS)
