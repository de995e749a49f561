# SPDX-License-Identifier: Apache-2.0
"""Building, caching and finding the native library."""

from __future__ import annotations

import configparser
import pwd
import shutil
import textwrap
from pathlib import Path

import openvino as ov
import pytest
from conftest import ROOT

from optimum_chatglm_ov.native import NativeBuildError, build, build_native, extension_path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CHATGLM_OV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pretend_compile(monkeypatch):
    """Stands in for the compiler run alone, where a test is about what happens around it."""
    runs = []

    def compile_to(target: Path) -> None:
        runs.append(target)
        target.write_bytes(b"library")

    monkeypatch.setattr(build, "_compile", compile_to)
    return runs


def test_built_once_then_cached(cache, pretend_compile, capfd):
    path = build_native()
    assert path == build_native() and len(pretend_compile) == 1
    assert capfd.readouterr().err.count("Building the native operations") == 1
    assert build_native(force=True) == path and len(pretend_compile) == 2


def test_key_follows_openvino_compiler_and_sources(cache, monkeypatch, tmp_path):
    paths = {build.built_path()}
    monkeypatch.setattr(ov, "get_version", lambda: "2031.0.0-1")
    paths.add(build.built_path())
    monkeypatch.setattr(build, "_compiler_version", lambda compiler: "another compiler 99")
    paths.add(build.built_path())
    copy = shutil.copytree(build.SOURCE_DIR, tmp_path / "native")
    (copy / "simd" / "vector.hpp").write_text("// changed\n")
    monkeypatch.setattr(build, "SOURCE_DIR", copy)
    paths.add(build.built_path())
    assert len(paths) == 4


def test_built_ahead_it_needs_no_compiler(cache, pretend_compile, monkeypatch, tmp_path):
    path = build_native()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert extension_path() == path and len(pretend_compile) == 1
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NativeBuildError, match="CXX is 'no-such-compiler'"):
        extension_path()
    monkeypatch.delenv("CXX")
    (cache / "native" / path.parents[1].name).rename(cache / "native" / "of-other-sources")
    with pytest.raises(NativeBuildError, match=r"no C\+\+ compiler found"):
        extension_path()


def test_library_carried_by_the_package_comes_first(cache, pretend_compile, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "PREBUILT_DIR", tmp_path / "prebuilt")
    assert extension_path() == build.built_path()
    carried = build.prebuilt_path()
    carried.parent.mkdir(parents=True)
    carried.write_bytes(b"library")
    assert extension_path() == carried


def test_wheels_take_a_carried_library_along():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    patterns = settings["options.package_data"]["optimum_chatglm_ov.native"].split(", ")
    carried = build.prebuilt_path().relative_to(build.PREBUILT_DIR.parent)
    assert any(carried.match(pattern) for pattern in patterns)


def test_two_processes_build_once(cache, python):
    script = """
        import os, time
        from optimum_chatglm_ov.native import build
        def slow(target):
            assert not target.exists()
            time.sleep(1)
            target.write_bytes(b"library")
            print("built", flush=True)
        build._compile = slow
        child = os.fork()
        print(build.build_native(), flush=True)
        assert not child or os.waitpid(child, 0)[1] == 0
    """
    done = python.run(["-c", textwrap.dedent(script)])
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == sorted(["built", *[str(build.built_path())] * 2])


def test_missing_tools_are_named(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "ccache g++")
    with pytest.raises(NativeBuildError, match=r"CXX is 'ccache g\+\+', which is no program"):
        build_native()
    monkeypatch.delenv("CXX")
    with pytest.raises(NativeBuildError, match=r"no C\+\+ compiler found"):
        build_native()
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho compiler 1.0\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NativeBuildError, match="pip install cmake"):
        build_native()
    cmake = tmp_path / "cmake"
    cmake.write_text("#!/bin/sh\necho 'fatal error: out of paper'\nexit 3\n")
    cmake.chmod(0o755)
    with pytest.raises(NativeBuildError, match="(?s)returned 3.*out of paper"):
        build_native()
    assert not list(cache.rglob("*.so")) and not list(cache.rglob(".build-*"))


def test_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CHATGLM_OV_CACHE", str(tmp_path / "file"))
    with pytest.raises(NativeBuildError, match="set CHATGLM_OV_CACHE to a writable folder"):
        build_native()


def test_user_without_a_home(monkeypatch):
    for name in ("CHATGLM_OV_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(NativeBuildError, match="no home folder .*; set CHATGLM_OV_CACHE"):
        build_native()


def test_library_of_another_openvino_is_refused(cache, monkeypatch, tmp_path):
    from optimum_chatglm_ov import native
    from optimum_chatglm_ov.native import library

    broken = tmp_path / "libbroken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(library, "extension_path", lambda: broken)
    with pytest.raises(NativeBuildError, match="does not load .*libbroken.so"):
        native.load(ov.Core())
