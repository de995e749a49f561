# SPDX-License-Identifier: Apache-2.0
"""Wheels with and without the native library, as CONTRIBUTING.md makes them."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from optimum_chatglm_ov.native import build, extension_path
from optimum_chatglm_ov.native.wheel import platform_tag


pytestmark = pytest.mark.slow
GENERATE = """
from optimum_chatglm_ov import OVChatGLMForCausalLM, native
from optimum_chatglm_ov.assets import TINY_CHATGLM3
import torch

model = OVChatGLMForCausalLM.from_pretrained(TINY_CHATGLM3, attention="native")
assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2).shape[1] > 3
print(native.extension_path())
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what a wheel is made from."""
    source = tmp_path_factory.mktemp("wheel") / "source"
    ignored = shutil.ignore_patterns("__pycache__", "prebuilt")
    shutil.copytree(ROOT / "optimum_chatglm_ov", source / "optimum_chatglm_ov", ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


def wheel(source: Path, output: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, *options, "--wheel-dir", output, source], check=True)
    (made,) = output.iterdir()
    return made


def test_the_wheel_without_the_library_is_for_every_platform(source, tmp_path):
    made = wheel(source, tmp_path)
    assert made.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(made).namelist()
    for name in ("py.typed", "hub/model_card.md", "native/cpp/CMakeLists.txt", "assets/tiny-chatglm3/config.json"):
        assert f"optimum_chatglm_ov/{name}" in names
    assert not any(name.endswith(".so") for name in names)


def test_a_wheel_with_the_library_needs_no_compiler(source, tmp_path):
    library = extension_path()
    carried = source / build.prebuilt_path().relative_to(ROOT)
    carried.parent.mkdir(parents=True)
    shutil.copy(library, carried)
    tag = platform_tag(library)
    made = wheel(source, tmp_path / "wheels", f"-C--build-option=--plat-name={tag}")
    assert made.name.endswith(f"-py3-none-{tag}.whl")

    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--ignore-installed", made], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # the dependencies are those of this environment
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    environment = {"PATH": "", "CHATGLM_OV_CACHE": str(tmp_path / "cache"), "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run([python, "-c", GENERATE], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]) == packages / carried.relative_to(source)
    assert not (tmp_path / "cache").exists()
