# SPDX-License-Identifier: Apache-2.0
"""Output folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ExportError


@contextmanager
def complete_folder(output: str | Path, replaces: Collection[str] = ()) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place when the block ends without an exception.

    Files of an earlier `output` that the new one does not have are kept, but for those named in `replaces`. After an
    exception (also Ctrl-C) the temporary folder is removed and `output` is as it was.

    Raises:
        ExportError: `output` is a file, or its parent cannot be written to, or the disk is full.
    """
    output = Path(os.path.realpath(output))
    if output.exists() and not output.is_dir():
        raise ExportError(
            f"{output}: the output must be a folder, but a file of that name exists. Choose another name."
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    except OSError as error:
        raise ExportError(
            f"{output.parent}: cannot create a folder here ({error.strerror or error}). Choose an output folder that "
            "you may write to."
        ) from error
    try:
        folder.chmod(0o777 & ~_umask())  # mkdtemp makes folders that only the owner can read
        yield folder
        _take_place(folder, output, replaces)
    except OSError as error:
        raise _writing_failed(output, error.strerror or str(error)) from error
    except RuntimeError as error:
        if "iostream" not in str(error):  # how OpenVINO reports that a write failed
            raise
        raise _writing_failed(output, "no space left on the disk, or it failed") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _writing_failed(output: Path, reason: str) -> ExportError:
    return ExportError(
        f"{output}: writing failed ({reason}); nothing was changed there. Free disk space or choose another "
        "output folder."
    )


def _take_place(folder: Path, output: Path, replaces: Collection[str]) -> None:
    if not output.exists():
        os.rename(folder, output)
        return
    if not os.access(output, os.W_OK):
        raise PermissionError(13, "Permission denied", str(output))
    if os.path.ismount(output):  # it cannot be renamed: its files are replaced one by one
        names = {entry.name for entry in folder.iterdir()}
        try:
            for name in names:
                shutil.copy2(folder / name, output / f".{name}.partial")
            for name in names:
                os.replace(output / f".{name}.partial", output / name)
        finally:
            for name in names:
                (output / f".{name}.partial").unlink(missing_ok=True)
        for name in set(replaces) - names:
            (output / name).unlink(missing_ok=True)
        return
    earlier = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".earlier", dir=output.parent))
    try:
        os.rename(output, earlier)
        os.rename(folder, output)
    except BaseException:
        if not output.exists():
            os.rename(earlier, output)
        shutil.rmtree(earlier, ignore_errors=True)
        raise
    for entry in earlier.iterdir():
        if entry.name not in replaces and not (output / entry.name).exists():
            os.rename(entry, output / entry.name)
    shutil.rmtree(earlier, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
