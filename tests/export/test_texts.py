# SPDX-License-Identifier: Apache-2.0
"""Where texts for calibration and comparison come from, and what is none."""

import pytest
from conftest import DATA
from transformers import AutoTokenizer

from optimum_chatglm_ov.export import texts


def test_files_strings_and_rows(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("first\nline\n\n\n\nsecond 第二\n", encoding="utf-8")
    assert list(texts.read_texts(file)) == list(texts.read_texts(str(file))) == ["first\nline", "second 第二\n"]
    assert list(texts.read_texts(["one", " ", "two"])) == ["one", "two"]
    assert list(texts.read_texts({"text": text, "id": 1} for text in ("one", "", "two"))) == ["one", "two"]


def test_blocks_are_cut_from_the_texts_joined():
    tokenizer = AutoTokenizer.from_pretrained(DATA / "models" / "chatglm3-6b")
    lines = ["The quick brown fox", "jumps over the lazy dog.", "今天天气很好"]
    expected = [token for line in lines for token in tokenizer.encode(line + "\n", add_special_tokens=False)]
    found = list(texts.blocks(lines, tokenizer, 7))
    assert [len(block) for block in found[:-1]] == [7] * (len(found) - 1) and 0 < len(found[-1]) <= 7
    assert sum(found, []) == expected


@pytest.mark.parametrize(
    "source, message",
    [
        ({"train": ["a"], "test": ["b"]}, "a dict with the keys 'train', 'test'. Pass one split"),
        (None, "The texts are None; expected a UTF-8 text file"),
        (3, "The texts are 3; expected a UTF-8 text file"),
        ([3], "row is 3; expected a string or a row with a 'text' column"),
        (["fine", "half \ud83d"], r"'\\ud83d' at character 5 is half of a character"),
        ([], "No text found"),
        ("wikitext3", "wikitext3: cannot read the text .No such file.*one of wikitext2, c4, c4-new, gsm8k"),
        ("wikitext2:stride=3", "only option of a data set is `seq_len`, as in 'wikitext2:seq_len=64'"),
        ("wikitext2:", "only option of a data set is `seq_len`"),
        ("auto", "for its calibration alone"),
        ("gsm8k", "'gsm8k' could not be loaded .*Give a text file"),
    ],
)
def test_what_is_no_text(source, message):
    with pytest.raises(ValueError, match=message):
        list(texts.read_texts(source))


@pytest.mark.parametrize(
    "source, expected",
    [
        ("c4", ("c4", None)),
        ("wikitext2:seq_len=64", ("wikitext2", 64)),
        ("auto: seq_len = 8", ("auto", 8)),
        ("a/file:with=colon.txt", (None, None)),
        (["c4"], (None, None)),
    ],
)
def test_names_of_data_sets(source, expected):
    assert texts.name_and_length(source) == expected
