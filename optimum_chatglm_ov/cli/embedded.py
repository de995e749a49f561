# SPDX-License-Identifier: Apache-2.0
"""The model that comes with the package, exported once into the user's cache."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock

from .. import export_model
from ..assets import TINY_CHATGLM3
from ..environment import cache_dir, package_version
from ..errors import ExportError
from ..ir import has_openvino_model
from .progress import export_progress


@contextmanager
def embedded_model(weight_format: str | None = None) -> Iterator[Path]:
    """Yields the folder of the embedded model's IR, from the cache or a temporary folder if that cannot be written."""
    try:
        folder = cache_folder(weight_format)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not has_openvino_model(folder):
                _export(folder, weight_format)
    except (OSError, ExportError) as error:
        reason = error
    else:
        yield folder
        return
    print(f"The exported model cannot be kept ({reason}); using a temporary folder.", file=sys.stderr)
    with TemporaryDirectory(prefix="optimum_chatglm_ov-") as temporary:
        yield _export(Path(temporary) / TINY_CHATGLM3.name, weight_format)


def cache_folder(weight_format: str | None = None) -> Path:
    """Names the folder of the embedded model's IR: another one for each version, content and precision."""
    content = hashlib.sha256()
    for file in sorted(TINY_CHATGLM3.iterdir()):
        content.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    key = f"{TINY_CHATGLM3.name}-{package_version()}-{content.hexdigest()[:12]}-{weight_format or 'default'}"
    return cache_dir() / key


def _export(folder: Path, weight_format: str | None) -> Path:
    with export_progress() as progress:
        return export_model(TINY_CHATGLM3, folder, weight_format=weight_format, progress=progress)
