# SPDX-License-Identifier: Apache-2.0
"""Python files of a repository are never run, whatever `trust_remote_code` says."""

import functools
import json
import logging
import shutil

import pytest
from tokenization_cases import folder
from transformers import AutoConfig, AutoTokenizer, dynamic_module_utils

from optimum_chatglm_ov.configuration import ChatGLMConfig
from optimum_chatglm_ov.remote_code import remote_code, replace_remote_code, warn_once
from optimum_chatglm_ov.tokenization import ChatGLM3Tokenizer, ChatGLM4Tokenizer


replace_remote_code(AutoConfig, AutoTokenizer)

CHECKPOINTS = {"models.chatglm3-6b": ChatGLM3Tokenizer, "models.glm-4-9b-chat": ChatGLM4Tokenizer}
TRAP = "from pathlib import Path\n\nPath({!r}).touch()\n\n\nclass {}:\n    pass\n"


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request, tmp_path):
    """A checkpoint whose Python files leave a trace when they are run."""
    path = tmp_path / "checkpoint"
    shutil.copytree(folder(request.param), path)
    tokenizer_class = "ChatGLM4Tokenizer" if "glm-4" in request.param else "ChatGLMTokenizer"
    for name in (tokenizer_class, "ChatGLMConfig"):
        file = "configuration_chatglm.py" if name == "ChatGLMConfig" else "tokenization_chatglm.py"
        (path / file).write_text(TRAP.format(str(tmp_path / "sprung"), name))
    warn_once.cache_clear()
    yield path, CHECKPOINTS[request.param]
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("arguments", [{}, {"trust_remote_code": False}, {"trust_remote_code": None}])
def test_remote_code_is_not_needed(checkpoint, arguments, caplog):
    path, tokenizer_class = checkpoint
    assert type(AutoConfig.from_pretrained(path, **arguments)) is ChatGLMConfig
    assert type(AutoTokenizer.from_pretrained(path, **arguments)) is tokenizer_class
    assert not caplog.records


def test_trust_is_overruled_with_one_warning(checkpoint, caplog):
    path, tokenizer_class = checkpoint
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert type(AutoConfig.from_pretrained(path, trust_remote_code=True)) is ChatGLMConfig
            tok = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
            assert type(tok) is tokenizer_class
    (record,) = caplog.records
    assert record.getMessage().startswith(f"`trust_remote_code=True` has no effect for {path}")


def test_other_repositories_are_left_alone(tmp_path):
    def repository(name, **config):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return tmp_path / name

    own, name = {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}, "ChatGLMConfig"
    assert remote_code(repository("a", model_type="chatglm", auto_map=own)) == (False, {name})
    assert remote_code(repository("b", model_type="other", auto_map=own)) == (True, {name})
    assert remote_code(repository("c", model_type="chatglm")) == (False, set())
    assert remote_code(repository("d", auto_map=own)) == (False, {name})
    assert remote_code(repository("e", auto_map={"AutoConfig": "configuration.Mine"})) == (True, {"Mine"})
    another_class = {**own, "AutoModel": "modeling_chatglm.Unknown"}
    assert remote_code(repository("f", model_type="chatglm", auto_map=another_class)) == (False, {name, "Unknown"})


@pytest.mark.parametrize("auto_class", [AutoConfig, AutoTokenizer])
def test_what_cannot_be_read_is_not_trusted(auto_class, checkpoint, monkeypatch, caplog):
    """As with a network that fails at first, and not when transformers reads the files again."""
    path, tokenizer_class = checkpoint
    hidden = path.rename(path.with_name("hidden"))
    original = auto_class.from_pretrained.__wrapped__
    seen = []

    @functools.wraps(original)
    def late(cls, *arguments, **settings):
        seen.append(settings["trust_remote_code"])
        hidden.rename(path)
        return original(cls, *arguments, **settings)

    monkeypatch.setattr(auto_class, "from_pretrained", classmethod(late))
    replace_remote_code(auto_class)
    loaded = auto_class.from_pretrained(path, trust_remote_code=True)
    assert type(loaded) in (ChatGLMConfig, tokenizer_class) and seen == [False]


def test_user_code_of_other_models_still_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}})
    )
    (tmp_path / "configuration_mine.py").write_text(
        "from transformers import PretrainedConfig\n\n\nclass MineConfig(PretrainedConfig):\n    model_type = 'mine'\n"
    )
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(config).__name__ == "MineConfig"


def test_replacing_twice_changes_nothing():
    before = AutoConfig.from_pretrained.__func__
    replace_remote_code(AutoConfig)
    assert AutoConfig.from_pretrained.__func__ is before
