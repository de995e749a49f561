# SPDX-License-Identifier: Apache-2.0
"""Beginnings of prompts are computed once: what an engine, a store in memory, or a folder holds of them."""

import logging
import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EXACT, ROOT, in_child
from reuse_fuzz import ReuseFuzz

from optimum_chatglm_ov import OVChatGLMForCausalLM
from optimum_chatglm_ov.architectures.registry import architecture_of
from optimum_chatglm_ov.choices import size_in_bytes
from optimum_chatglm_ov.runtime.reuse.stores import PrefixCacheError, PrefixFolder, PrefixMemory


NAMES = ("chatglm-6b", "chatglm2-6b-ptuning-v2", "chatglm3-6b", "glm4")
CHATGLM3 = "chatglm3-6b"
PIECE = 64  # tokens


@pytest.fixture(scope="module")
def load(exported):
    def load(name=CHATGLM3, attention="native", ov_config=EXACT, **arguments):
        model = OVChatGLMForCausalLM.from_pretrained(
            exported(name), attention=attention, ov_config=dict(ov_config), **arguments
        )
        model.generation_config.do_sample = False
        return model

    return load


@pytest.fixture(scope="module")
def fresh(load):
    """A model that computes every prompt."""
    models = {}

    def fresh(name=CHATGLM3):
        if name not in models:
            models[name] = load(name, prefix_cache=False)
        return models[name]

    return fresh


class Computed:
    """Tokens of each row that the engine of a model computes, call by call."""

    def __init__(self, model):
        self.lengths, self._run = [], model.engine.run
        model.engine.run = self._count

    def _count(self, inputs):
        self.lengths.append(inputs["input_ids"].shape[1])
        return self._run(inputs)

    def first(self):
        """Of the first call since the last question."""
        first = self.lengths[0]
        self.lengths.clear()
        return first


def prompt(model, length, seed=0):
    return architecture_of(model.config).example_prompt(length, seed)


def answer(model, ids, **settings):
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    settings = {"max_new_tokens": 3, "pad_token_id": 0, "do_sample": False, **settings}
    return model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings)


def assert_same(found, expected):
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)


def files_of(folder):
    return sorted(Path(folder).glob("*.safetensors"))


def stored(model):
    """Waits until the folder has all that the model has put there."""
    model._prefixes.store.wait()


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


DAMAGE = {
    "truncated": lambda content, other: content[: len(content) // 2],
    "longer": lambda content, other: content + b"x",
    "flipped": lambda content, other: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "empty": lambda content, other: b"",
    "of another": lambda content, other: other,
    "no tensors": lambda content, other: b"\x10\0\0\0\0\0\0\0" + b'{"a":           }',
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_computed_again_and_replaced(load, fresh, tmp_path, caplog, how):
    model = load(prefix_cache=tmp_path)
    ids = prompt(model, 2 * PIECE + 5)
    answer(model, ids)
    stored(model)
    contents = {file: file.read_bytes() for file in files_of(tmp_path)}
    assert len(contents) == 2
    for file, content in contents.items():
        other = next(value for name, value in contents.items() if name != file)
        file.unlink()
        file.write_bytes(DAMAGE[how](content, other))
    for expected in (ids.shape[1], ids.shape[1] - PIECE):  # what comes after the damage is not looked at at first
        model = load(prefix_cache=tmp_path)
        computed = Computed(model)
        caplog.clear()
        assert_same(answer(model, ids), answer(fresh(), ids))
        assert computed.first() == expected
        assert "removed and computed again" in caplog.text
        stored(model)
    computed = Computed(model := load(prefix_cache=tmp_path))
    answer(model, ids)
    assert computed.first() == ids.shape[1] - 2 * PIECE


def test_links_and_files_of_other_users_are_not_read(load, tmp_path):
    model = load(prefix_cache=tmp_path / "cache")
    ids = prompt(model, PIECE + 5)
    answer(model, ids)
    stored(model)
    (file,) = files_of(tmp_path / "cache")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    computed = Computed(model)
    model.clear_requests()
    model.compile()
    computed = Computed(model)
    answer(model, ids)
    assert computed.first() == PIECE + 5
    stored(model)
    assert not file.is_symlink() and (tmp_path / "elsewhere").exists()
    if os.getuid() == 0:
        os.chown(file, 65534, 65534)
        model.clear_requests()
        model.compile()
        computed = Computed(model)
        answer(model, ids)
        assert computed.first() == PIECE + 5


def test_only_its_owner_reads_the_folder(load, tmp_path):
    before = os.umask(0)
    try:
        model = load(prefix_cache=tmp_path / "a" / "cache")
        answer(model, prompt(model, PIECE + 5))
        stored(model)
    finally:
        os.umask(before)
    (file,) = files_of(tmp_path / "a" / "cache")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_what_was_not_used_for_longest_goes_first(load, tmp_path):
    model = load(prefix_cache=tmp_path)
    first, second = prompt(model, 2 * PIECE + 1, 1), prompt(model, 2 * PIECE + 1, 2)
    answer(model, first)
    answer(model, second)
    answer(model, first)
    stored(model)
    size = files_of(tmp_path)[0].stat().st_size
    other = tmp_path / "of somebody else"
    other.write_bytes(b"x" * 10 * size)
    model = load(prefix_cache=tmp_path, prefix_cache_size=int(4.5 * size))
    answer(model, prompt(model, PIECE + 1, 3))
    stored(model)
    assert sum(file.stat().st_size for file in files_of(tmp_path)) <= 4.5 * size and other.exists()
    for text, expected in ((first, 1), (second, PIECE + 1)):  # of the second, the end is gone
        computed = Computed(model := load(prefix_cache=tmp_path))
        answer(model, text)
        assert computed.first() == expected


def test_memory_has_a_budget():
    store, blocks = PrefixMemory(100), np.zeros(30, np.uint8)
    for key in (b"a", b"b", b"c"):
        store.put(key, blocks)
    store.used([b"a"])
    store.put(b"d", blocks)
    assert [key for key in (b"a", b"b", b"c", b"d") if key in store] == [b"a", b"c", b"d"]
    store.put(b"e", np.zeros(101, np.uint8))
    assert b"e" not in store and store.get(b"a", (30,)) is blocks


CHILD = """
    import sys

    import torch

    from optimum_chatglm_ov import OVChatGLMForCausalLM
    from optimum_chatglm_ov.architectures.registry import architecture_of

    precise = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    model = OVChatGLMForCausalLM.from_pretrained(
        sys.argv[1], attention="native", ov_config=precise, prefix_cache=sys.argv[2]
    )
    for seed in range(int(sys.argv[3])):
        ids = architecture_of(model.config).example_prompt(133, seed)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0)
        print(seed, flush=True)
"""


def child(folder, cache, prompts):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(folder), str(cache), str(prompts)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.slow
def test_processes_share_a_folder_and_may_be_killed_at_any_moment(load, fresh, exported, tmp_path):
    model = load(prefix_cache=tmp_path)
    others = [child(exported(CHATGLM3), tmp_path, 100_000) for _ in range(2)]
    for other in others:
        assert other.stdout.readline() == "0\n"
    for seed in range(20):
        assert_same(answer(model, ids := prompt(model, 133, seed)), answer(fresh(), ids))
    time.sleep(random.random() / 10)
    for other in others:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()
    left = list(tmp_path.glob(".*"))
    model = load(prefix_cache=tmp_path)
    assert not list(tmp_path.glob(".*")) or left == []
    computed = Computed(model)
    for seed in range(20):
        assert_same(answer(model, ids := prompt(model, 133, seed)), answer(fresh(), ids))
        assert computed.first() == 5


def test_what_a_killed_process_has_begun_is_cleared_away_and_not_what_is_written_now(tmp_path):
    (tmp_path / ".chatglm-ov-a.partial").write_bytes(b"half")
    busy = tmp_path / ".chatglm-ov-b.partial"
    with busy.open("wb") as stream:
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX)
        PrefixFolder(tmp_path, 10**9)
        assert [file.name for file in tmp_path.iterdir()] == [busy.name]
    PrefixFolder(tmp_path, 10**9)
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_used(load, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PrefixCacheError, match="prefix_cache: .*file cannot be used .*Name a folder"):
        load(prefix_cache=tmp_path / "file")
    readable = tmp_path / "readable"
    readable.mkdir(mode=0o555)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    raised = in_child(lambda: PrefixFolder(readable, 10), as_nobody=True)
    assert "PrefixCacheError" in raised and "no permission" in raised


def test_a_full_disk_is_one_warning(tmp_path, may_mount):
    script = f"""
        import numpy as np, logging
        from pathlib import Path
        from optimum_chatglm_ov.runtime.reuse.stores import PrefixFolder

        store = PrefixFolder("{tmp_path}/disk", 10**9)
        for key in (b"a" * 32, b"b" * 32, b"c" * 32):
            store.put(key, np.zeros(400_000, np.uint8))
            store.wait()
        assert store.get(b"a" * 32, (400_000,)) is not None
        assert store.get(b"c" * 32, (400_000,)) is None
        print(len(list(Path("{tmp_path}/disk").iterdir())))
    """
    (tmp_path / "disk").mkdir()
    script = textwrap.dedent(script)
    mount = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=900k tmpfs {tmp_path}/disk && exec "$@"', "sh"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    found = subprocess.run(
        [*mount, sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert found.stdout == "2\n", found.stderr
    assert found.stderr.count("the prefix cache cannot be written") == 1


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
