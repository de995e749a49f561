# SPDX-License-Identifier: Apache-2.0
"""Python files of a repository are never run, whatever `trust_remote_code` says."""

import functools
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
import transformers
from conftest import DATA, python_path, unpatched
from tokenization_cases import folder
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    dynamic_module_utils,
    pipeline,
)

from optimum_chatglm_ov import CheckpointError, OVChatGLMForCausalLM, export_model
from optimum_chatglm_ov.cli.main import main
from optimum_chatglm_ov.configuration import ChatGLMConfig
from optimum_chatglm_ov.integrations.recognition import _warn_of_missing_type, is_chatglm, warn_once
from optimum_chatglm_ov.integrations.transformers import RUNS_REMOTE_CODE, replace_remote_code
from optimum_chatglm_ov.measure.accuracy import compare
from optimum_chatglm_ov.measure.speed import measure
from optimum_chatglm_ov.tokenization import ChatGLM2Tokenizer, ChatGLM3Tokenizer, ChatGLM4Tokenizer


MODELS = DATA / "models"
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


def test_other_repositories_are_left_alone():
    own, mine = {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}, {"AutoConfig": "configuration.Mine"}
    own_tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}}
    keys = {"ffn_hidden_size": 1, "kv_channels": 1, "multi_query_group_num": 1, "padded_vocab_size": 1}
    assert is_chatglm({"model_type": "chatglm"}, {})
    assert is_chatglm({"model_type": "chatglm", "auto_map": mine}, {})
    assert is_chatglm({"auto_map": own}, {})
    assert is_chatglm({"model_type": "other", "auto_map": own}, {})
    assert is_chatglm({"model_type": "other", "auto_map": mine, **keys}, {})
    assert is_chatglm({}, own_tokenizer)
    assert is_chatglm({}, {"tokenizer_class": "ChatGLM4Tokenizer"})
    assert is_chatglm({}, {"auto_map": ["tokenization_chatglm.ChatGLMTokenizer", None]})
    assert is_chatglm({"model_type": "other"}, own_tokenizer) is False
    assert is_chatglm({"auto_map": mine, "kv_channels": 1}, own_tokenizer) is False
    assert is_chatglm({}, {"auto_map": {"AutoTokenizer": ["tokenization.Mine", None]}}) is False
    assert is_chatglm({"auto_map": "nonsense"}, {}) is False
    assert is_chatglm({}, {}) is None


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


# A canary in every place that code could be run from -----------------------------------------------------------------

# Where transformers, optimum or datasets might look for a user's trust.
VARIABLES = ("HF_TRUST_REMOTE_CODE", "TRANSFORMERS_TRUST_REMOTE_CODE", "TRUST_REMOTE_CODE")
TRUST = [{}, {"trust_remote_code": False}, {"trust_remote_code": True}]
EVIL = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModel": "evil.EvilModel",
    "AutoModelForCausalLM": "evil.EvilModel",
    "AutoModelForSeq2SeqLM": "evil.EvilModel",
    "AutoProcessor": "evil.EvilProcessor",
    "AutoTokenizer": ["evil.EvilTokenizer", None],
}
CANARY = """from pathlib import Path

Path({!r}).touch()

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizer, ProcessorMixin, pipelines


class EvilConfig(PretrainedConfig):
    model_type = "evil"


class EvilModel(PreTrainedModel):
    config_class = EvilConfig


class EvilTokenizer(PreTrainedTokenizer):
    pass


class EvilProcessor(ProcessorMixin):
    pass


class EvilPipeline(pipelines.TextGenerationPipeline):
    pass


def generate(*arguments, **settings):
    pass
"""


def lost_type(config, tokenizer_config):
    """As fine-tuning tools leave it, with any class names."""
    del config["model_type"]
    config["auto_map"] = EVIL


def null_type(config, tokenizer_config):
    config["model_type"] = None
    config["auto_map"] = EVIL


def own_names(config, tokenizer_config):
    """Standard names for what the keys of ChatGLM say: the class names tell."""
    del config["model_type"]
    for key, name in (("ffn_hidden_size", "intermediate_size"), ("multi_query_group_num", "num_key_value_heads")):
        config[name] = config.pop(key)
    config["auto_map"] = {**config["auto_map"], "AutoModelForCausalLM": "evil.EvilModel"}


def tokenizer_alone(config, tokenizer_config):
    tokenizer_config.update(auto_map=EVIL, tokenizer_class="EvilTokenizer", processor_class="EvilProcessor")
    config["custom_pipelines"] = {
        "evil-generation": {"impl": "evil.EvilPipeline", "pt": ["AutoModelForCausalLM"], "type": "text"}
    }


def other_type(config, tokenizer_config):
    config.update(model_type="evil", auto_map=EVIL)


def other_model(config, tokenizer_config):
    """No ChatGLM at all."""
    other_type(config, tokenizer_config)
    del config["padded_vocab_size"]


READABLE = [lost_type, null_type, own_names, tokenizer_alone]


class Cage:
    """Folders with canaries, a user who says yes to everything, and what must have stayed as it was."""

    def __init__(self, path, monkeypatch):
        self.path, self.sprung, self.modules = path, path / "sprung", path / "modules"
        self.stdin = io.StringIO("y\n" * 20)
        monkeypatch.setattr(sys, "stdin", self.stdin)
        monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(self.modules))
        monkeypatch.syspath_prepend(str(self.modules))
        for variable in VARIABLES:
            monkeypatch.setenv(variable, "1")

    def folder(self, change, source=MODELS / "chatglm2-6b"):
        folder = self.path / change.__name__
        shutil.copytree(source, folder)
        for name in ("evil", "configuration_chatglm", "modeling_chatglm", "tokenization_chatglm"):
            (folder / f"{name}.py").write_text(CANARY.format(str(self.sprung)))
        (folder / "custom_generate").mkdir()
        shutil.copy(folder / "evil.py", folder / "custom_generate" / "generate.py")
        files = [folder / "config.json", folder / "tokenizer_config.json"]
        contents = [json.loads(file.read_text()) for file in files]
        contents[0]["auto_map"] = dict(contents[0].get("auto_map") or {"AutoConfig": "evil.ChatGLMConfig"})
        change(*contents)
        for file, content in zip(files, contents):
            file.write_text(json.dumps(content))
        return folder


@pytest.fixture
def cage(tmp_path, monkeypatch):
    warn_once.cache_clear()
    _warn_of_missing_type.cache_clear()
    cage = Cage(tmp_path, monkeypatch)
    yield cage
    assert not cage.sprung.exists()
    assert cage.stdin.tell() == 0, "somebody was asked"


def test_the_canary_sings(cage):
    """What the other tests look for does happen to other people's models, which are none of our business."""
    folder = cage.folder(other_model)
    assert type(AutoConfig.from_pretrained(folder)).__name__ == "EvilConfig"
    assert cage.sprung.exists() and cage.stdin.tell() == 2
    cage.sprung.unlink()
    cage.stdin.seek(0)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoConfig.from_pretrained(folder, trust_remote_code=False)


@pytest.mark.parametrize("auto_class", [AutoConfig, AutoTokenizer])
def test_transformers_itself_would_run_it(auto_class, cage):
    """If this fails, this version of transformers no longer needs the change that `RUNS_REMOTE_CODE` is about."""
    with suppress(AttributeError):  # the file has no such tokenizer; what matters is the canary
        unpatched(auto_class)(auto_class, cage.folder(lost_type), trust_remote_code=True)
    has_run = cage.sprung.exists()
    cage.sprung.unlink(missing_ok=True)
    assert has_run == RUNS_REMOTE_CODE.contains(transformers.__version__, prereleases=True)


@pytest.mark.parametrize("arguments", TRUST, ids=str)
@pytest.mark.parametrize("change", READABLE)
def test_auto_classes_neither_ask_nor_run(change, arguments, cage, caplog):
    folder = cage.folder(change)
    assert type(AutoConfig.from_pretrained(folder, **arguments)) is ChatGLMConfig
    assert type(AutoTokenizer.from_pretrained(folder, **arguments)) is ChatGLM2Tokenizer
    for auto_class in (AutoModelForSeq2SeqLM, AutoProcessor, AutoImageProcessor, AutoFeatureExtractor):
        try:
            auto_class.from_pretrained(folder, **arguments)
        except (ValueError, OSError, ImportError):
            pass  # not for this model; what matters is the canary
    expected = ["config.json has no `model_type`"] if change in (lost_type, null_type, own_names) else []
    expected += ["`trust_remote_code=True` has no effect"] if arguments.get("trust_remote_code") else []
    found = [record.getMessage() for record in caplog.records if record.name.startswith("optimum_chatglm_ov")]
    assert len(found) == len(expected) and all(any(text in line for line in found) for text in expected)


@pytest.mark.parametrize("arguments", TRUST, ids=str)
@pytest.mark.parametrize("change", READABLE)
def test_models_and_pipelines_neither_ask_nor_run(change, arguments, cage):
    folder = cage.folder(change)
    for loaded in (
        OVChatGLMForCausalLM.from_pretrained(folder, compile=False, **arguments),
        AutoModel.from_pretrained(folder, compile=False, **arguments),
        AutoModelForCausalLM.from_pretrained(folder, compile=False, **arguments),
    ):
        assert type(loaded) is OVChatGLMForCausalLM
    answer = pipeline("text-generation", model=str(folder), **arguments)
    assert type(answer.tokenizer) is ChatGLM2Tokenizer
    with pytest.raises(KeyError, match="evil-generation"):
        pipeline("evil-generation", model=str(folder), **arguments)


@pytest.mark.parametrize("arguments", TRUST, ids=str)
@pytest.mark.parametrize("change", [other_type, other_model])
def test_another_model_type_is_refused_by_name(change, arguments, cage):
    folder = cage.folder(change)
    (folder / "openvino_model.xml").touch()
    (folder / "openvino_model.bin").touch()
    expected = "model_type is 'evil', expected 'chatglm' or 'glm' or 'glm4', the only ones"
    with pytest.raises(CheckpointError, match=expected):
        OVChatGLMForCausalLM.from_pretrained(folder, export=True, **arguments)
    with pytest.raises(CheckpointError, match=expected):
        export_model(folder, cage.path / "output")
    with pytest.raises(CheckpointError, match=expected):
        compare(folder, folder, ["text"])
    with pytest.raises(CheckpointError, match=expected):
        list(measure([folder], ("sdpa",), (8,), new_tokens=2, repetitions=1))
    if change is other_type:  # by its keys it is ChatGLM: transformers must not ask either
        for auto_class in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
            with pytest.raises(CheckpointError, match='set "model_type": "chatglm"'):
                auto_class.from_pretrained(folder, **arguments)


@pytest.mark.parametrize("model_type", ["llama", "bert", "glm", "glm4"])
@pytest.mark.parametrize("source", ["chatglm-6b-3layer-untied", "chatglm2-6b"])
def test_a_model_type_of_transformers_that_the_keys_contradict_is_refused(source, model_type, cage):
    def known_type(config, tokenizer_config):
        config["model_type"] = model_type

    folder = cage.folder(known_type, MODELS / source)
    for load in (
        OVChatGLMForCausalLM.from_pretrained,
        AutoConfig.from_pretrained,
        AutoTokenizer.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        functools.partial(pipeline, "text-generation"),
    ):
        with pytest.raises(CheckpointError, match=f"model_type is '{model_type}'.*set .model_type.: .chatglm."):
            load(str(folder))


def test_generation_runs_no_code_of_a_folder(cage):
    folder = cage.folder(tokenizer_alone)
    model = OVChatGLMForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[64, 65, 66]])
    for arguments in TRUST:
        with pytest.raises(ValueError, match="`custom_generate`"):
            model.generate(ids, max_new_tokens=1, custom_generate=str(folder), **arguments)
        assert model.generate(ids, max_new_tokens=1, **arguments).shape == (1, 4)


@pytest.fixture(scope="module")
def exported_folder(tmp_path_factory):
    return export_model(MODELS / "chatglm2-6b", tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture
def places(cage, exported_folder):
    """What the arguments of commands name."""
    (cage.path / "text").write_text("天地玄黄，宇宙洪荒。" * 3)
    return {
        "original": cage.folder(lost_type),
        "exported": cage.folder(null_type, exported_folder),
        "output": cage.path / "output",
        "text": cage.path / "text",
    }


@pytest.mark.parametrize(
    "arguments",
    [
        "export {original} {output}",
        "export {original} {output} --trust-remote-code",
        "chat --model {original} --prompt y --max-new-tokens 2",
        "compare {original} {exported} --text {text} --prompts 0",
        "bench {exported} --attention openvino --prompt-tokens 8 --new-tokens 2",
    ],
)
def test_commands_neither_ask_nor_run(arguments, places, capsys, caplog):
    assert main([argument.format(**places) for argument in arguments.split()]) == 0
    assert "custom code" not in "".join(capsys.readouterr())
    assert "no `model_type`" in caplog.text


@pytest.mark.slow
def test_the_command_of_optimum_neither_asks_nor_runs(places, cage):
    environment = {**os.environ, "HF_MODULES_CACHE": str(cage.modules), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(python_path(cage.path / "packages"))
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "chatglm-ov"]
    done = subprocess.run(
        [*command, "--model", places["original"], places["output"], "--trust-remote-code"],
        input="y\n" * 20,
        capture_output=True,
        text=True,
        env=environment,
        cwd=cage.path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "custom code" not in done.stdout + done.stderr
    assert "no `model_type`" in done.stderr
