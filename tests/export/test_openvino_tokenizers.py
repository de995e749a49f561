# SPDX-License-Identifier: Apache-2.0
"""The tokenizer, the detokenizer and the chat template of exported folders, as OpenVINO's programs run them."""

import re

import openvino_genai
import pytest
from conftest import DATA
from conversations import conversations
from genai_support import PROMPT
from text_corpus import texts
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from optimum_chatglm_ov import CodeGeeX4Tokenizer
from optimum_chatglm_ov.cli.main import main
from optimum_chatglm_ov.ir import OPENVINO_TOKENIZER_FILES
from optimum_chatglm_ov.tokenization.fast import TOKENIZER_FILES
from optimum_chatglm_ov.tokenization.fast.templates import TEMPLATES
from optimum_chatglm_ov.tokenization.vocabulary import whole_characters


ONE_OF_EACH = ("chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat")
# Most of its characters are several tokens in every vocabulary here.
CUT_CHARACTERS = "你好，世界！😀 👩‍👩‍👧‍👦🇨🇳 café ñ 한국어 𠀀 end.\n🤷🏻‍♀️"


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "glm", "glm4"])
def test_ids_and_texts(name, exported):
    exact, found = AutoTokenizer.from_pretrained(exported(name)), openvino_genai.Tokenizer(str(exported(name)))
    assert {"openvino_tokenizer.xml", "openvino_detokenizer.xml", TOKENIZER_FILES[0]} <= {
        file.name for file in exported(name).iterdir()
    }
    assert found.get_eos_token_id() == exact.eos_token_id and found.get_pad_token_id() == exact.pad_token_id
    for text in [*texts(120, seed=7), PROMPT, "", "a\nb\t  c", "<|user|> soprano sop </s>"]:
        text = whole_characters(text).replace("\0", "")
        if "<0x" in text or re.search(r"[\u0300-\u036f\u05b0-\u05c7\u064b-\u065f\u093c\u094d\u3099]{2}|´", text):
            continue  # README.md, "Limits"
        for special in (True, False):
            ids = exact.encode(text, add_special_tokens=special)
            assert found.encode(text, add_special_tokens=special).input_ids.data[0].tolist() == ids, text
        if ids and "<|blank_81|>" not in text:
            assert found.decode(ids) == exact.decode(ids, skip_special_tokens=True), text
    ids = [exact.encode(text, add_special_tokens=False) for text in ("好", "a  b")]
    batch = found.encode(["好", "a  b"], add_special_tokens=False)
    width = max(map(len, ids))
    assert batch.input_ids.data.tolist() == [[exact.pad_token_id] * (width - len(row)) + row for row in ids]
    assert batch.attention_mask.data.tolist() == [[0] * (width - len(row)) + [1] * len(row) for row in ids]


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "codegeex4"])
def test_minja_makes_the_same_prompts(name, exported):
    folder = exported("glm-4-9b-chat" if name == "codegeex4" else name)
    exact, found = AutoTokenizer.from_pretrained(folder), openvino_genai.Tokenizer(str(folder))
    if name == "codegeex4":
        exact = CodeGeeX4Tokenizer.from_pretrained(folder, chatglm_generation=name)
        found.chat_template = TEMPLATES[name]
    for messages, tools in conversations(exact):
        expected = exact.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
        text = found.apply_chat_template(messages, True, tools=tools or [])
        assert found.encode(text, add_special_tokens=False).input_ids.data[0].tolist() == expected, messages


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "glm4"])
def test_streams_show_whole_characters(name, exported):
    exact, tokenizer = AutoTokenizer.from_pretrained(exported(name)), openvino_genai.Tokenizer(str(exported(name)))
    ids = exact.encode(CUT_CHARACTERS, add_special_tokens=False)
    text = exact.decode(ids)  # ChatGLM-6B writes some punctuation otherwise
    cut = [end for end in range(1, len(ids)) if exact.decode(ids[:end]).endswith("\ufffd")]
    assert "😀" in text and "\ufffd" not in text and len(cut) > 30
    for end in cut:  # by this a streamer sees that a character is not complete
        found = tokenizer.decode(ids[:end])
        assert found.endswith("\ufffd") and text.startswith(found.rstrip("\ufffd")), found
    pieces = []
    streamer = openvino_genai.TextStreamer(tokenizer, lambda piece: bool(pieces.append(piece)))
    for token_id in ids:
        streamer.write(token_id)
    assert len(list(filter(None, pieces))) > 3  # it does not wait for the end
    streamer.end()
    assert "".join(pieces) == text


def test_command_writes_every_form(tmp_path):
    name = "tokenizers.chatglm3-6b"
    assert main(["tokenizer", str(DATA / "tokenizers" / name), str(tmp_path / "out")]) == 0
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files >= {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", *OPENVINO_TOKENIZER_FILES}
    ids = AutoTokenizer.from_pretrained(DATA / "tokenizers" / name)("a  b 好")["input_ids"]
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("a  b 好").ids == ids
    assert main(["tokenizer", str(tmp_path / "out"), str(tmp_path / "out")]) == 0  # in place, and again the same
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("a  b 好").ids == ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a  b 好")["input_ids"] == ids
