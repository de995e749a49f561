# SPDX-License-Identifier: Apache-2.0
"""`save_cache` and `load_cache`: what a model holds, in a file."""

import stat

import numpy as np
import pytest
import torch
from conftest import in_child, let_others_read
from reuse_models import prompt

from optimum_chatglm_ov.runtime.reuse.files import CacheFileError, read_file, write_file


pytest_plugins = ["reuse_models"]

NAMES = ("chatglm-6b", "chatglm2-6b-ptuning-v2", "chatglm3-6b", "glm4")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 2])
def test_logits_after_it_are_bit_identical(load, tmp_path, name, rows):
    model, file = load(name, ov_config={}), tmp_path / "cache"
    ids = torch.cat([prompt(model, 77, seed) for seed in range(rows)])
    mask, more = torch.ones_like(ids), torch.tensor([[7, 8, 9]] * rows)
    mask[rows - 1, : 5 * (rows - 1)] = 0  # the second row is padded
    past = model(ids, attention_mask=mask, logits_to_keep=1).past_key_values
    model.save_cache(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    mask = torch.cat((mask, torch.ones_like(more)), dim=1)
    expected = model(more, attention_mask=mask, past_key_values=past).logits
    for other in (model, load(name, ov_config={}, prefix_cache=False)):
        past = other.load_cache(file)
        assert past.get_seq_length() == 77 and past.batch_size == rows
        assert torch.equal(other(more, attention_mask=mask, past_key_values=past).logits, expected)


def test_generation_goes_on(load, tmp_path):
    model, file = load("chatglm3-6b"), tmp_path / "cache"
    settings = {"do_sample": False, "pad_token_id": 0}
    ids = prompt(model, 30)
    first = model.generate(ids, max_new_tokens=4, **settings)
    model.save_cache(file, {"title": "你好"})
    expected = model.generate(torch.cat((first, ids), dim=1), max_new_tokens=5, **settings)
    other = load("chatglm3-6b")
    past = other.load_cache(file)
    assert torch.equal(
        other.generate(torch.cat((first, ids), dim=1), max_new_tokens=5, past_key_values=past, **settings), expected
    )
    assert read_file(file)[1]["title"] == "你好"


def test_what_cannot_be_saved(load, tmp_path):
    model, file = load("chatglm3-6b"), tmp_path / "cache"
    with pytest.raises(ValueError, match="holds no tokens .*generate first"):
        model.save_cache(file)
    ids = prompt(model, 30)
    for _ in range(8):
        model.generate(ids, num_beams=4, max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
        if None in [model.engine.state.stored_row(row) for row in range(model.engine.batch_size)]:
            break
    with pytest.raises(ValueError, match="holds the beams of a search"):
        model.save_cache(file)
    model(ids)
    with pytest.raises(OSError, match="nowhere"):
        model.save_cache(tmp_path / "nowhere" / "cache")
    assert not list(tmp_path.iterdir())
    stateful = load("chatglm3-6b", attention="openvino")
    for call in (stateful.save_cache, stateful.load_cache):
        with pytest.raises(ValueError, match="Only native attention"):
            call(file)


def test_what_cannot_be_loaded(load, tmp_path, monkeypatch):
    model, file = load("chatglm3-6b"), tmp_path / "cache"
    past = model(prompt(model, 30)).past_key_values
    model.save_cache(file)
    content = file.read_bytes()
    with pytest.raises(FileNotFoundError):
        model.load_cache(tmp_path / "nothing")
    for other in (load("chatglm3-6b-32k"), load("chatglm3-6b", ov_config={"KV_CACHE_PRECISION": "u8"})):
        with pytest.raises(CacheFileError, match="of another model, or were computed with other settings"):
            other.load_cache(file)
    for damaged in (content[:-1], content[: len(content) // 2], b"", b"{}", content[:-1] + bytes([content[-1] ^ 1])):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(CacheFileError, match="damaged: no whole file of keys and values"):
            model.load_cache(tmp_path / "damaged")
    monkeypatch.setattr(model.engine.state, "max_tokens", 29)  # config.json may say less than when it was saved
    with pytest.raises(CacheFileError, match="30 tokens exceed the context length of 29"):
        model.load_cache(file)
    assert past.get_seq_length() == 30  # the model holds what it held


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm3-6b"])
def test_tensors_that_are_not_those_of_the_model(load, tmp_path, name):
    model, file = load(name), tmp_path / "cache"
    model(prompt(model, 30))
    model.save_cache(file)
    tensors, metadata = read_file(file)
    changes = {
        "input_ids": [np.zeros((1 << 20, 1), np.int64), np.zeros(30, np.int64), np.zeros((1, 0), np.int64)],
        "attention_mask": [np.ones((1, 29), np.int64), np.ones((1, 30), np.int32)],
        "blocks": [tensors["blocks"][:, 1:]],
        "prompt_layout": [np.zeros((2, 2), np.int32)] if name == "chatglm-6b" else [],
    }
    for changed, values in changes.items():
        for value in values:
            write_file(file, {**tensors, changed: value}, metadata)
            with pytest.raises(CacheFileError, match="does not hold what it must"):
                model.load_cache(file)
    write_file(file, tensors, metadata)
    assert model.load_cache(file).get_seq_length() == 30


def test_a_file_that_cannot_be_replaced_stays(load, tmp_path):
    model, file = load("chatglm3-6b"), tmp_path / "cache"
    model(prompt(model, 30))
    model.save_cache(file)
    content = file.read_bytes()
    let_others_read(tmp_path)  # and not write
    assert "PermissionError" in in_child(lambda: model.save_cache(file), as_nobody=True)
    assert file.read_bytes() == content and len(list(tmp_path.iterdir())) == 1
