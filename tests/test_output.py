# SPDX-License-Identifier: Apache-2.0
"""An output folder has all of its new files or all of its earlier ones, whatever happens; nothing foreign is touched.

What is to happen at a certain step happens when Python reports it to an audit hook, in a process of its own.
"""

import os
import shutil
import signal
import sys
import tempfile

import pytest
from conftest import in_child, let_others_read

from optimum_chatglm_ov import ExportError
from optimum_chatglm_ov.output import complete_folder
from optimum_chatglm_ov.signals import termination_unwinds


EARLIER = {"model.bin": "earlier", "model.xml": "earlier", "old.json": "earlier"}
NEW = {"config.json": "new", "model.bin": "new", "model.xml": "new"}
FOREIGN = {"README.md": "mine", "folder/notes.txt": "mine"}
MOVES = len(EARLIER) + len(NEW)


@pytest.fixture
def output(tmp_path):
    """A folder that has an earlier set, and files of its owner."""
    output = tmp_path / "output"
    for name, text in (EARLIER | FOREIGN).items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(text)
    (output / "link").symlink_to("nowhere")
    return output


def write(output, replaces=("old.json", "never.json")):
    with complete_folder(output, replaces) as folder:
        for name, text in NEW.items():
            (folder / name).write_text(text)


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def hidden(folder):
    return sorted(path.suffix for path in folder.iterdir() if path.name.startswith("."))


def at_move(number, action):
    """Has `action` run when move `number` of this process begins."""
    moves = iter(range(number + 1))

    def hook(event, arguments):
        if event == "os.rename" and next(moves, None) == number:
            action()

    sys.addaudithook(hook)


def test_new_files_replace_the_earlier_ones_and_no_others(output):
    write(output)
    assert content(output) == NEW | FOREIGN
    assert os.readlink(output / "link") == "nowhere" and not hidden(output)


def test_links_are_replaced_and_not_what_they_point_to(output):
    (output / "config.json").symlink_to("README.md")
    write(output)
    assert content(output) == NEW | FOREIGN and not (output / "config.json").is_symlink()


def test_missing_folders_are_made_and_go_again_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with complete_folder(tmp_path / "a" / "b") as folder:
            (folder / "file").write_text("new")
            1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())
    os.umask(umask := os.umask(0))
    write(tmp_path / "a" / "b")
    assert content(tmp_path) == {f"a/b/{name}": text for name, text in NEW.items()}
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("move", range(MOVES))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_for_the_last_move(number, move, output):
    def interrupted():
        at_move(move, lambda: signal.raise_signal(number))
        write(output)

    assert in_child(interrupted) == ("KeyboardInterrupt" if number == signal.SIGINT else number)
    assert content(output) == NEW | FOREIGN and not hidden(output)


@pytest.mark.parametrize("move", range(MOVES))
def test_killed_while_files_are_moved(move, output):
    """The one thing that cannot wait never leaves files of both sets, and the next process clears up."""

    def killed():
        at_move(move, lambda: os.kill(os.getpid(), signal.SIGKILL))
        write(output)

    assert in_child(killed) == signal.SIGKILL
    found = {name: text for name, text in content(output).items() if not name.startswith(".")}
    assert found.items() <= (EARLIER | FOREIGN).items() or found.items() <= (NEW | FOREIGN).items()
    assert found.items() >= FOREIGN.items() and hidden(output) == [".earlier", ".partial"]
    write(output)
    assert content(output) == NEW | FOREIGN and not hidden(output)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_next_process_removes_what_a_killed_one_wrote(number, output):
    def killed():
        with complete_folder(output) as folder:
            (folder / "model.bin").write_text("half")
            os.kill(os.getpid(), number)

    assert in_child(killed) == number
    assert hidden(output) == [".partial"]
    with pytest.raises(ZeroDivisionError):
        with complete_folder(output):
            1 / 0  # noqa: B018
    assert content(output) == EARLIER | FOREIGN and not hidden(output)


@pytest.mark.parametrize("name", NEW)
def test_a_file_that_cannot_be_moved(name, output):
    """A folder of its name is in the way: those before it, and the earlier ones, are moved back."""
    (output / name).unlink(missing_ok=True)
    (output / name).mkdir()
    (output / name / "inside").write_text("mine")
    before = content(output)
    with pytest.raises(ExportError, match=f"writing failed.*{name}.*nothing was changed"):
        write(output)
    assert content(output) == before and not hidden(output)


def test_earlier_files_that_cannot_be_moved_back_are_kept_and_named(output):
    """As on a disk that turns read-only between two moves."""
    let_others_read(output)
    if os.getuid() == 0:
        for path in (output, *output.rglob("*")):
            os.chown(path, 65534, 65534, follow_symlinks=False)

    def closed():
        at_move(len(EARLIER), lambda: os.chmod(output, 0o555))
        write(output)

    error = in_child(closed, as_nobody=True)
    output.chmod(0o755)
    (earlier,) = output.glob(".*.earlier")
    assert error.startswith("ExportError") and f"in {earlier}; move them" in error
    assert content(earlier) == EARLIER
    assert content(output).items() >= FOREIGN.items()


def test_only_one_process_writes(output):
    with complete_folder(output) as folder:
        (folder / "model.xml").write_text("first")
        error = in_child(lambda: write(output))
        assert error.startswith(f"ExportError: {output}: another process is writing")
    assert content(output) == EARLIER | FOREIGN | {"model.xml": "first"}


def test_a_forked_process_does_not_keep_others_from_writing(output):
    reading, writing = os.pipe()
    with complete_folder(output):
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    write(output)
    os.close(writing)
    os.waitpid(child, 0)
    assert content(output) == NEW | FOREIGN


def test_a_writable_folder_where_no_other_can_be_made(output):
    let_others_read(output)
    output.chmod(0o777)
    output.parent.chmod(0o555)
    try:
        assert in_child(lambda: write(output), as_nobody=True) is None
    finally:
        output.parent.chmod(0o755)
    # files of others may be replaced in a folder that all may write to
    assert content(output) == NEW | FOREIGN


def test_a_folder_that_may_not_be_written_to(output):
    let_others_read(output)
    output.chmod(0o555)
    (output.parent / "closed").mkdir(mode=0o555)
    for folder in (output, output.parent / "closed" / "new"):
        error = in_child(lambda folder=folder: write(folder), as_nobody=True)
        assert error.startswith(f"ExportError: {folder}: cannot write to this folder (Permission denied)")
    output.chmod(0o755)
    assert content(output.parent / "closed") == {} and content(output) == EARLIER | FOREIGN


def test_errors_of_inputs_are_not_errors_of_the_output(output, tmp_path):
    for read in (
        lambda: (tmp_path / "missing").read_text(),
        lambda: tmp_path.read_text(),
        lambda: shutil.copy(tmp_path / "missing", output),
        lambda: os.read(os.open(tmp_path, os.O_RDONLY), 1),
    ):
        with pytest.raises(OSError) as failure:
            with complete_folder(output):
                read()
        assert not isinstance(failure.value, ExportError)
    assert content(output) == EARLIER | FOREIGN and not hidden(output)


def test_errors_of_the_output(output):
    with pytest.raises(ExportError, match="No space left on device"):
        with complete_folder(output), open("/dev/full", "w") as full:
            full.write("new")
    with pytest.raises(ExportError, match="writing failed \\(Is a directory: .*model.bin"):
        with complete_folder(output) as folder:
            (folder / "model.bin").mkdir()
            (folder / "model.bin").write_text("new")
    assert content(output) == EARLIER | FOREIGN and not hidden(output)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_as_soon_as_the_hidden_folder_is_there(number, tmp_path, monkeypatch):
    def mkdtemp(**where):
        folder = original(**where)
        signal.raise_signal(number)
        return folder

    def interrupted():
        with termination_unwinds():
            write(tmp_path / "new" / "output")

    original = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    assert in_child(interrupted) == ("KeyboardInterrupt" if number == signal.SIGINT else "SystemExit: 143")
    assert not list(tmp_path.iterdir())
