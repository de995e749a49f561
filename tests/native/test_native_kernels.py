# SPDX-License-Identifier: Apache-2.0
"""The kernels alone on random problems: under the sanitizers, and with long sequences."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from optimum_chatglm_ov.native import build


HERE = Path(__file__).parent


def build_kernels(folder: Path, *options: str, target: str = "all") -> None:
    """Builds the kernels alone, as the library has them but for these options of CMake."""
    configure = [build._cmake(), "-S", str(build.SOURCE_DIR), "-B", str(folder), "-DBUILD_EXTENSION=OFF"]
    build._run([*configure, f"-DCMAKE_CXX_COMPILER={build._compiler()}", *options])
    build._run([build._cmake(), "--build", str(folder), "--parallel", "--target", target])


def run_tests(folder: Path, choice: str, *options: str, target: str = "all") -> str:
    """Builds tests and benchmarks of the kernels, or `target`, runs tests that `choice` names, returns the output."""
    build_kernels(folder, "-DBUILD_TESTING=ON", f"-DTESTS_DIR={HERE}", *options, target=target)
    ctest = Path(build._cmake()).with_name("ctest")
    command = [ctest, "--test-dir", folder, "--verbose", "--no-tests=error", "-R", choice]
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def assert_enough_attention(output: str) -> None:
    """Every instruction set of this CPU must have had enough to do."""
    steps = dict(re.findall(r"(\S+): (\d+) steps", output))
    assert {"portable", "amx-model"} <= steps.keys() and min(map(int, steps.values())) > 20


@pytest.mark.slow
def test_kernels_under_the_sanitizers(tmp_path):
    """Random shapes and masks, checked for bad addresses, which null is one of, and for undefined behaviour."""
    flags = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize=null -fno-sanitize-recover=all"
    options = "-DCMAKE_BUILD_TYPE=Debug", f"-DCMAKE_CXX_FLAGS_DEBUG={flags}"
    output = run_tests(tmp_path, "fuzz_(attention|linear)$", *options)
    assert_enough_attention(output)
    problems = {name: int(count) for name, count in re.findall(r"(\S+): (\d+) problems", output)}
    assert {"portable", "amx-model"} <= problems.keys() and min(problems.values()) > 40


@pytest.mark.slow
def test_kernels_with_long_sequences(tmp_path, monkeypatch):
    """Up to 300 tokens behind up to 4096 others, some of them loud, in the shapes of the ChatGLM models.

    The flags of the environment, which the compiler does not know, are left out of the build.
    """
    for name in ("CXXFLAGS", "CPPFLAGS", "LDFLAGS"):
        monkeypatch.setenv(name, "--no-such-flag")
    assert_enough_attention(run_tests(tmp_path, "fuzz_attention_long$", target="fuzz_attention"))
