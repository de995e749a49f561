# SPDX-License-Identifier: Apache-2.0
"""What the package reads of its surroundings."""

import pwd
import re
from pathlib import Path

import pytest
from conftest import ROOT

from optimum_chatglm_ov import environment


@pytest.fixture
def home(monkeypatch, tmp_path):
    """Neither of the variables that name a cache folder, and a home folder."""
    for name in (environment.CACHE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_cache_folder(home, monkeypatch, tmp_path):
    assert environment.cache_dir() == home / ".cache" / "optimum_chatglm_ov"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard for user folders says that it is to be ignored
    assert environment.cache_dir() == home / ".cache" / "optimum_chatglm_ov"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environment.cache_dir() == tmp_path / "optimum_chatglm_ov"
    monkeypatch.setenv(environment.CACHE, str(tmp_path / "own"))
    assert environment.cache_dir() == tmp_path / "own"


def test_a_user_without_a_home(home, monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(environment.CacheFolderError, match="no home folder .*; set CHATGLM_OV_CACHE"):
        environment.cache_dir()


def test_versions():
    assert environment.package_version() == environment.installed_versions()["optimum-chatglm-ov"]
    assert environment.installed_versions("no-such-package") == {}


def test_every_variable_is_named_in_one_place():
    """Other Python files name them in texts for users alone, where a reader of the file need not look them up."""
    known = {value for value in vars(environment).values() if str(value).startswith("CHATGLM_OV_")}
    package = Path(environment.__file__).parent
    sources = [*package.rglob("*.py"), *package.rglob("*.?pp"), ROOT / "README.md"]
    used = set().union(*(re.findall(r"CHATGLM_OV_[A-Z_]+", file.read_text(encoding="utf-8")) for file in sources))
    assert used == known
