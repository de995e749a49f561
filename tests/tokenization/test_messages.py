# SPDX-License-Identifier: Apache-2.0
"""Conversations as people have them: OpenAI's messages and calls, pairs, and CodeGeeX4's functions."""

import copy
import json

import pytest
from test_chat import Recorder, rules
from tokenization_cases import CHATGLM3, GLM4, NAMES, ROUNDS_OF_TEXT, folder, tokenizer
from transformers import AutoTokenizer

from optimum_chatglm_ov import ToolCallError
from optimum_chatglm_ov.chat import _continuation, chat_rules
from optimum_chatglm_ov.configuration import ChatGLMConfig


WITH_TOOLS = ["models.chatglm3-6b", "models.glm-4-9b-chat"]
FUNCTION = {
    "name": "get_weather",
    "description": "查询天气",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOL = {"type": "function", "function": FUNCTION}
QUESTION = {"role": "user", "content": "天气？"}


@pytest.fixture(scope="module")
def codegeex4():
    return AutoTokenizer.from_pretrained(folder("tokenizers.glm-4-9b-chat"), chatglm_generation="codegeex4")


def text_of(tok, messages, **arguments):
    return tok.apply_chat_template(messages, tokenize=False, **arguments)


def call(arguments, **changes):
    return {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}, **changes}


def assistant(*calls, **changes):
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **changes}


# Calls -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_TOOLS)
@pytest.mark.parametrize(
    "message",
    [
        assistant(call('{"city": "北京", "days": [1, null, true]}')),
        assistant(call({"city": "北京", "days": [1, None, True]}), content=""),
        assistant(call('{"city": "北京", "days": [1, null, true]}'), content=[], refusal=None, audio=None),
        assistant({"name": "get_weather", "arguments": {"city": "北京", "days": [1, None, True]}}),
        {
            key: value
            for key, value in assistant(call('{"city":"北京","days":[1,null,true]}')).items()
            if key != "content"
        },
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "get_weather", "arguments": '{"city": "北京", "days": [1, null, true]}'},
        },
    ],
)
def test_every_form_of_a_call_is_the_same(name, message):
    tok = tokenizer(name)
    content = {
        "models.chatglm3-6b": "```python\ntool_call(city='北京', days=[1, None, True])\n```",
        "models.glm-4-9b-chat": '{"city": "北京", "days": [1, null, true]}',
    }[name]
    own = [QUESTION, {"role": "assistant", "metadata": "get_weather", "content": content}]
    expected = tok.build_chat_input("22", own, "observation")["input_ids"].tolist()
    for role in ("tool", "function", "observation"):
        result = {
            "role": role,
            "tool_call_id": "1",
            "name": "get_weather",
            "content": [{"type": "text", "text": "22"}],
        }
        messages = [QUESTION, message, result]
        before = copy.deepcopy(messages)
        ids = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert [ids] == expected
        assert messages == before
    assert tok.build_chat_input("22", [QUESTION, message], "observation")["input_ids"].tolist() == expected
    assert tok.build_chat_input("22", [QUESTION, message], "tool")["input_ids"].tolist() == expected


@pytest.mark.parametrize("name", WITH_TOOLS)
@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_a_call_without_arguments(name, arguments):
    text = text_of(tokenizer(name), [QUESTION, assistant(call(arguments))])
    assert text.endswith("tool_call()\n```" if "chatglm3" in name else "get_weather\n{}")


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_text_and_several_calls_in_one_message(name):
    text = text_of(tokenizer(name), [QUESTION, assistant(call({"city": "a"}), call({"city": "b"}), content="好")])
    assert text.count("<|assistant|>") == 3
    assert text.index("好") < text.index("a'" if "chatglm3" in name else '"a"')


@pytest.mark.parametrize("name", WITH_TOOLS)
@pytest.mark.parametrize("empty", [{"tools": None}, {"metadata": None}, {"tool_calls": None, "function_call": None}])
def test_keys_that_hold_nothing(name, empty):
    tok = tokenizer(name)
    messages = [{"role": "system", "content": "Be brief.", **empty}, QUESTION]
    plain = [{"role": "system", "content": "Be brief."}, QUESTION]
    assert text_of(tok, messages) == text_of(tok, plain)
    assert text_of(tok, messages, tools=None) == text_of(tok, plain)
    ids = tok.build_chat_input("好", messages)["input_ids"]
    assert ids.tolist() == tok.build_chat_input("好", plain)["input_ids"].tolist()


@pytest.mark.parametrize("content", [None, [], [{"type": "text", "text": ""}], ...])
@pytest.mark.parametrize("name", NAMES)
def test_content_that_is_not_there(name, content):
    message = {"role": "assistant"} if content is ... else {"role": "assistant", "content": content}
    messages = [QUESTION, message, QUESTION]
    expected = [QUESTION, {"role": "assistant", "content": ""}, QUESTION]
    assert text_of(tokenizer(name), messages) == text_of(tokenizer(name), expected)


@pytest.mark.parametrize("tool", [FUNCTION, TOOL])
@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_function_with_and_without_its_type(name, tool):
    tok = tokenizer(name)
    expected = text_of(tok, [QUESTION], tools=[TOOL])
    assert '"name": "get_weather"' in expected
    assert text_of(tok, [QUESTION], tools=[tool]) == expected


BAD_MESSAGES = [
    ([QUESTION, {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}],
     r"messages\[1\]: `content\[1\]` is of type 'image_url'"),
    ([QUESTION, {"role": "user", "content": {"text": "a"}}], r"messages\[1\]: `content` is a dict"),
    ([QUESTION, {"role": "user", "content": 5}], r"messages\[1\]: `content` is a int"),
    ([QUESTION, {"content": "a"}], r"messages\[1\] is .*expected a dictionary with `role`"),
    ([QUESTION, "hi"], r"messages\[1\] is 'hi'"),
    ([QUESTION, {"role": "narrator", "content": "a"}], r"messages\[1\]: \w+ has no role 'narrator'"),
    ([QUESTION, assistant(call("{city: 1}"))], r"messages\[1\]: `tool_calls\[0\].function.arguments` .*not JSON"),
    ([QUESTION, assistant(call({}), call("[1]"))], r"messages\[1\]: `tool_calls\[1\].function.arguments` is \[1\]"),
    ([QUESTION, assistant(call({}, type="custom"))], r"messages\[1\]: `tool_calls\[0\].type` is 'custom'"),
    ([QUESTION, assistant({"function": {"name": ""}})], r"messages\[1\]: `tool_calls\[0\].function.name` is ''"),
    ([QUESTION, assistant("f")], r"messages\[1\]: `tool_calls\[0\]` is a str"),
    ([{"role": "assistant", "tool_calls": {"name": "f"}}], r"messages\[0\]: `tool_calls` is a dict"),
    ([{**QUESTION, "tool_calls": [call({})]}], r"messages\[0\]: `tool_calls` in a message of role 'user'"),
    ([{"role": "assistant", "function_call": {"name": "f", "arguments": "x"}}],
     r"messages\[0\]: `function_call.arguments` is 'x'"),
    ([{"role": "assistant", "function_call": {"name": "f\ng", "arguments": "{}"}}],
     r"messages\[0\]: `function_call.name` is 'f\\ng'"),
    ([QUESTION, {**QUESTION, "metadata": 5}], r"messages\[1\]: `metadata` is 5"),
    ([{"role": "system", "content": "", "tools": "f"}], r"messages\[0\]: `tools` is a str; expected a list"),
    ([{"role": "system", "content": "", "tools": TOOL}], r"messages\[0\]: `tools` is a dict; expected a list"),
    ([{"role": "system", "content": "", "tools": [TOOL, 5]}], r"messages\[0\]: `tools\[1\]` is 5"),
    ([{"role": "system", "content": "", "tools": [{"type": "function"}]}],
     r"messages\[0\]: `tools\[0\]` is .*expected a function with its `name`"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "message"), BAD_MESSAGES, ids=range(len(BAD_MESSAGES)))
@pytest.mark.parametrize("name", [*WITH_TOOLS, "codegeex4"])
def test_what_has_no_form_is_refused_by_its_place(name, messages, message, codegeex4):
    tok = codegeex4 if name == "codegeex4" else tokenizer(name)
    with pytest.raises(ValueError, match=message):
        tok.apply_chat_template(messages, return_dict=False)


@pytest.mark.parametrize("argument", ["from", "the-city", "1st"])
def test_chatglm3_has_no_form_for_arguments_that_are_no_names(argument):
    messages = [QUESTION, assistant(call(json.dumps({argument: 1})))]
    with pytest.raises(ValueError, match=rf"messages\[1\]: the argument '{argument}' of the call of 'get_weather'"):
        text_of(tokenizer("models.chatglm3-6b"), messages)
    assert argument in text_of(tokenizer("models.glm-4-9b-chat"), messages)


@pytest.mark.parametrize("name", ROUNDS_OF_TEXT)
def test_calls_are_refused_where_there_are_none(name):
    with pytest.raises(ValueError, match=r"messages\[1\]: \w+ has no form for `tool_calls`"):
        text_of(tokenizer(name), [QUESTION, assistant(call({}))])


@pytest.mark.parametrize("name", ROUNDS_OF_TEXT)
@pytest.mark.parametrize("role", ["tool", "function", "observation"])
def test_results_are_refused_where_there_are_no_calls(role, name):
    with pytest.raises(ValueError, match=rf"messages\[1\]: \w+ has no role '{role}'"):
        text_of(tokenizer(name), [QUESTION, {"role": role, "content": "22"}])


def test_tools_that_are_none_are_refused():
    tok = tokenizer("models.glm-4-9b-chat")
    with pytest.raises(ValueError, match=r"`tools\[1\]` is 'f'; expected a JSON schema"):
        text_of(tok, [QUESTION], tools=[TOOL, "f"])
    for nameless in ({"type": "function"}, {"type": "function", "function": {}}, {"description": "f"}, {}):
        for name in WITH_TOOLS:
            with pytest.raises(ValueError, match=r"`tools\[0\]` is .*expected a function with its `name`"):
                text_of(tokenizer(name), [QUESTION], tools=[nameless])
    with pytest.raises(Exception, match="GLM-4 has no tool of type web_search; use function, python"):
        text_of(tok, [QUESTION], tools=[{"type": "web_search"}])


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_conversation_is_refused(name):
    for tokenize in (True, False):
        for conversation in ([], [[QUESTION], []]):
            with pytest.raises(ValueError, match="`conversation` is empty; expected at least one message"):
                tokenizer(name).apply_chat_template(conversation, tokenize=tokenize)


# Histories ---------------------------------------------------------------------------------------------------------

PAIRS = [("你好", "你好！"), ("在吗", None), ("今天", "")]
MESSAGES = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！"},
    {"role": "user", "content": "在吗"},
    {"role": "user", "content": "今天"},
    {"role": "assistant", "content": ""},
]


@pytest.mark.parametrize("name", NAMES)
def test_histories_of_both_forms_make_one_prompt(name):
    model, tok = Recorder([300]), tokenizer(name)
    prompts = []
    for history in (PAIRS, [list(pair) for pair in PAIRS], MESSAGES, [*PAIRS[:1], *MESSAGES[2:]]):
        before = copy.deepcopy(history)
        model.chat(tok, "天气？", list(history))
        assert history == before
        prompts.append(model.input_ids.tolist())
        assert tok.build_chat_input("天气？", history)["input_ids"].tolist() == prompts[-1]
    assert prompts == prompts[:1] * 4
    assert "None" not in tok.decode(prompts[0][0]) and "role" not in tok.decode(prompts[0][0])


@pytest.mark.parametrize(("name", "first", "gap"), [("models.chatglm-6b", 0, "\n"), ("models.chatglm2-6b", 1, "\n\n")])
def test_an_open_round(name, first, gap):
    prompt = tokenizer(name).build_prompt("b", [("a", None)])
    assert prompt == f"[Round {first}]{gap}问：a{gap}[Round {first + 1}]{gap}问：b{gap}答："


def test_a_stream_goes_on_after_rounds_of_both_forms():
    tok = tokenizer("models.chatglm2-6b")
    by_pairs, by_messages = (_continuation(tok, "天气？", history, "user") for history in (PAIRS, MESSAGES))
    assert by_pairs.tolist() == by_messages.tolist()
    assert "[Round 4]" in tok.decode(by_pairs[0].tolist())


@pytest.mark.parametrize("name", ROUNDS_OF_TEXT)
def test_messages_stay_messages_after_a_round(name):
    """With their system message, for which pairs have no place."""
    history = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    response, new_history = Recorder([300]).chat(tokenizer(name), "天气？", history)
    assert new_history == [*history, QUESTION, {"role": "assistant", "content": response}]
    _, pairs = Recorder([300]).chat(tokenizer(name), "天气？", PAIRS)
    assert pairs == [*PAIRS, ("天气？", response)]


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_pairs_become_messages(name):
    history = list(PAIRS)
    response, new_history = Recorder([300, 301]).chat(tokenizer(name), "天气？", history)
    assert new_history[:-1] == [*MESSAGES, QUESTION]
    assert new_history[-1] == {"role": "assistant", "metadata": "", "content": response}
    assert history == PAIRS  # a message would not fit into it
    own = list(MESSAGES)
    assert Recorder([300, 301]).chat(tokenizer(name), "天气？", own)[1] == new_history
    assert own == [*MESSAGES, QUESTION]  # as the originals do


@pytest.mark.parametrize("item", ["hi", ("a", "b", "c"), ("a", 5), 7])
@pytest.mark.parametrize("name", ["models.chatglm-6b", "models.chatglm2-6b", *WITH_TOOLS])
def test_a_history_of_something_else_is_refused(name, item):
    with pytest.raises(ValueError, match=r"`history\[1\]` is .*expected a message .* or a pair"):
        Recorder([300]).chat(tokenizer(name), "hi", [("a", "b"), item])


# CodeGeeX4 ---------------------------------------------------------------------------------------------------------

DEFINITIONS = {"role": "tool", "content": {"function": [FUNCTION]}}


def test_codegeex4_has_a_prompt_of_its_own(codegeex4):
    text = text_of(codegeex4, [QUESTION], tools=[TOOL], add_generation_prompt=True)
    assert text.startswith("[gMASK]<sop><|system|>\n你是一位智能编程助手，你叫CodeGeeX。")
    assert text.count("# Functions\n") == 1 and "GLM-4" not in text
    block = (
        "\n## Function 1\n\n### Name\nget_weather\n\n### Description\n查询天气\n\n### Parameters\n```json\n"
        + json.dumps(FUNCTION["parameters"], ensure_ascii=False)
        + "\n```\n<|user|>\n天气？<|assistant|>"
    )
    assert text.endswith(block)
    assert "## Function 2\n" in text_of(codegeex4, [QUESTION], tools=[TOOL, FUNCTION])


def test_codegeex4_reads_every_form_of_definitions(codegeex4):
    expected = text_of(codegeex4, [QUESTION], tools=[TOOL])
    for messages in (
        [DEFINITIONS, QUESTION],
        [{"role": "tool", "content": {"function": FUNCTION}}, QUESTION],
        [{"role": "tool", "content": [TOOL]}, QUESTION],
        [{"role": "system", "content": expected[len("[gMASK]<sop><|system|>\n") : expected.index("\n\n# Note")],
          "tools": [TOOL]}, QUESTION],
    ):  # fmt: skip
        assert text_of(codegeex4, messages) == expected
    ids = codegeex4.build_chat_input("天气？", [DEFINITIONS])["input_ids"][0].tolist()
    assert ids == codegeex4.encode(expected + "<|assistant|>", add_special_tokens=False)
    with_system = text_of(codegeex4, [DEFINITIONS, {"role": "system", "content": "Be brief."}, QUESTION])
    assert with_system.startswith("[gMASK]<sop><|system|>\nBe brief.\n\n# Note") and with_system.count("system") == 1


def test_codegeex4_without_functions_is_prompted_like_glm4(codegeex4):
    messages = [{"role": "system", "content": "Be brief."}, *MESSAGES, QUESTION]
    assert text_of(codegeex4, messages) == text_of(tokenizer("tokenizers.glm-4-9b-chat"), messages)


def test_codegeex4_writes_calls_and_reads_results(codegeex4):
    calls = assistant(call('{"city": "a"}'), call({"city": "b"}))
    result = {"role": "tool", "tool_call_id": "1", "content": "22"}
    text = text_of(codegeex4, [QUESTION, calls, result])
    in_parts = {**result, "content": [{"type": "text", "text": "22"}]}
    assert text_of(codegeex4, [QUESTION, calls, in_parts]) == text
    assert text.endswith(
        "<|user|>\n天气？<|assistant|>\n"
        '```json\n{"name": "get_weather", "arguments": {"city": "a"}}\n```\n'
        '```json\n{"name": "get_weather", "arguments": {"city": "b"}}\n```<|observation|>\n22'
    )
    with pytest.raises(
        ValueError, match=r"messages\[1\]: `content` of the role 'tool' is '22'; expected the functions"
    ):
        text_of(codegeex4, [QUESTION, {"role": "tool", "content": "22"}])


@pytest.mark.parametrize("content", [[FUNCTION], {"function": [FUNCTION]}])
def test_codegeex4_takes_no_result_for_a_definition(content, codegeex4):
    calls = assistant(call('{"city": "a"}'))
    before = text_of(codegeex4, [QUESTION, calls], tools=[TOOL])
    texts = [
        text_of(codegeex4, [QUESTION, calls, {"role": "tool", "content": json.dumps(content), **key}], tools=[TOOL])
        for key in ({}, {"tool_call_id": "1"})
    ]
    assert texts == [before + "<|observation|>\n" + json.dumps(content)] * 2
    for key in ({}, {"tool_call_id": "1"}):
        with pytest.raises(ValueError, match=r"messages\[2\]: `content.* text"):
            text_of(codegeex4, [QUESTION, calls, {"role": "tool", "content": content, **key}])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            '```json\n{"name": "f", "arguments": {"a": "```json x``` y"}}\n```\n'
            '```json\n{"name": "g", "arguments": {}}```',
            [{"name": "f", "parameters": {"a": "```json x``` y"}}, {"name": "g", "parameters": {}}],
        ),
        ('\n```json\n{"name": "f", "arguments": {"a": 1}}\n```', {"name": "f", "parameters": {"a": 1}}),
        (
            '```json\n{"name": "f", "arguments": {}}\n```\n```json\n{"name": "g", "arguments": {}}\n```',
            [{"name": "f", "parameters": {}}, {"name": "g", "parameters": {}}],
        ),
        ('\n例子：\n```json\n{"a": 1}\n```', '例子：\n```json\n{"a": 1}\n```'),
        ("\n```json\n{a: 1}\n```", "```json\n{a: 1}\n```"),
        ("\n```python\nprint(1)\n```", "```python\nprint(1)\n```"),
        ("\n你好", "你好"),
    ],
)
@pytest.mark.parametrize("definitions", [DEFINITIONS, {"role": "system", "content": "", "tools": [TOOL]}])
def test_codegeex4_answers_in_blocks(answer, expected, definitions, codegeex4):
    response, history = chat_rules(codegeex4, ChatGLMConfig()).process_response(answer, "hi", [definitions])
    assert response == expected
    assert history[-1] == {"role": "assistant", "metadata": "", "content": answer.strip()}
    response, _ = chat_rules(codegeex4, ChatGLMConfig()).process_response(answer, "hi", [])
    assert response == answer.strip()  # without functions there are no calls


def test_codegeex4_calls_that_cannot_be_read(codegeex4):
    text = '\n```json\n{"name": "f", "arguments": {"a": }}\n```'
    with pytest.raises(ToolCallError, match="cannot be read"):
        chat_rules(codegeex4, ChatGLMConfig()).process_response(text, "hi", [DEFINITIONS])
    response, _ = chat_rules(codegeex4, ChatGLMConfig()).process_response(text, "hi", [DEFINITIONS], incomplete=True)
    assert response == text.strip()
    response, _ = chat_rules(codegeex4, ChatGLMConfig()).process_response(
        text[:20], "hi", [DEFINITIONS], incomplete=True
    )
    assert response == text[:20].strip()


@pytest.mark.parametrize("name", [*CHATGLM3[:1], *GLM4[:1]])
def test_tools_that_hold_nothing_make_no_parameters(name):
    history = [{"role": "system", "content": "", "tools": None}]
    response, _ = rules(name).process_response("f\n{}", "hi", history)
    assert response == {"name": "f", "content": "{}"}
