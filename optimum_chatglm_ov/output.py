# SPDX-License-Identifier: Apache-2.0
"""Output folders that get all of their new files or none of them."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .errors import ExportError
from .signals import signals_wait


# How the names of hidden folders begin that are only there while an output is written.
UNFINISHED = ".chatglm-ov-"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def complete_folder(output: str | Path, replaces: Collection[str] = ()) -> Iterator[Path]:
    """Yields a hidden folder inside `output`; its files move into `output` when the block ends without an exception.

    There they replace the files of the same names and those named in `replaces`; nothing else is touched. An exception
    leaves `output` as it was; Ctrl-C and SIGTERM wait while files are moved. Not even a process that is killed then
    leaves files of both sets side by side, and what it has hidden is cleared away by the next one.

    Raises:
        ExportError: `output` is a file, may not be written to, is being written to by another process, or its disk is
            full.
    """
    output = Path(os.path.realpath(output))
    if os.path.lexists(output) and not output.is_dir():
        raise ExportError(f"{output}: must be a folder, but a file of that name exists. Choose another name.")
    missing = [folder for folder in (output, *output.parents) if not os.path.lexists(folder)]
    with ExitStack() as cleaning:
        for folder in reversed(missing):
            cleaning.callback(_remove_if_empty, folder)
        try:
            output.mkdir(parents=True, exist_ok=True)
            cleaning.enter_context(_locked(output))
            with signals_wait():  # once the folder is there, it is known where to clean up
                folder = Path(tempfile.mkdtemp(prefix=UNFINISHED, suffix=".partial", dir=output))
                cleaning.callback(shutil.rmtree, folder, ignore_errors=True)
        except OSError as error:
            raise ExportError(
                f"{output}: cannot write to this folder ({error.strerror or error}). Choose one that you may write to."
            ) from error
        try:
            yield folder
            with signals_wait():
                _take_place(folder, output, replaces)
        except (OSError, RuntimeError) as error:
            reason = _writing_failed(error, output)
            if reason is None:
                raise
            raise ExportError(
                f"{output}: writing failed ({reason}); nothing was changed there. Free disk space or choose another "
                "output folder."
            ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing to `folder`, and clears away what is left of those that were killed.

    Raises:
        ExportError: another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ExportError(
                f"{folder}: another process is writing to this folder. Wait for its end or choose another folder."
            ) from error
        except OSError:  # a file system without locks: nothing tells what is left over from what is in use
            pass
        else:
            for abandoned in folder.glob(f"{UNFINISHED}*.partial"):
                shutil.rmtree(abandoned, ignore_errors=True)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may have the descriptor, too
        os.close(descriptor)


def _take_place(folder: Path, output: Path, replaces: Collection[str]) -> None:
    """Moves the files of `folder` into `output`, and those that they replace out of it, or changes nothing."""
    new = sorted(os.listdir(folder))
    replaced = [name for name in sorted({*new, *replaces}) if _is_file(output / name)]
    earlier = Path(tempfile.mkdtemp(prefix=UNFINISHED, suffix=".earlier", dir=output))
    # whoever stops this finds files of one set: the last one of the earlier set leaves before the first one comes
    moves = [(output / name, earlier / name) for name in replaced] + [(folder / name, output / name) for name in new]
    done = []
    try:
        for source, target in moves:
            os.rename(source, target)
            done.append((source, target))
    except BaseException as error:
        try:
            for source, target in reversed(done):
                os.rename(target, source)
            earlier.rmdir()
        except OSError as failure:
            raise ExportError(
                f"{output}: the new files could not be moved here ({error}), nor the earlier ones back ({failure}). "
                f"These are in {earlier}; move them when the folder can be written to again."
            ) from error
        raise
    for obsolete in output.glob(f"{UNFINISHED}*.earlier"):
        shutil.rmtree(obsolete, ignore_errors=True)
    _remove_if_empty(folder)


def _is_file(path: Path) -> bool:
    return path.is_symlink() or path.is_file()


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _writing_failed(error: OSError | RuntimeError, output: Path) -> str | None:
    """Tells why `output` could not be written; `None` if `error` is about something else, such as an input."""
    if not isinstance(error, OSError):
        return "no space left on the disk, or it failed" if "iostream" in str(error) else None  # OpenVINO's way
    files = [os.path.realpath(str(name)) for name in (error.filename, error.filename2) if name is not None]
    if not files:
        return error.strerror if error.errno in _NO_SPACE else None
    written = next((file for file in files if Path(file).is_relative_to(output)), None)
    return written and f"{error.strerror}: {written}"
