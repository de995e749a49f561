# SPDX-License-Identifier: Apache-2.0
"""Streamed text never shows part of a character, and put together it is the decoded text."""

import pytest
import torch
from tokenization_cases import NAMES, golden, tokenizer
from transformers import TextIteratorStreamer, TextStreamer

from optimum_chatglm_ov.tokenization import ChatGLMTextIteratorStreamer, ChatGLMTextStreamer


TEXT = "你好，世界！😀 Hello 👍🏽 world.\n    def f(x):\n        return '繁體'\n1 2\n\nThe end"


def put_all(streamer, ids):
    for token_id in ids:
        streamer.put(torch.tensor([token_id]))
    streamer.end()


class Pieces(ChatGLMTextStreamer):
    """Collects what would be printed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pieces = []

    def on_finalized_text(self, text, stream_end=False):
        self.pieces.append(text)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_are_the_text(name):
    tok = tokenizer(name)
    for text in [TEXT, *(case["text"] for case in golden(name)["encode"] if "'" not in case["text"])]:
        ids = tok.encode(text, add_special_tokens=False)
        streamer = Pieces(tok)
        put_all(streamer, ids)
        assert "".join(streamer.pieces) == tok.decode(ids), text
        assert not any("\ufffd" in piece for piece in streamer.pieces)


@pytest.mark.parametrize("name", NAMES)
def test_text_appears_early(name):
    tok = tokenizer(name)
    streamer = Pieces(tok)
    for token_id in tok.encode("你好，世界！ Hello world", add_special_tokens=False)[:-1]:
        streamer.put(torch.tensor([token_id]))
    assert (
        "".join(streamer.pieces)
        .replace("!", "！")
        .startswith(tok.decode(tok.encode("你好", add_special_tokens=False)))
    )


@pytest.mark.parametrize("name", NAMES)
def test_unfinished_character_is_not_shown(name, capsys):
    tok = tokenizer(name)
    ids = tok.encode("好 龘", add_special_tokens=False)[:-1]
    assert tok.decode(ids).endswith("\ufffd")
    assert tok.decode(ids, skip_incomplete_tail=True).strip() == "好"
    put_all(ChatGLMTextStreamer(tok), ids)
    assert capsys.readouterr().out.strip() == "好"
    put_all(TextStreamer(tok, skip_incomplete_tail=True), ids)  # those of transformers, told so
    assert capsys.readouterr().out.strip() == "好"


@pytest.mark.parametrize("streamer_class", [TextIteratorStreamer, ChatGLMTextIteratorStreamer])
@pytest.mark.parametrize("name", NAMES)
def test_iterator_streamers_show_whole_characters(name, streamer_class):
    tok = tokenizer(name)
    prompt, answer = tok("问")["input_ids"], tok.encode("龘龘，😀你好", add_special_tokens=False)
    streamer = streamer_class(tok, skip_prompt=True)
    streamer.put(torch.tensor([prompt]))
    put_all(streamer, answer)
    pieces = list(streamer)
    assert "".join(pieces) == tok.decode(answer)
    assert not any("\ufffd" in piece for piece in pieces)


def test_streamer_refuses_a_batch():
    with pytest.raises(ValueError, match="found a batch of 2"):
        ChatGLMTextStreamer(tokenizer(NAMES[0])).put(torch.tensor([[1], [2]]))
