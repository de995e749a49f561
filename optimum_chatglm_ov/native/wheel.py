# SPDX-License-Identifier: Apache-2.0
"""Puts the built library into the source folder of this package, for a wheel that carries it.

`python -m optimum_chatglm_ov.native.wheel` prints the platform tag of such a wheel.
"""

from __future__ import annotations

import platform
import re
import shutil
from pathlib import Path

from .build import build_native, prebuilt_path


def carry_library() -> Path:
    """Builds the library for the installed OpenVINO, copies it to where a wheel takes it along, and returns that path.

    Raises `NativeBuildError`.
    """
    target = prebuilt_path()
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(build_native(), target))


def platform_tag(library: Path) -> str:
    """Returns the platform tag of PEP 600 for a library: the lowest version of glibc that has what it asks for."""
    versions = re.findall(rb"\bGLIBC_(\d+)\.(\d+)", library.read_bytes())
    major, minor = max((int(major), int(minor)) for major, minor in versions)
    return f"manylinux_{major}_{minor}_{platform.machine()}"


if __name__ == "__main__":
    print(platform_tag(carry_library()))
