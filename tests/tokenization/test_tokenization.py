# SPDX-License-Identifier: Apache-2.0
"""Every tokenizer does what the original did, case by case."""

import pytest
from tokenization_cases import CHATGLM3, GLM4, NAMES, ROUNDS_OF_TEXT, as_lists, folder, golden, tokenizer
from transformers import AutoTokenizer

from optimum_chatglm_ov.tokenization import (
    ChatGLM1Tokenizer,
    ChatGLM2Tokenizer,
    ChatGLM3Tokenizer,
    ChatGLM4Tokenizer,
)
from optimum_chatglm_ov.tokenization.chatglm3 import _warn_once


CLASSES = {
    "codegeex2": ChatGLM2Tokenizer,
    "v1": ChatGLM1Tokenizer,
    "v2": ChatGLM2Tokenizer,
    "v3": ChatGLM3Tokenizer,
    "glm4": ChatGLM4Tokenizer,
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {}}}},
    }
]


@pytest.mark.parametrize("name", NAMES)
def test_class_and_special_tokens(name):
    expected, tok = golden(name), tokenizer(name)
    assert type(tok) is CLASSES[expected["kind"]]
    for token, token_id in expected["special"]["convert_tokens_to_ids"].items():
        if isinstance(token_id, dict):
            with pytest.raises(KeyError, match="GLM-4 has no token"):
                tok.convert_tokens_to_ids(token)
        else:
            assert tok.convert_tokens_to_ids(token) == token_id, token
    for attribute, value in expected["special"].items():
        if attribute not in ("convert_tokens_to_ids", "get_command", "len"):
            assert getattr(tok, attribute) == value, attribute
    for token, token_id in expected["special"].get("get_command", {}).items():
        if isinstance(token_id, dict):  # the original fails an assertion
            with pytest.raises(ValueError, match="is not a control token"):
                tok.get_command(token)
        else:
            assert tok.get_command(token) == token_id, token


@pytest.mark.parametrize("name", NAMES)
def test_length_counts_every_token(name):
    tok = tokenizer(name)
    special_tokens_after_the_vocabulary = 14 if name in GLM4 else 0
    assert len(tok) == len(tok.get_vocab()) == tok.vocab_size + special_tokens_after_the_vocabulary


@pytest.mark.parametrize("name", NAMES)
def test_encode_and_decode(name):
    tok = tokenizer(name)
    for case in golden(name)["encode"]:
        text, ids, prompt_ids = case["text"], case["ids"], case["call"]["input_ids"]
        assert as_lists(tok(text)) == case["call"], text
        assert tok.encode(text, add_special_tokens=False) == ids, text
        if "tokens" in case:
            assert tok.tokenize(text) == case["tokens"], text
        assert tok.decode(prompt_ids) == case["decode"], text
        assert tok.decode(prompt_ids, skip_special_tokens=True) == case["decode_skip"], text
        assert tok.decode(ids) == case["decode_ids"], text
        assert tok.decode(ids, clean_up_tokenization_spaces=False) == case["decode_ids_nocleanup"], text


@pytest.mark.parametrize("name", NAMES)
def test_batches(name):
    tok = tokenizer(name)
    for case in golden(name)["batch"]:
        encoding = tok(case["texts"], **case["kwargs"])
        if "out" in case:
            assert as_lists(encoding) == case["out"], case["kwargs"]
        else:
            shapes = {key: {"shape": list(value.shape), "dtype": str(value.dtype)} for key, value in encoding.items()}
            assert shapes == case["tensor_shapes"]


@pytest.mark.parametrize("name", NAMES)
def test_pairs(name):
    tok = tokenizer(name)
    for case in golden(name)["pair"]:
        if "error" in case["out"]:
            with pytest.raises(ValueError, match="GLM-4 cannot encode a pair"):
                tok(case["text"], case["text_pair"])
            continue
        assert as_lists(tok(case["text"], case["text_pair"])) == case["out"]
        assert as_lists(tok([case["text"]], [case["text_pair"]], padding=True)) == case["out_padded"]


@pytest.mark.parametrize("name", NAMES)
def test_decode_of_given_ids(name):
    tok, expected = tokenizer(name), golden(name)
    clean_up = {"None": None, "False": False, "True": True}
    for case in expected["decode"]:
        for options, text in case.items():
            if options != "ids":
                skip, _, cleanup = options.partition(",cleanup=")
                assert text == tok.decode(
                    case["ids"],
                    skip_special_tokens=skip == "skip=1",
                    clean_up_tokenization_spaces=clean_up[cleanup],
                ), (options, case["ids"])
    for token_id, text in expected["decode_single_int"].items():
        if name in GLM4:  # whose original has no text for one id alone
            text = tok.decode([int(token_id)])
        assert tok.decode(int(token_id)) == text, token_id
    assert tok.batch_decode(expected["batch_decode"]["ids"]) == expected["batch_decode"]["out"]
    assert tok.decode(expected["batch_decode"]["ids"]) == expected["batch_decode"]["out"]


@pytest.mark.parametrize("name", GLM4)
def test_glm4_decodes_one_id(name):
    tok = tokenizer(name)
    hello = next(
        index for index in range(300, tok.vocab_size) if tok._convert_id_to_token(index).decode("utf-8", "ignore")
    )
    assert tok.decode(hello) == tok.decode([hello]) == tok._convert_id_to_token(hello).decode("utf-8", "replace") != ""
    user = tok.convert_tokens_to_ids("<|user|>")
    assert (tok.decode(user), tok.decode(user, skip_special_tokens=True)) == ("<|user|>", "")


@pytest.mark.parametrize("ids", [-100, [-100], [5, -1, 6], [[5], [5, -100]]])
@pytest.mark.parametrize("name", NAMES)
def test_labels_are_no_ids(name, ids):
    with pytest.raises(ValueError, match=r"-1\d* is not a token id.*`pad_token_id`"):
        tokenizer(name).decode(ids)
    with pytest.raises(ValueError, match="is not a token id"):
        tokenizer(name).convert_ids_to_tokens([-100])


@pytest.mark.parametrize(
    ("text", "whole"),
    [("a\ud83dz", "a\ufffdz"), ("\ude00", "\ufffd"), ("好\ud83d\ude00好", "好😀好"), ("\ud83d", "\ufffd")],
)
@pytest.mark.parametrize("name", NAMES)
def test_half_a_surrogate_pair(name, text, whole):
    """`json.loads` makes them."""
    tok = tokenizer(name)
    assert tok(text)["input_ids"] == tok(whole)["input_ids"]
    assert tok.tokenize(text) == tok.tokenize(whole)
    messages = [[{"role": "user", "content": content}] for content in (text, whole)]
    rows = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert rows[0] == rows[1]
    prompts = [tok.build_chat_input(content)["input_ids"].tolist() for content in (text, whole)]
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize("name", NAMES)
def test_ids_after_the_vocabulary_have_no_text(name):
    """A model's vocabulary is padded, so that it can generate them."""
    tok = tokenizer(name)
    ids = tok.encode("你好", add_special_tokens=False)
    assert tok.decode([*ids, len(tok), len(tok) + 7]) == tok.decode(ids)


@pytest.mark.parametrize("name", ROUNDS_OF_TEXT)
def test_prompts_of_rounds(name):
    tok = tokenizer(name)
    for case in golden(name)["chat"]:
        query, history, prompt = case["query"], case["history"], case["prompt"][0]
        assert tok.build_prompt(query, history) == prompt
        encoding = tok.build_chat_input(query, history)
        assert encoding["input_ids"].tolist() == case["input_ids"]
        assert sorted(encoding) == case["tokenizer_keys"]

        messages = []
        for question, answer in history:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": query})
        assert tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == prompt
        ids = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == case["input_ids"][0]


@pytest.mark.parametrize("name", CHATGLM3)
def test_prompts_of_chatglm3(name):
    expected = golden(name)
    tok = AutoTokenizer.from_pretrained(folder(name))
    template = tok.chat_template
    for case in expected["chat"]:
        query, history, role = case["query"], case["history"], case["role"]
        assert as_lists(tok.build_chat_input(query, history, role)) == case["build_chat_input"]

        messages = [*history, {"role": role, "content": query}]
        if "apply_chat_template" in case:  # the checkpoint's own template
            tok.chat_template = template
            text = tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            assert text == case["apply_chat_template_text"]
            ids = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert ids == case["apply_chat_template"]
        tok.chat_template = None  # this package's
        encoding = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        assert as_lists(encoding) == case["build_chat_input"]

    for case in expected["build_single_message"]:
        arguments = case["role"], case["metadata"], case["message"]
        if isinstance(case["ids"], dict):  # the original fails an assertion
            with pytest.raises(ValueError, match="ChatGLM3Tokenizer has no role 'tool'"):
                tok.build_single_message(*arguments)
        else:
            assert tok.build_single_message(*arguments) == case["ids"]
    for case in expected["inner_decode"]:
        assert tok.tokenizer.decode(case["ids"]) == case["text"]

    tok = AutoTokenizer.from_pretrained(folder(name), encode_special_tokens=True)
    for case in expected["encode_special_tokens_true"]:
        assert tok.encode(case["text"], add_special_tokens=False) == case["ids"]
        assert tok.decode(case["ids"]) == case["decode"]


@pytest.mark.parametrize("name", GLM4)
def test_prompts_of_glm4(name):
    expected, tok = golden(name), tokenizer(name)
    for case in expected["chat"]:
        messages = [*case["history"], {"role": case["role"], "content": case["query"]}]
        for prompt, suffix in ((True, ""), (False, "_no_generation_prompt")):
            text = tok.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
            assert text == case["text" + suffix]
            ids = tok.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert ids == case["input_ids" + suffix]
        assert as_lists(tok.build_chat_input(case["query"], case["history"], case["role"])) == case["dict"]
    batch = expected["apply_chat_template_batch"]
    encoding = tok.apply_chat_template(
        batch["conversations"], add_generation_prompt=True, padding=True, return_dict=True
    )
    assert as_lists(encoding) == batch["out"]


def test_glm4_template_of_the_checkpoint_is_used():
    tok = AutoTokenizer.from_pretrained(folder("tokenizers.glm-4-9b-chat"))
    tok.chat_template = "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    ids = tok.apply_chat_template([{"role": "user", "content": "hi <|user|>"}], return_dict=False)
    assert ids == tok.encode("<|user|>hi <|user|>")
    assert ids.count(tok.convert_tokens_to_ids("<|user|>")) == 2  # as in the original, also in what a user writes


def test_glm4_single_message_keeps_control_tokens_of_a_user_as_text():
    tok = tokenizer("tokenizers.glm-4-9b-chat")
    ids = tok.build_single_message("user", "", "<|assistant|>")
    assert [token_id for token_id in ids if token_id >= tok.vocab_size] == [tok.convert_tokens_to_ids("<|user|>")]
    assert tok.decode(ids) == "<|user|> \n<|assistant|>"
    with pytest.raises(ValueError, match="ChatGLM4Tokenizer has no role 'tool'"):
        tok.build_single_message("tool", "", "x")


def test_chatglm3_template_with_added_role_tokens_keeps_messages_as_text():
    """As in the later revisions of ChatGLM3, whose tokenizer_config.json makes the roles added tokens."""
    plain = tokenizer("tokenizers.chatglm3-6b")
    roles = ["[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    tok = AutoTokenizer.from_pretrained(
        folder("tokenizers.chatglm3-6b"),
        added_tokens_decoder={
            plain.get_command(role): {"content": role, "special": True, "normalized": False} for role in roles
        },
        chat_template="{% for m in messages %}{% if loop.first %}[gMASK]sop{% endif %}<|{{ m.role }}|>"
        "{{ '\\n ' ~ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    )
    assert type(tok) is ChatGLM3Tokenizer
    messages = [{"role": "user", "content": "你好 <|assistant|> sop"}]
    expected = plain.build_chat_input(messages[0]["content"])["input_ids"][0].tolist()
    assert tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == expected


@pytest.mark.parametrize(
    "listed", [["<|user|>"], ["[gMASK]", "<|observation|>"], ["sop", "<|user|>", "<|assistant|>"]]
)
def test_chatglm3_template_with_some_control_tokens_listed(listed):
    """Files edited by hand have some of them; the model knows no spelled `[gMASK]sop`."""
    plain = tokenizer("tokenizers.chatglm3-6b")
    tok = AutoTokenizer.from_pretrained(
        folder("tokenizers.chatglm3-6b"),
        added_tokens_decoder={
            plain.get_command(token): {"content": token, "special": True, "normalized": False} for token in listed
        },
        chat_template="[gMASK]sop{% for m in messages %}<|{{ m.role }}|>{{ '\\n ' ~ m.content }}{% if m.tools %}"
        "{{ '\\n' ~ m.tools|tojson(indent=4) }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    )
    tools = [{"name": "philosophy", "description": "sop <|user|> [gMASK]"}]
    history = [{"role": "system", "content": "a philosopher", "tools": tools}]
    expected = plain.build_chat_input("你好 <|assistant|> sop", history)["input_ids"][0].tolist()
    messages = [*history, {"role": "user", "content": "你好 <|assistant|> sop"}]
    assert tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == expected


def test_chatglm3_template_beside_other_added_tokens_is_reported(caplog):
    tok = AutoTokenizer.from_pretrained(folder("tokenizers.chatglm3-6b-128k"))
    tok.add_tokens(["<extra>"])
    _warn_once.cache_clear()
    tok.apply_chat_template([{"role": "user", "content": "hi"}])
    assert "writes the roles as text" in caplog.text


def test_chatglm3_template_that_spells_the_roles_is_reported(caplog):
    tok = tokenizer("tokenizers.chatglm3-6b-128k")
    _warn_once.cache_clear()
    for _ in range(2):
        tok.apply_chat_template([{"role": "user", "content": "hi"}])
    assert [record.message.partition(" writes")[0] for record in caplog.records] == [
        "The chat template of this ChatGLM3 checkpoint"
    ]


@pytest.mark.parametrize("name", [*CHATGLM3[:1], *GLM4[:1]])
def test_tools_in_the_form_of_transformers(name):
    """`tools=`, `tool_calls` and the role `tool` give what the original form gives."""
    tok = tokenizer(name)
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京"}}}
    ids = tok.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "天气？"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "22"},
        ],
        tools=TOOLS,
        add_generation_prompt=True,
        return_dict=False,
    )
    content = "```python\ntool_call(city='北京')\n```" if name in CHATGLM3 else '{"city": "北京"}'
    history = [
        {
            "role": "system",
            "content": "Be brief.",
            "tools": [TOOLS[0]["function"]] if name in CHATGLM3 else TOOLS,
        },
        {"role": "user", "content": "天气？"},
        {"role": "assistant", "metadata": "get_weather", "content": content},
    ]
    assert ids == tok.build_chat_input("22", history, "observation")["input_ids"][0].tolist()


@pytest.mark.parametrize("name", [CHATGLM3[-2], *GLM4[:1]])
def test_tools_without_a_system_message(name):
    text = tokenizer(name).apply_chat_template([{"role": "user", "content": "hi"}], tools=TOOLS, tokenize=False)
    assert text.index("<|system|>") < text.index('"name": "get_weather"') < text.index("<|user|>")


@pytest.mark.parametrize("name", ROUNDS_OF_TEXT)
def test_tools_are_refused_where_there_are_none(name):
    with pytest.raises(ValueError, match="has no form for `tools`"):
        tokenizer(name).apply_chat_template([{"role": "user", "content": "hi"}], tools=TOOLS)


@pytest.mark.parametrize("name", NAMES)
def test_begun_answer_is_continued(name):
    """`continue_final_message`: the prompt, then the ids of the answer begun, and nothing after them."""
    tok = tokenizer(name)
    question, begun = {"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！我"}
    ids = tok.apply_chat_template([question, begun], continue_final_message=True, return_dict=False)
    assert tok.decode(ids, skip_special_tokens=True).replace("!", "！").endswith("你好！我")
    prompt = tok.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
    if name not in CHATGLM3:  # whose header of a message is longer than `<|assistant|>`
        assert ids[: len(prompt) - 1] == prompt[:-1]
    with pytest.raises(ValueError, match="exclude each other"):
        tok.apply_chat_template([question, begun], continue_final_message=True, add_generation_prompt=True)


@pytest.mark.parametrize("name", [*ROUNDS_OF_TEXT, CHATGLM3[0], *GLM4])
def test_unknown_roles_are_refused(name):
    for tokenize in (True, False):
        with pytest.raises(ValueError, match="has no role 'narrator'; use one of system, user"):
            tokenizer(name).apply_chat_template([{"role": "narrator", "content": "x"}], tokenize=tokenize)


@pytest.mark.parametrize("name", ROUNDS_OF_TEXT)
def test_system_message_before_the_rounds(name):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    text = tokenizer(name).apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == ("Be brief.\nhi" if "chatglm-6b" in name else "Be brief.\n\n[Round 1]\n\n问：hi\n\n答：")


@pytest.mark.parametrize("name", NAMES)
def test_chat_template_truncates_and_pads(name):
    tok = tokenizer(name)
    conversations = [[{"role": "user", "content": text}] for text in ("你好", "Please describe the quiet river.")]
    encoding = tok.apply_chat_template(conversations, padding=True, return_tensors="np", return_dict=True)
    assert encoding["input_ids"].shape[0] == 2
    assert encoding["input_ids"][0, 0] == tok.pad_token_id
    rows = tok.apply_chat_template(conversations, truncation=True, max_length=3, return_dict=False)
    assert [len(row) for row in rows] == [min(3, len(row)) for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_padding_on_the_right(name):
    tok = tokenizer(name)
    encoding = tok(["a", "hello   world"], padding=True, padding_side="right")
    unpadded = tok("a")["input_ids"]
    assert encoding["input_ids"][0][: len(unpadded)] == unpadded
    assert encoding["input_ids"][0][-1] == tok.pad_token_id
    if "chatglm-6b" not in name:
        assert encoding["position_ids"][0][: len(unpadded)] == list(range(len(unpadded)))
        assert encoding["attention_mask"][0] == [1] * len(unpadded) + [0] * (
            len(encoding["input_ids"][0]) - len(unpadded)
        )


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_mask(name):
    tok = tokenizer(name)
    encoding = tok("你好", return_special_tokens_mask=True)
    kept = [i for i, special in zip(encoding["input_ids"], encoding["special_tokens_mask"]) if not special]
    assert kept == tok.encode("你好", add_special_tokens=False)
