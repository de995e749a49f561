# SPDX-License-Identifier: Apache-2.0
"""The model that comes with the package, exported once into the user's cache."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock

from .. import export_model
from ..assets import TINY_CHATGLM3
from ..errors import ExportError
from ..ir import has_openvino_model
from .arguments import package_version
from .progress import export_progress


@contextmanager
def embedded_model(weight_format: str | None = None) -> Iterator[Path]:
    """Yields the folder of the embedded model's IR, from the cache or a temporary folder if that cannot be written."""
    folder = cache_folder(weight_format)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not has_openvino_model(folder):
                _export(folder, weight_format)
    except (OSError, ExportError) as error:
        reason = getattr(error, "strerror", None) or error
    else:
        yield folder
        return
    print(f"The cache {folder.parent} cannot be used ({reason}); using a temporary folder.", file=sys.stderr)
    with TemporaryDirectory(prefix="optimum_chatglm_ov-") as temporary:
        yield _export(Path(temporary) / folder.name, weight_format)


def cache_folder(weight_format: str | None = None) -> Path:
    """Where the embedded model's IR is kept: another folder for each version, content and precision."""
    # the standard for user folders says that a relative path is to be ignored
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = base if base.is_absolute() else Path.home() / ".cache"
    content = hashlib.sha256()
    for file in sorted(TINY_CHATGLM3.iterdir()):
        content.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    key = f"{TINY_CHATGLM3.name}-{package_version()}-{content.hexdigest()[:12]}-{weight_format or 'default'}"
    return base / "optimum_chatglm_ov" / key


def _export(folder: Path, weight_format: str | None) -> Path:
    with export_progress() as progress:
        return export_model(TINY_CHATGLM3, folder, weight_format=weight_format, progress=progress)
