# SPDX-License-Identifier: Apache-2.0
"""An export is complete or leaves nothing: without room, without permission, interrupted, or after an error."""

import os
import shutil
import signal
import textwrap

import pytest
from conftest import DATA, content, in_child, let_others_read

from optimum_chatglm_ov import CheckpointError, export_model


SOURCE = DATA / "models" / "chatglm3-6b"


def run(python, script, *arguments):
    return python.run(["-c", textwrap.dedent(script), SOURCE, *arguments])


def test_failed_export_leaves_the_earlier_one(tmp_path):
    output = export_model(SOURCE, tmp_path / "ir")
    (output / "notes.txt").write_text("mine")
    before = content(output)
    source = shutil.copytree(SOURCE, tmp_path / "source", copy_function=shutil.copyfile)
    os.truncate(next(source.glob("*-00002-*")), 100)
    with pytest.raises(CheckpointError):
        export_model(source, output)
    assert content(output) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ir", "source"]

    export_model(SOURCE, output, weight_format="int8")
    after = content(output)
    assert after["openvino_model.bin"] != before["openvino_model.bin"]
    assert after["notes.txt"] == b"mine"


def test_no_write_permission(tmp_path):
    let_others_read(tmp_path)
    (tmp_path / "closed").mkdir(mode=0o555)
    error = in_child(lambda: export_model(SOURCE, tmp_path / "closed" / "ir"), as_nobody=True)
    assert error.startswith(f"ExportError: {tmp_path}/closed/ir: cannot write to this folder")
    assert not list((tmp_path / "closed").iterdir())


@pytest.mark.parametrize("limit", [1000, 20_000, 200_000])
def test_full_disk(limit, tmp_path, python):
    """In a process whose files cannot grow beyond `limit` bytes."""
    output = tmp_path / "ir"
    output.mkdir()
    (output / "earlier").write_text("kept")
    script = """
        import resource, signal, sys
        from optimum_chatglm_ov import ChatGLMError, export_model
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
        try:
            export_model(sys.argv[1], sys.argv[2])
        except ChatGLMError as error:
            print("refused:", error)
    """
    done = run(python, script, output, limit)
    assert "refused:" in done.stdout, done.stdout + done.stderr
    assert content(output) == {"earlier": b"kept"}
    assert [path.name for path in tmp_path.iterdir()] == ["ir"]


@pytest.mark.usefixtures("may_mount")
@pytest.mark.parametrize("kilobytes, weight_format", [(40, "original"), (200, "int8"), (400, "fp32")])
def test_full_tmpfs(kilobytes, weight_format, tmp_path, python):
    """On a real file system without room: the error comes from wherever the space ends, and what was there stays."""
    script = """
        import os, sys
        from fork_server import mount_tmpfs
        from optimum_chatglm_ov import ChatGLMError, export_model
        _, source, disk, size, weight_format = sys.argv
        mount_tmpfs(disk, f"size={size}")
        os.makedirs(f"{disk}/ir")
        open(f"{disk}/ir/earlier", "w").write("kept")
        try:
            export_model(source, f"{disk}/ir", weight_format=weight_format)
        except ChatGLMError as error:
            print("refused:", error)
        print([(folder, sorted(files)) for folder, _, files in os.walk(disk)], open(f"{disk}/ir/earlier").read())
    """
    done = run(python, script, tmp_path, f"{kilobytes}k", weight_format)
    lines = done.stdout.splitlines()
    assert lines and lines[0].startswith(f"refused: {tmp_path}"), done.stdout + done.stderr
    assert lines[-1] == f"{[(str(tmp_path), []), (str(tmp_path / 'ir'), ['earlier'])]} kept"


@pytest.mark.usefixtures("may_mount")
def test_mount_point_in_a_read_only_folder(tmp_path, python):
    """As a container has it: nothing can be made beside the output, nor can the output itself be renamed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = """
        import os, shutil, subprocess, sys
        from fork_server import mount_tmpfs
        from optimum_chatglm_ov.cli.main import main
        _, source, disk, kept = sys.argv
        mount_tmpfs(disk, "size=50%")
        os.mkdir(f"{disk}/ir")
        mount_tmpfs(f"{disk}/ir", "size=50%")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        open(f"{disk}/ir/notes", "w").write("mine")
        for weight_format in ("original", "int8"):
            assert main(["export", source, f"{disk}/ir", "--weight-format", weight_format]) == 0
        print(*os.listdir(f"{disk}/ir"))
        shutil.copy(f"{disk}/ir/openvino_model.bin", kept)
    """
    done = run(python, script, disk, tmp_path)
    output = export_model(SOURCE, tmp_path / "ir", weight_format="int8")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()[-1].split()) == sorted([*os.listdir(output), "notes"])
    assert (tmp_path / "openvino_model.bin").read_bytes() == (output / "openvino_model.bin").read_bytes()


def test_interrupted_export(tmp_path, python):
    script = """
        import os, signal, sys
        from optimum_chatglm_ov import export_model
        def progress(description, done, total):
            if done == total:
                os.kill(os.getpid(), signal.SIGINT)
        export_model(sys.argv[1], sys.argv[2], progress=progress)
    """
    done = run(python, script, tmp_path / "ir")
    assert done.returncode in (-signal.SIGINT, 1) and "KeyboardInterrupt" in done.stderr
    assert not list(tmp_path.iterdir())


def test_interrupted_compression(tmp_path, python):
    folder = export_model(SOURCE, tmp_path / "ir")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    script = """
        import signal, sys
        import nncf
        from optimum_chatglm_ov import export_model
        compress = nncf.compress_weights
        def interrupted(*args, **kwargs):
            print("compressing")
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            return compress(*args, **kwargs)
        nncf.compress_weights = interrupted
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        export_model(sys.argv[1], sys.argv[2], weight_format="int4")
    """
    done = run(python, script, folder)
    assert done.returncode in (-signal.SIGINT, 1) and done.stdout == "compressing\n", done.stdout + done.stderr
    assert "KeyboardInterrupt" in done.stderr
    assert list(tmp_path.iterdir()) == [folder]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("when", ["during", "after"])
def test_interrupts_and_calibration(when, tmp_path, python):
    """What NNCF ran to see activations is gone by then, with the stack for signals that OpenVINO had made."""
    script = """
        import os, signal, sys, time
        import nncf
        from optimum_chatglm_ov import export_model
        def interrupt():
            os.kill(os.getpid(), signal.SIGINT)
            end = time.monotonic() + 60
            while time.monotonic() < end:
                pass
        compress = nncf.compress_weights
        def interrupted(*args, **kwargs):
            compress(*args, **kwargs)
            interrupt()
        if sys.argv[3] == "during":
            nncf.compress_weights = interrupted
        settings = {"bits": 4, "group_size": 32, "scale_estimation": True, "num_samples": 2}
        export_model(sys.argv[1], sys.argv[2], quantization_config=settings, dataset=["The quick brown fox. "] * 20)
        interrupt()
    """
    done = run(python, script, tmp_path / "ir", when)
    assert done.returncode in (-signal.SIGINT, 1) and "KeyboardInterrupt" in done.stderr, done.stderr
    assert os.listdir(tmp_path) == ([] if when == "during" else ["ir"])
