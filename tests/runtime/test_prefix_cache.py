# SPDX-License-Identifier: Apache-2.0
"""Beginnings of prompts are computed once: what an engine, a store in memory, or a folder holds of them."""

import logging
import shutil

import numpy as np
import pytest
import torch
from reuse_fuzz import ReuseFuzz
from reuse_models import CHATGLM3, PIECE, Computed, answer, assert_same, files_of, prompt, stored

from optimum_chatglm_ov import OVChatGLMForCausalLM
from optimum_chatglm_ov.choices import size_in_bytes
from optimum_chatglm_ov.runtime.reuse.stores import PrefixMemory


pytest_plugins = ["reuse_models"]

NAMES = ("chatglm-6b", "chatglm2-6b-ptuning-v2", "chatglm3-6b", "glm4")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["memory", "folder"])
def test_a_prompt_is_computed_once(load, fresh, tmp_path, name, where):
    model = load(name, prefix_cache=True if where == "memory" else tmp_path)
    computed, is_whole = Computed(model), name == "chatglm-6b"
    first, other = prompt(model, 150, 1), prompt(model, 140, 2)
    longer = torch.cat((first, prompt(model, 20, 3)), dim=1)
    branch = torch.cat((first[:, :70], other), dim=1)
    kept = 1 if is_whole else (150 + 5 * ("ptuning" in name)) % PIECE  # tokens behind the last whole piece
    for ids, expected in [(first, 150), (first, 1), (other, 140), (first, kept), (longer, 20), (branch, 140)]:
        assert_same(answer(model, ids), answer(fresh(name), ids))
        if is_whole:  # the context ends before `<sop>`, or is another one
            expected = {20: 20, 140: ids.shape[1]}.get(expected, expected)
        assert computed.first() == expected


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b-ptuning-v2", CHATGLM3])
@pytest.mark.parametrize("precision", ["f32", "bf16", "u8"])
def test_logits_are_bit_identical_to_those_of_the_run_that_wrote(load, tmp_path, name, precision):
    config = {"KV_CACHE_PRECISION": precision}  # all else by default
    writer = load(name, ov_config=config, prefix_cache=tmp_path)
    length = 2 * PIECE + 10 if name == "chatglm-6b" else 2 * PIECE - 5 * ("ptuning" in name)
    begin, more = prompt(writer, length), torch.tensor([[7, 8, 9]])
    if name == "chatglm-6b":  # what is kept ends before `<sop>`
        begin, more = begin[:, :-1], torch.cat((begin[:, -1:], more), dim=1)
        whole = torch.cat((begin, more), dim=1)
        writer(whole, logits_to_keep=1)
        past = writer.load_cache(saved(writer, tmp_path / "x"))
        past.crop(length - 1)
    else:
        past = writer(begin, logits_to_keep=1).past_key_values
    expected = writer(more, past_key_values=past, logits_to_keep=more.shape[1]).logits
    stored(writer)
    reader = load(name, ov_config=config, prefix_cache=tmp_path)
    computed = Computed(reader)
    found = reader(torch.cat((begin, more), dim=1), logits_to_keep=more.shape[1]).logits
    assert computed.first() == more.shape[1]
    assert torch.equal(found, expected)


def saved(model, file):
    model.save_cache(file)
    return file


@pytest.mark.parametrize("name", ["chatglm2-6b-ptuning-v2", CHATGLM3])
def test_a_batch_over_one_document_computes_what_differs(load, fresh, name):
    model = load(name, prefix_cache=True)
    document = prompt(model, 2 * PIECE + 1)
    answer(model, torch.cat((document, prompt(model, 3, 1)), dim=1))
    questions = [prompt(model, length, length)[0] for length in (4, 9, 17)]
    rows = [torch.cat((document[0], question)) for question in questions]
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat((torch.zeros(longest - len(row), dtype=torch.long), row)) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    computed = Computed(model)
    assert_same(answer(model, ids, attention_mask=mask), answer(fresh(name), ids, attention_mask=mask))
    assert computed.first() < PIECE
    beams = {"num_beams": 3, "attention_mask": mask}
    assert_same(answer(model, ids, **beams), answer(fresh(name), ids, **beams))
    assert computed.first() < PIECE


def test_two_conversations_that_take_turns(load, fresh):
    model = load()
    computed, texts = Computed(model), [prompt(model, 130, seed) for seed in (1, 2)]
    for turn in range(3):
        for i, text in enumerate(texts):
            found = model.generate_turn(prompt=text, max_new_tokens=3, pad_token_id=0, do_sample=False)
            assert torch.equal(found, answer(fresh(), text).sequences)
            assert (computed.first() < PIECE + 12) == bool(turn)
            texts[i] = torch.cat((found, prompt(model, 8, turn)), dim=1)
    answer(model, texts[0])
    assert computed.first() == texts[0].shape[1]  # not asked for beyond conversations


def test_a_conversation_that_goes_on_is_not_copied(load):
    model = load()
    text = prompt(model, 130)
    for turn in range(3):
        found = model.generate_turn(prompt=text, max_new_tokens=3, pad_token_id=0, do_sample=False)
        assert not model._prefixes.store.bytes
        text = torch.cat((found, prompt(model, 70, turn)), dim=1)
    model.generate_turn(prompt=prompt(model, 9), max_new_tokens=3, pad_token_id=0, do_sample=False)
    assert model._prefixes.store.bytes


@pytest.mark.parametrize("how", ["beams", "interrupt"])
def test_a_conversation_outlives_a_call_after_which_the_engine_lacks_it(load, how):
    model = load(prefix_cache=True)
    text = answer(model, prompt(model, 3 * PIECE)).sequences
    more = torch.cat((text, prompt(model, 9)), dim=1)
    if how == "beams":
        answer(model, more, num_beams=3)
    else:
        run, model.engine.run = model.engine.run, _interrupt
        with pytest.raises(KeyboardInterrupt):
            answer(model, more)
        model.engine.run = run
    computed = Computed(model)
    answer(model, more)
    assert computed.first() < PIECE + 12


def _interrupt(inputs):
    raise KeyboardInterrupt


def test_nothing_is_kept_where_that_is_asked_for(load):
    model = load(prefix_cache=False)
    computed, text = Computed(model), prompt(model, 130)
    for _ in range(2):
        model.generate_turn(prompt=text, max_new_tokens=1, do_sample=False, pad_token_id=0)
        assert computed.first() == 130
    model = load(prefix_cache=True)
    computed = Computed(model)
    for _ in range(2):
        answer(model, text, use_cache=False)
        assert computed.lengths == [130, 131, 132]
        computed.lengths.clear()


def test_positions_and_masks_of_the_callers_own_are_computed(load, fresh):
    model = load(prefix_cache=True)
    computed, ids = Computed(model), prompt(model, 130)
    settings = [
        {"position_ids": torch.arange(130)[None] + 3},
        {"attention_mask": (torch.arange(130) % 7 > 0).long()[None]},
        {},
    ]
    for values in settings:
        for _ in range(2):
            found = model(ids, logits_to_keep=1, **values).logits
            torch.testing.assert_close(found, fresh()(ids, logits_to_keep=1, **values).logits, rtol=0, atol=1e-4)
    assert computed.lengths == [130] * 5 + [1]
    assert model(ids).logits.shape[1] == 130  # all logits need all tokens


def test_another_model_or_setting_has_keys_and_values_of_its_own(load, fresh, tmp_path, monkeypatch):
    ways = [{}, {"ov_config": {"KV_CACHE_PRECISION": "u8"}}, {"name": "chatglm3-6b-32k"}, {"load_in_8bit": True}]
    for expected in (130, 130 % PIECE):
        for arguments in ways:
            model = load(**arguments, prefix_cache=tmp_path)
            computed = Computed(model)
            answer(model, prompt(fresh(), 130))
            assert computed.first() == expected
            stored(model)
    assert len(files_of(tmp_path)) == 2 * len(ways)
    monkeypatch.setenv("CHATGLM_OV_ISA", "portable")
    identity = load()._identity()
    monkeypatch.delenv("CHATGLM_OV_ISA")
    assert identity != load()._identity()


def test_memory_has_a_budget():
    store, blocks = PrefixMemory(100), np.zeros(30, np.uint8)
    for key in (b"a", b"b", b"c"):
        store.put(key, blocks)
    store.used([b"a"])
    store.put(b"d", blocks)
    assert [key for key in (b"a", b"b", b"c", b"d") if key in store] == [b"a", b"c", b"d"]
    store.put(b"e", np.zeros(101, np.uint8))
    assert b"e" not in store and store.get(b"a", (30,)) is blocks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefix_cache": 3}, "`prefix_cache` is 3; expected a folder"),
        ({"prefix_cache": ""}, "`prefix_cache` is ''"),
        ({"prefix_cache_size": "much"}, "`prefix_cache_size`: 'much' is no size"),
        ({"prefix_cache_size": -1}, "`prefix_cache_size`: -1 is no size"),
    ],
)
def test_arguments(load, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**arguments)


@pytest.mark.parametrize(("size", "expected"), [("20GB", 20 * 10**9), ("1.5 MiB", 3 << 19), (7, 7), ("512", 512)])
def test_sizes(size, expected):
    assert size_in_bytes(size) == expected


def test_attention_of_openvino_has_nothing_to_keep(load, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        model = load(attention="openvino", prefix_cache=tmp_path)
    assert "needs native attention" in caplog.text
    assert answer(model, prompt(model, 70)).sequences.shape == (1, 73)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["memory", "folder", "small folder"])
@pytest.mark.parametrize("name", NAMES)
def test_random_histories(load, fresh, tmp_path, name, where):
    folder = None if where == "memory" else tmp_path / "cache"
    size = "300KB" if where == "small folder" else None
    models = [load(name, prefix_cache=folder or True, prefix_cache_size=size) for _ in range(2)]
    (tmp_path / "files").mkdir()
    fuzz = ReuseFuzz(models, fresh(name), folder, tmp_path / "files", seed=len(name + where))
    fuzz.run(25 if name == "chatglm-6b" else 60)
    assert 0 < fuzz.computed < fuzz.asked


@pytest.mark.parametrize("name", ["chatglm2-6b-ptuning-v2", CHATGLM3])
def test_equal_pieces_after_other_beginnings_are_others(load, fresh, name):
    model = load(name, prefix_cache=True)
    beginnings, same = [prompt(model, PIECE, seed) for seed in (1, 2)], prompt(model, 2 * PIECE, 3)
    texts = [torch.cat((beginning, same), dim=1) for beginning in beginnings]
    for text in (*texts, *texts):
        assert_same(answer(model, text), answer(fresh(name), text))


@pytest.mark.parametrize("name", ["chatglm2-6b-ptuning-v2", CHATGLM3])
def test_nothing_is_kept_of_tokens_that_a_later_mask_hides(load, fresh, name):
    """The tokens behind them have seen them."""
    model = load(name, prefix_cache=True)
    ids, more, mask = prompt(model, 140, 1), torch.tensor([[7, 8, 9]]), torch.ones((1, 143), dtype=torch.long)
    mask[0, :9] = 0
    past = model(ids, logits_to_keep=1).past_key_values
    model(more, attention_mask=mask, past_key_values=past)
    model(prompt(model, 80, 2), logits_to_keep=1)
    rest = torch.cat((ids[:, 9:], more), dim=1)
    assert_same(answer(model, rest), answer(fresh(name), rest))


def test_a_mask_of_other_numbers_has_positions_of_its_own(load, fresh):
    model = load(prefix_cache=True)
    ids = prompt(model, 140)
    model(ids, logits_to_keep=1)
    mask = 2 * torch.ones_like(ids)
    expected = fresh()(ids, attention_mask=mask, logits_to_keep=1).logits
    for _ in range(2):
        torch.testing.assert_close(model(ids, attention_mask=mask, logits_to_keep=1).logits, expected)


@pytest.mark.parametrize("where", ["_infer", "_advance"])
def test_an_interrupt_leaves_nothing_half_known(load, fresh, where):
    """Also one between the statements that count tokens, after which the engine is gone on with."""
    model = load(prefix_cache=True)
    ids, call = prompt(model, 140), getattr(model.engine, where)
    past = model(ids, logits_to_keep=1).past_key_values

    def interrupted(*arguments):
        call(*arguments)
        raise KeyboardInterrupt

    setattr(model.engine, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(torch.tensor([[7]]), past_key_values=past)
    delattr(model.engine, where)
    more = prompt(model, 60, 3)
    model(more, past_key_values=past)
    model(prompt(model, 80, 2), logits_to_keep=1)
    whole = torch.cat((ids, more), dim=1)
    for text in (whole, torch.cat((ids, more[:, :5], ids), dim=1)):
        assert_same(answer(model, text), answer(fresh(), text))


def test_a_batch_whose_rows_know_different_amounts(load, fresh):
    """What is known of all rows is taken, in a call of which one row ends in the middle of a piece."""
    model = load(prefix_cache=True)
    texts = [prompt(model, length, length) for length in (4 * PIECE + 1, 2 * PIECE + 1)]
    for text in texts:
        answer(model, text)
    answer(model, prompt(model, 9))
    short, long = texts[1][:, : PIECE + 9], texts[0][:, : PIECE + 9]
    for rows in ((long, short), (texts[0], torch.cat((texts[1], prompt(model, 2 * PIECE, 5)), dim=1))):
        ids, computed = torch.cat(rows), Computed(model)
        assert_same(answer(model, ids), answer(fresh(), ids))
        assert computed.first() == ids.shape[1] - (PIECE if len(rows[0][0]) < 2 * PIECE else 2 * PIECE)


def test_a_folder_that_is_exported_anew_below_a_loaded_model(load, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in load().model_save_dir.iterdir():
        shutil.copy2(file, folder / file.name)
    model = OVChatGLMForCausalLM.from_pretrained(folder, attention="native")
    before = model._identity()
    content = (folder / "openvino_model.bin").read_bytes()
    (folder / "new").write_bytes(content[:-64] + bytes(64))
    (folder / "new").replace(folder / "openvino_model.bin")
    other = OVChatGLMForCausalLM.from_pretrained(folder, attention="native")
    assert len({before, model._identity(), other._identity()}) == 3  # `model` is read from memory now


def test_of_a_conversation_that_exceeds_the_budget_the_beginning_is_kept(load, tmp_path):
    ids = prompt(load(), 6 * PIECE + 1)
    piece = 0
    for where in (True, tmp_path / "probe"):
        model = load(prefix_cache=where)
        answer(model, ids)
        answer(model, prompt(model, 9))
        if where is True:
            piece = model._prefixes.store.bytes // 6
    for where in (True, tmp_path / "cache"):
        model = load(prefix_cache=where, prefix_cache_size=int(3.9 * piece))
        computed, other = Computed(model), prompt(model, 9)
        for expected in (6 * PIECE + 1, 3 * PIECE + 1, 3 * PIECE + 1):
            answer(model, ids)
            assert computed.first() == expected
            answer(model, other)
            computed.lengths.clear()
            if where is not True:
                stored(model)
