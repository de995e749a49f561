# SPDX-License-Identifier: Apache-2.0
"""`chatglm-ov chat` without a model: the embedded one answers, and is exported once."""

import shutil

from conftest import COMMAND

from optimum_chatglm_ov.assets import TINY_CHATGLM3
from optimum_chatglm_ov.cli import embedded
from optimum_chatglm_ov.environment import cache_dir
from optimum_chatglm_ov.native import extension_path


def test_the_embedded_model_answers(tmp_path, python):
    library = extension_path()  # built already: the command need not build another
    copy = tmp_path / library.relative_to(cache_dir())
    copy.parent.mkdir(parents=True)
    copy.symlink_to(library)
    environment = python.environment(CHATGLM_OV_CACHE=str(tmp_path))
    done = python.run([*COMMAND, "chat", "--prompt", "你好"], env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "你好！我是一个很小的 ChatGLM 模型，运行在 OpenVINO 上。很高兴见到你！\n"
    assert "tokens/s]" in done.stderr


def test_the_embedded_model_is_exported_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CHATGLM_OV_CACHE", str(tmp_path))
    with embedded.embedded_model() as folder:
        changed = (folder / "openvino_model.xml").stat().st_mtime_ns
    assert folder.is_relative_to(tmp_path)
    with embedded.embedded_model() as again:
        assert again == folder
        assert (again / "openvino_model.xml").stat().st_mtime_ns == changed
    with embedded.embedded_model("int8") as quantised:
        assert quantised != folder


def test_the_cache_knows_the_content(tmp_path, monkeypatch):
    copy = tmp_path / TINY_CHATGLM3.name
    shutil.copytree(TINY_CHATGLM3, copy)
    before = embedded.cache_folder()
    monkeypatch.setattr(embedded, "TINY_CHATGLM3", copy)
    assert embedded.cache_folder() == before
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert embedded.cache_folder() != before


def test_without_a_cache_a_temporary_folder_serves(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CHATGLM_OV_CACHE", str(tmp_path / "file"))
    with embedded.embedded_model() as folder:
        assert (folder / "openvino_model.xml").is_file()
    assert not folder.exists()
    told = capsys.readouterr().err
    assert str(tmp_path / "file") in told and "using a temporary folder" in told
