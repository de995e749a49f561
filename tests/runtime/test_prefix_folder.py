# SPDX-License-Identifier: Apache-2.0
"""Keys and values of prompts in a folder: damage, other users, other processes, limits."""

import json
import logging
import os
import random
import resource
import signal
import stat
import textwrap
import time

import numpy as np
import pytest
from conftest import in_child, let_others_read
from reuse_models import CHATGLM3, PIECE, Computed, answer, assert_same, files_of, prompt, stored
from safetensors.numpy import load_file

from optimum_chatglm_ov.runtime.reuse.files import FORMAT, CacheFileError, read_file, write_file
from optimum_chatglm_ov.runtime.reuse.stores import PrefixCacheError, PrefixFolder


pytest_plugins = ["reuse_models"]

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


CHILDREN = """
    import os
    import sys

    import torch

    from optimum_chatglm_ov import OVChatGLMForCausalLM
    from optimum_chatglm_ov.architectures.registry import architecture_of

    os.fork()  # both do the same
    precise = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    model = OVChatGLMForCausalLM.from_pretrained(
        sys.argv[1], attention="native", ov_config=precise, prefix_cache=sys.argv[2]
    )
    for seed in range(100_000):
        ids = architecture_of(model.config).example_prompt(133, seed)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0)
        print(seed, flush=True)
"""


@pytest.mark.slow
def test_processes_share_a_folder_and_may_be_killed_at_any_moment(load, fresh, exported, python, tmp_path):
    model = load(prefix_cache=tmp_path)
    reading, writing = os.pipe()
    others = python.start(["-c", textwrap.dedent(CHILDREN), exported(CHATGLM3), tmp_path], stdout=writing)
    os.close(writing)
    printed = open(reading, encoding="utf-8")
    firsts = 0
    while firsts < 2:
        line = printed.readline()
        assert line, "they ended"
        firsts += line == "0\n"
    for seed in range(20):
        assert_same(answer(model, ids := prompt(model, 133, seed)), answer(fresh(), ids))
    time.sleep(random.random() / 10)
    os.killpg(others.pid, signal.SIGKILL)
    while printed.readline():  # until both have ended
        pass
    printed.close()
    model = load(prefix_cache=tmp_path)
    assert not list(tmp_path.glob(".*"))
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
    let_others_read(readable)
    raised = in_child(lambda: PrefixFolder(readable, 10), as_nobody=True)
    assert "PrefixCacheError" in raised and "no permission" in raised


def test_a_full_disk_is_one_warning(python, tmp_path, may_mount):
    script = f"""
        from pathlib import Path

        import numpy as np
        from fork_server import mount_tmpfs

        from optimum_chatglm_ov.runtime.reuse.stores import PrefixFolder

        mount_tmpfs("{tmp_path}/disk", "size=900k")
        store = PrefixFolder("{tmp_path}/disk", 10**9)
        for key in (b"a" * 32, b"b" * 32, b"c" * 32):
            store.put(key, np.zeros(400_000, np.uint8))
            store.wait()
        assert store.get(b"a" * 32, (400_000,)) is not None
        assert store.get(b"c" * 32, (400_000,)) is None
        print(len(list(Path("{tmp_path}/disk").iterdir())))
    """
    (tmp_path / "disk").mkdir()
    found = python.run(["-c", textwrap.dedent(script)])
    assert found.stdout == "2\n", found.stderr
    assert found.stderr.count("the prefix cache cannot be written") == 1


def test_a_prompt_of_more_pieces_than_files_may_be_open(load, fresh, tmp_path, caplog):
    model = load(prefix_cache=tmp_path)
    ids = prompt(model, 20 * PIECE + 1)
    answer(model, ids)
    stored(model)
    answer(model, prompt(model, 9))
    limits, used = resource.getrlimit(resource.RLIMIT_NOFILE), len(os.listdir("/proc/self/fd"))
    computed = Computed(model)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 12, limits[1]))
        found = answer(model, ids)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert_same(found, answer(fresh(), ids))
    assert computed.first() == 1 and not caplog.text


def test_a_file_that_cannot_be_read_now_stays(load, tmp_path, monkeypatch, caplog):
    store, key, blocks = PrefixFolder(tmp_path, 10**9), b"a" * 32, np.arange(9, dtype=np.uint8)
    store.put(key, blocks)
    store.wait()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        found = [store.get(key, (9,)) for _ in range(2)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found == [None, None] and caplog.text.count("cannot be read") == 1
    assert np.array_equal(store.get(key, (9,)), blocks)


def test_files_are_safetensors(tmp_path):
    tensors = {"b": np.arange(6, dtype=np.int64).reshape(2, 3), "a": np.zeros((0, 3), np.uint8)}
    for is_synced in (False, True):
        write_file(tmp_path / "x", tensors, {"title": "你好"}, is_synced)
        for found in (load_file(tmp_path / "x"), read_file(tmp_path / "x")[0]):
            assert found.keys() == tensors.keys()
            assert all(np.array_equal(found[name], tensors[name]) for name in tensors)
    assert read_file(tmp_path / "x")[1]["title"] == "你好"
    assert os.listdir(tmp_path) == ["x"]


ENTRY = '"a": {"dtype": "I64", "shape": %s, "data_offsets": %s}'
HEADERS = {
    "a longer header": b"\xff" * 8,
    "petabytes": ENTRY % ([1 << 50], [0, 1 << 53]),
    "numbers beyond f64": ENTRY % ([10**400], [0, 8 * 10**400]),
    "a negative shape": ENTRY % ([-1], [0, -8]),
    "many axes": ENTRY % ([1] * 99, [0, 8]),
    "no numbers": ENTRY % (["x"], [0, "y"]),
    "fractions": ENTRY % ([1.5], [0, 12]),
    "another type": (ENTRY % ([1], [0, 8])).replace("I64", "F64"),
    "deep nesting": '"a": ' + "[" * 100_000,
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_claim_anything(tmp_path, what):
    header = HEADERS[what]
    if isinstance(header, str):
        text = json.dumps({"__metadata__": {"format": FORMAT, "crc32": "0"}})[:-1] + f", {header}}}"
        header = len(text).to_bytes(8, "little") + text.encode()
    (tmp_path / "x").write_bytes(header + bytes(16))
    with pytest.raises(CacheFileError, match="x: no whole file of keys and values"):
        read_file(tmp_path / "x")


def test_pipes_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    before = len(os.listdir("/proc/self/fd"))
    for name, problem in (("pipe", "is no file"), ("folder", "is no file"), ("link", "is a symbolic link")):
        with pytest.raises(CacheFileError, match=f"{name}: {problem}"):
            read_file(tmp_path / name)
    os.mkfifo(tmp_path / ".chatglm-ov-a.partial")
    PrefixFolder(tmp_path, 10)
    assert len(os.listdir("/proc/self/fd")) == before


def test_two_processes_keep_the_size_together(tmp_path):
    stores = [PrefixFolder(tmp_path, 100_000) for _ in range(2)]
    for i in range(60):
        for j, store in enumerate(stores):
            store.put(bytes([i, j]) * 16, np.zeros(1500, np.uint8))
            store.wait()
    assert sum(file.stat().st_size for file in files_of(tmp_path)) < 110_000


def test_a_folder_that_is_removed_is_one_warning(load, fresh, tmp_path, caplog):
    model, ids = load(prefix_cache=tmp_path / "cache"), prompt(load(), PIECE + 5)
    answer(model, ids)
    stored(model)
    for file in files_of(tmp_path / "cache"):
        file.unlink()
    (tmp_path / "cache").rmdir()
    with caplog.at_level(logging.WARNING):
        for seed in (1, 2):
            assert_same(answer(model, ids := prompt(model, PIECE + 5, seed)), answer(fresh(), ids))
            stored(model)
    assert caplog.text.count("cannot be written") == 1
