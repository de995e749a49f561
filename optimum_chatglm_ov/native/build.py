# SPDX-License-Identifier: Apache-2.0
"""Finds or builds the library of native operations for the installed OpenVINO.

A library fits one OpenVINO build. A wheel may carry it in `native/prebuilt`. Else it comes from the cache of earlier
builds, or CMake builds it from the sources in `native/cpp`, once, in about half a minute.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openvino
from filelock import FileLock

from .. import environment
from ..errors import ChatGLMError


SOURCE_DIR = Path(__file__).parent / "cpp"
PREBUILT_DIR = Path(__file__).parent / "prebuilt"
LIBRARY_NAME = "libchatglm_attention.so"
_FLAGS = ("CXXFLAGS", "CPPFLAGS", "LDFLAGS")


class NativeBuildError(ChatGLMError, RuntimeError):
    """The native library is not there and cannot be built here; the message says what is missing."""


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def prebuilt_path() -> Path:
    """Names the place where a wheel carries the library for the installed OpenVINO and this kind of machine."""
    return PREBUILT_DIR / _slug(f"{openvino.get_version()}-{platform.machine()}") / LIBRARY_NAME


def _sources() -> list[Path]:
    patterns = ("CMakeLists.txt", "*/*.?pp")
    return sorted(path for pattern in patterns for path in SOURCE_DIR.glob(pattern))


def _compiler() -> str:
    """Finds the C++ compiler: `$CXX`, or c++, g++ or clang++ on the path."""
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            return path
    if chosen:
        raise NativeBuildError(f"CXX is {chosen!r}, which is no program on the path: name a C++ compiler, or unset it")
    raise NativeBuildError(
        "no C++ compiler found (looked for c++, g++, clang++): install one, for example Debian's package g++"
    )


@functools.lru_cache(maxsize=8)
def _compiler_version(compiler: str) -> str:
    try:
        result = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"the C++ compiler {compiler} does not run: {error}") from error
    return f"{compiler} {result.stdout.partition(chr(10))[0]}"


def _cmake() -> str:
    """Finds CMake: on the path, or in the PyPI package `cmake`."""
    path = shutil.which("cmake")
    if path:
        return path
    if importlib.util.find_spec("cmake"):
        from cmake import CMAKE_BIN_DIR

        return os.path.join(CMAKE_BIN_DIR, "cmake")
    raise NativeBuildError("no CMake found: pip install cmake")


def built_path() -> Path:
    """Names the place in the cache of the library for the installed OpenVINO, these sources and this compiler.

    Without a compiler it is one that was built with any; raises `NativeBuildError` if there is none.
    """
    digest = hashlib.sha256()
    for text in (openvino.get_version(), platform.machine()):
        digest.update(text.encode() + b"\0")
    for source in _sources():
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    name = f"{_slug(openvino.get_version())}-{digest.hexdigest()[:16]}"
    try:
        folder = environment.cache_dir() / "native" / name
    except environment.CacheFolderError as error:
        raise NativeBuildError(str(error)) from error
    try:
        compiler = _compiler_version(_compiler())
    except NativeBuildError:
        built = sorted(folder.glob(f"*/{LIBRARY_NAME}"))
        if not built or os.environ.get("CXX"):
            raise
        return built[0]
    return folder / hashlib.sha256(compiler.encode()).hexdigest()[:16] / LIBRARY_NAME


def _run(command: list[str]) -> None:
    # flags for other programs: -march=native, for one, would end the choice of kernels on the CPU they run on
    environment = {name: value for name, value in os.environ.items() if name not in _FLAGS}
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    except OSError as error:
        raise NativeBuildError(f"{command[0]} does not run: {error}") from error
    if result.returncode:
        lines = result.stdout.strip().splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines
        raise NativeBuildError(
            f"building the native operations failed: `{' '.join(command)}` returned {result.returncode}:\n"
            + "\n".join(errors[:20])
        )


def _compile(target: Path) -> None:
    """Builds in a folder beside the target and renames, so that the target is complete whenever it exists."""
    compiler, cmake = _compiler(), _cmake()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        configure = [cmake, "-S", str(SOURCE_DIR), "-B", folder, "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DCMAKE_CXX_COMPILER={compiler}"]
        _run([*configure, f"-DOpenVINO_DIR={Path(openvino.__file__).parent / 'cmake'}"])
        _run([cmake, "--build", folder, "--target", "chatglm_attention", "--parallel"])
        os.replace(Path(folder, LIBRARY_NAME), target)


def build_native(force: bool = False) -> Path:
    """Builds the library unless it is cached (or always, with `force`) and returns its path.

    Safe when several processes start at once: one builds, the others wait for it. Raises `NativeBuildError`.
    """
    if not sys.platform.startswith("linux"):
        raise NativeBuildError(f"the native operations are built on Linux only, found {sys.platform}")
    target = built_path()
    if target.is_file() and not force:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target.parent}.lock"):
            if target.is_file() and not force:
                return target
            start = time.monotonic()
            print(f"Building the native operations for OpenVINO {openvino.get_version()}, once ...", file=sys.stderr)
            _compile(target)
            print(f"... done in {time.monotonic() - start:.0f} s: {target}", file=sys.stderr)
    except OSError as error:
        raise NativeBuildError(
            f"cannot write to {target.parent}: {error}; set {environment.CACHE} to a writable folder"
        ) from error
    return target


def extension_path() -> Path:
    """Finds the library for the installed OpenVINO: carried by the package, cached, or built now.

    Raises `NativeBuildError`.
    """
    prebuilt = prebuilt_path()
    return prebuilt if prebuilt.is_file() else build_native()
