# SPDX-License-Identifier: Apache-2.0
"""tokenizer.json gives the ids and texts of the exact tokenizers to programs that do not have this package."""

import json
import re
import subprocess
import sys
import unicodedata

import pytest
from conversations import conversations
from text_corpus import CONTROL_TOKENS, texts
from tokenization_cases import CHATGLM3, NAMES, folder, golden, tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from optimum_chatglm_ov.tokenization import ChatGLM2Tokenizer, CodeGeeX4Tokenizer, TokenizerError
from optimum_chatglm_ov.tokenization.fast import MARK, build_backend, save_fast
from optimum_chatglm_ov.tokenization.vocabulary import whole_characters


ONE_OF_EACH = (
    "tokenizers.chatglm-6b-default-image-tokens",
    "tokenizers.chatglm2-6b",
    "tokenizers.chatglm3-6b",
    "tokenizers.glm-4-9b-chat",
)
# Loads a folder as a program that has never heard of this package.
ALONE = """
import json, sys
from transformers import AutoTokenizer
found = []
for folder in json.loads(sys.argv[1]):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(["好 soprano\\n", "a  b<|user|>"], padding=True)
    messages = [{"role": "user", "content": "hi"}]
    found.append({
        "class": type(tokenizer).__mro__[0].__module__.partition(".")[0],
        "fast": tokenizer.is_fast,
        "encoded": dict(encoded),
        "decoded": tokenizer.batch_decode(encoded["input_ids"], skip_special_tokens=True),
        "chat": tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False),
        "eos": tokenizer.eos_token_id,
    })
assert "optimum_chatglm_ov" not in sys.modules
print(json.dumps(found))
"""


def reordered(text):
    """Whether marks follow each other in it: NFKC then orders them, and ChatGLM's table of replacements does not.

    Or whether it has separators that Python takes off beside control tokens, and the library does not.
    """
    if re.search("[\x1c-\x1f]", text):
        return True
    parts = unicodedata.normalize("NFKD", text)
    return any(
        unicodedata.combining(first) and unicodedata.combining(second) for first, second in zip(parts, parts[1:])
    )


@pytest.fixture(scope="module")
def backend():
    built = {}

    def build(name):
        if name not in built:  # as it is read from a file
            built[name] = Tokenizer.from_str(build_backend(tokenizer(name)).to_str())
        return built[name]

    return build


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    def save(name):
        output = tmp_path_factory.getbasetemp() / "fast" / name
        if not output.exists():
            output.mkdir(parents=True)
            save_fast(tokenizer(name), output)
        return output

    return save


@pytest.mark.parametrize("name", NAMES)
def test_golden_strings(name, backend):
    for case in golden(name)["encode"]:
        text, ids = whole_characters(case["text"]), case["call"]["input_ids"]
        assert backend(name).encode(text).ids == ids, text
        assert backend(name).encode(text, add_special_tokens=False).ids == case["ids"], text
        assert backend(name).decode(ids, skip_special_tokens=False) == case["decode"], text
        assert backend(name).decode(ids) == case["decode_skip"], text
        assert backend(name).decode(case["ids"], skip_special_tokens=False) == case["decode_ids"], text


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_varied_strings(name, backend):
    """The whole corpus is for tests/benchmarks/compare_tokenizers.py."""
    exact, strings = tokenizer(name), texts(1500)
    encodings = backend(name).encode_batch([whole_characters(text) for text in strings], add_special_tokens=False)
    compared = 0
    for text, encoding in zip(strings, encodings):
        if "chatglm-6b" in name and reordered(whole_characters(text)):
            continue
        ids = exact.encode(text, add_special_tokens=False)
        assert encoding.ids == ids, text
        if "chatglm-6b" not in name or "<|blank_81|>" not in text:  # README.md, "Limits"
            assert backend(name).decode(ids, skip_special_tokens=False) == exact.decode(ids), text
        compared += 1
    assert compared > 1100


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_control_token_inside_text(name, backend):
    exact = tokenizer(name)
    for token in CONTROL_TOKENS:
        for text in (token, f"a{token}b", f"好 {token} 好", f"{token}\n{token}", f"x{token.upper()}"):
            expected = exact.encode(text, add_special_tokens=False)
            assert backend(name).encode(text, add_special_tokens=False).ids == expected, text


def test_parts_of_words_are_no_control_tokens(backend):
    for name in ONE_OF_EACH[1:3]:
        vocabulary = tokenizer(name).tokenizer.special_tokens
        ids = backend(name).encode("soprano sop eop <|user|>", add_special_tokens=False).ids
        assert not set(ids) & set(vocabulary.values())


def test_image_tokens(backend):
    name = ONE_OF_EACH[0]
    exact, fast = tokenizer(name), backend(name)
    assert exact.num_image_tokens == 20000
    assert fast.decode([0, 7, 19999], skip_special_tokens=False) == exact.decode([0, 7, 19999])
    assert fast.encode("<image_7>").ids == exact("<image_7>")["input_ids"] and 7 not in fast.encode("<image_7>").ids


def test_programs_without_this_package(saved):
    folders = [str(saved(name)) for name in ONE_OF_EACH]
    result = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(folders)], capture_output=True, text=True, cwd=folders[0]
    )
    assert result.returncode == 0, result.stderr
    for name, found in zip(ONE_OF_EACH, json.loads(result.stdout)):
        exact = tokenizer(name)
        expected = [exact(text)["input_ids"] for text in ("好 soprano\n", "a  b<|user|>")]
        width = max(map(len, expected))
        padded = [[exact.pad_token_id] * (width - len(row)) + row for row in expected]
        assert found["class"] == "transformers" and found["fast"]
        assert found["encoded"]["input_ids"] == padded
        assert found["encoded"].keys() == {"input_ids", "attention_mask"}
        assert found["encoded"]["attention_mask"] == [[0] * (width - len(row)) + [1] * len(row) for row in expected]
        assert found["decoded"] == [exact.decode(row, skip_special_tokens=True) for row in expected]
        assert found["eos"] == exact.eos_token_id
        messages = [{"role": "user", "content": "hi"}]
        assert found["chat"] == exact.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_with_this_package_the_exact_class_is_given(name, saved, tmp_path):
    exact, again = tokenizer(name), AutoTokenizer.from_pretrained(saved(name))
    assert type(again) is type(exact)
    assert again.model_input_names == exact.model_input_names
    assert again.clean_up_tokenization_spaces == exact.clean_up_tokenization_spaces
    assert again.special_tokens_map == exact.special_tokens_map
    assert again.chat_template == exact.chat_template
    for text in ("好 soprano\n", "a  b </s><|user|> n't"):
        assert again(text).data == exact(text).data
        assert again.decode(again(text)["input_ids"]) == exact.decode(exact(text)["input_ids"])
    again.save_pretrained(tmp_path)
    assert MARK not in (tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is type(exact)


@pytest.mark.parametrize("name", CHATGLM3[:1])
def test_options_without_a_form(name, tmp_path):
    unusual = AutoTokenizer.from_pretrained(folder(name), encode_special_tokens=True)
    with pytest.raises(TokenizerError, match="`encode_special_tokens` has no form in tokenizer.json"):
        save_fast(unusual, tmp_path)
    assert not any(tmp_path.iterdir())
    unusual = AutoTokenizer.from_pretrained(folder(ONE_OF_EACH[0]), do_lower_case=True)
    with pytest.raises(TokenizerError, match="`do_lower_case` have no form"):
        save_fast(unusual, tmp_path)


# Conversations -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact_of(tmp_path_factory):
    def get(name):
        if name != "codegeex4":
            return tokenizer(name)
        return CodeGeeX4Tokenizer.from_pretrained(folder(ONE_OF_EACH[3]), chatglm_generation="codegeex4")

    return get


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "codegeex4"])
def test_chat_template_of_tokenizer_json(name, exact_of, tmp_path):
    exact = exact_of(name)
    save_fast(exact, tmp_path)
    fast = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for messages, tools in conversations(exact):
        for prompt in (True, False):
            options = {"tools": tools, "add_generation_prompt": prompt, "return_dict": False}
            expected = exact.apply_chat_template(messages, **options)
            found = fast.apply_chat_template(messages, **options)
            assert found == expected, (messages, tools, fast.decode(found), exact.decode(expected))
    for role in ("doctor", "tool" if isinstance(exact, ChatGLM2Tokenizer) and name == ONE_OF_EACH[1] else "critic"):
        with pytest.raises(Exception, match=f"has no role {role}"):
            fast.apply_chat_template([{"role": role, "content": "x"}])
