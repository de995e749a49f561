# SPDX-License-Identifier: Apache-2.0
"""Pulling and pushing through the real `huggingface_hub` client, against a server on the loopback interface."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from conftest import DATA, EXACT, in_child
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard, constants, file_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_chatglm_ov import ChatGLMConfig, OVChatGLMForCausalLM, export_model
from optimum_chatglm_ov.errors import CheckpointError
from optimum_chatglm_ov.hub.download import DownloadError, resolve_checkpoint
from optimum_chatglm_ov.hub.model_card import model_card
from optimum_chatglm_ov.ir import has_openvino_model, weight_precision
from optimum_chatglm_ov.output import complete_folder


MODELS = DATA / "models"
TOKEN = "hf_aTokenThatMustNotBeSeenAnywhere"
BAD_TOKEN = "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"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running server with one user; the client sends everything to it and keeps its files under `tmp_path`."""
    with HubServer() as hub:
        hub.users[TOKEN] = "user"
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(transformers.utils.hub, "_is_offline_mode", False, raising=False)
        monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(tmp_path / "cache"), raising=False)
        getattr(huggingface_hub, "reset_sessions", lambda: None)()  # a session made offline stays so
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub
        assert not hub.leaks, "an access token was sent to the content delivery network"


@pytest.fixture
def log(caplog):
    """Everything that is logged, at the lowest level; no access token may be in it."""
    caplog.set_level(logging.DEBUG)
    for name in ("huggingface_hub", "optimum_chatglm_ov", "httpx", "httpcore", "urllib3", "requests"):
        logger = logging.getLogger(name)
        caplog.set_level(logging.DEBUG, logger=name)
        logger.addHandler(caplog.handler)
    yield caplog
    for name in ("huggingface_hub", "optimum_chatglm_ov", "httpx", "httpcore", "urllib3", "requests"):
        logging.getLogger(name).removeHandler(caplog.handler)
    assert TOKEN not in caplog.text and BAD_TOKEN not in caplog.text


def checkpoint_files(name: str) -> dict[str, bytes]:
    files = {file.name: file.read_bytes() for file in (MODELS / name).iterdir()}
    return files | {"modeling_chatglm.py": b"raise SystemExit", "MODEL_LICENSE": b"license", "README.md": b"# readme"}


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


SMALL = {
    "config.json": b'{"model_type": "chatglm"}',
    "tokenizer.model": b"vocabulary",
    "model.safetensors": b"s" * 300_000,
    "tokenization_chatglm.py": b"raise SystemExit",
}
EXPORTED = {"config.json": b"{}", "openvino_model.xml": b"<net/>", "openvino_model.bin": b"weights"}


# Which files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b-int8", "chatglm3-6b", "glm-4-9b-chat"])
def test_downloads_the_files_of_the_checkpoint_and_no_others(hub, name):
    hub.create("THUDM/" + name, checkpoint_files(name))
    folder = resolve_checkpoint("THUDM/" + name)
    assert names(folder) == names(MODELS / name)
    for file in folder.iterdir():
        assert file.read_bytes() == (MODELS / name / file.name).read_bytes()
    assert not any(file.endswith((".py", "README.md", "MODEL_LICENSE")) for file in hub.downloaded())


def test_prefers_safetensors_to_pickles(hub):
    files = {
        **checkpoint_files("chatglm3-6b"),
        **{name: data for name, data in checkpoint_files("chatglm2-6b").items() if name.startswith("pytorch_model")},
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": b"not named by the index",
    }
    hub.create("user/both", files)
    assert names(resolve_checkpoint("user/both")) == names(MODELS / "chatglm3-6b")


def test_prefers_an_openvino_model_unless_export_is_asked_for(hub):
    tokenizer = {"openvino_tokenizer.xml": b"<net></net>", "openvino_tokenizer.bin": b"tokens"}
    hub.create("user/ir", {**SMALL, **EXPORTED, **tokenizer})
    folder = resolve_checkpoint("user/ir")
    assert names(folder) == {*EXPORTED, *tokenizer, "tokenizer.model"}
    assert has_openvino_model(folder)
    assert hub.downloaded() == names(folder)
    resolve_checkpoint("user/ir", export=True)
    assert "model.safetensors" in hub.downloaded()


def test_subfolder(hub):
    hub.create("user/nested", {"config.json": b"{}", **{f"openvino/{name}": data for name, data in EXPORTED.items()}})
    folder = resolve_checkpoint("user/nested", subfolder="openvino")
    assert folder.name == "openvino" and names(folder) == set(EXPORTED)
    assert names(folder.parent) == {"openvino"}


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_repository_without_a_model_is_refused_before_any_download(hub, missing):
    hub.create("user/part", {name: data for name, data in SMALL.items() if name != missing})
    with pytest.raises(CheckpointError, match=f"user/part.*no {'config.json' if 'config' in missing else 'weights'}"):
        resolve_checkpoint("user/part")
    assert not hub.downloaded()


def test_a_shard_that_the_repository_lacks_is_named(hub):
    files = checkpoint_files("chatglm3-6b")
    del files["model-00002-of-00003.safetensors"]
    hub.create("user/part", files)
    with pytest.raises(CheckpointError, match="1 missing: model-00002-of-00003.safetensors"):
        resolve_checkpoint("user/part")


@pytest.mark.parametrize("shard", ["../../../../secret.bin", "/etc/passwd", "a.py"])
def test_an_index_brings_nothing_but_weights_of_its_repository(hub, shard):
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    hub.create("user/hostile", {"config.json": b"{}", "a.py": b"", "model.safetensors.index.json": index})
    with pytest.raises(CheckpointError, match=f"shard name '{shard}' is not the plain name"):
        resolve_checkpoint("user/hostile")
    assert hub.downloaded() == {"config.json", "model.safetensors.index.json"}


def test_a_damaged_index_is_named(hub):
    hub.create("user/damaged", {"config.json": b"{}", "model.safetensors.index.json": b"{"})
    with pytest.raises(CheckpointError, match="model.safetensors.index.json: not a weight index"):
        resolve_checkpoint("user/damaged")


# Local folders -------------------------------------------------------------------------------------------------------


def test_a_local_folder_is_used_as_it_is(hub, tmp_path):
    (tmp_path / "model" / "inner").mkdir(parents=True)
    assert resolve_checkpoint(tmp_path / "model") == tmp_path / "model"
    assert resolve_checkpoint(str(tmp_path / "model"), subfolder="inner") == tmp_path / "model" / "inner"
    assert not hub.requests


def test_a_missing_local_folder_is_named(hub, tmp_path):
    (tmp_path / "file").touch()
    for model_id in (tmp_path / "no", str(tmp_path / "no"), "./no/such/folder", Path("user/no")):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            resolve_checkpoint(model_id)
    with pytest.raises(FileNotFoundError, match="a file, not a folder"):
        resolve_checkpoint(str(tmp_path / "file"))
    with pytest.raises(FileNotFoundError, match="inner: no such folder"):
        resolve_checkpoint(tmp_path, subfolder="inner")
    assert not hub.requests


@pytest.mark.parametrize("subfolder", ["../other", "/etc", "a/../../b"])
def test_a_subfolder_outside_is_refused(tmp_path, subfolder):
    with pytest.raises(ValueError, match="`subfolder`"):
        resolve_checkpoint(tmp_path, subfolder=subfolder)


# Revisions, cache, offline -------------------------------------------------------------------------------------------


def test_revisions_are_branches_and_commits(hub):
    repository = hub.create("user/model", SMALL)
    first = repository.branches["main"].oid
    repository.commit("v2/next", {**SMALL, "config.json": b'{"model_type": "chatglm", "v": 2}'})
    assert json.loads((resolve_checkpoint("user/model") / "config.json").read_text()) == {"model_type": "chatglm"}
    folder = resolve_checkpoint("user/model", revision="v2/next")
    assert json.loads((folder / "config.json").read_text())["v"] == 2
    assert resolve_checkpoint("user/model", revision=first).name == first
    with pytest.raises(RevisionNotFoundError):
        resolve_checkpoint("user/model", revision="no-such-branch")


def test_what_is_in_the_cache_is_not_downloaded_again(hub, tmp_path):
    hub.create("user/model", SMALL)
    folder = resolve_checkpoint("user/model", cache_dir=tmp_path / "own")
    assert folder.is_relative_to(tmp_path / "own")
    hub.requests.clear()
    assert resolve_checkpoint("user/model", cache_dir=str(tmp_path / "own")) == folder
    assert not hub.downloaded()
    resolve_checkpoint("user/model", cache_dir=tmp_path / "own", force_download=True)
    assert hub.downloaded() == set(SMALL) - {"tokenization_chatglm.py"}


def test_offline_uses_the_cache_without_any_request(hub, monkeypatch):
    hub.create("user/model", SMALL)
    with pytest.raises(LocalEntryNotFoundError, match="user/model: no such local folder.*'main'.*not in the cache"):
        resolve_checkpoint("user/model", local_files_only=True)
    assert not hub.requests
    folder = resolve_checkpoint("user/model")
    hub.requests.clear()
    assert resolve_checkpoint("user/model", local_files_only=True) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_checkpoint("user/model", force_download=True) == folder
    with pytest.raises(LocalEntryNotFoundError):
        resolve_checkpoint("user/other")
    assert not hub.requests


def test_an_unreachable_hub_falls_back_to_the_cache(hub, caplog):
    hub.create("user/model", SMALL)
    folder = resolve_checkpoint("user/model")
    hub.down = True
    assert resolve_checkpoint("user/model") == folder
    assert "user/model: the Hub cannot be reached" in caplog.text
    with pytest.raises(OSError):
        resolve_checkpoint("user/other")


def test_an_incomplete_cache_is_reported_offline(hub):
    hub.create("user/model", checkpoint_files("chatglm3-6b"))
    (resolve_checkpoint("user/model") / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 missing: model-00003-of-00003.safetensors.*network access"):
        resolve_checkpoint("user/model", local_files_only=True)
    assert resolve_checkpoint("user/model")


# Refusals and broken connections -------------------------------------------------------------------------------------


def test_missing_private_and_forbidden_repositories(hub, log):
    hub.create("user/private", SMALL, private=True)
    for arguments in (
        {"model_id": "user/private", "token": False},
        {"model_id": "user/private"},
        {"model_id": "user/missing"},
        {"model_id": "user/missing", "token": TOKEN},
    ):
        with pytest.raises(RepositoryNotFoundError) as error:
            resolve_checkpoint(**arguments)
        assert isinstance(error.value, OSError) and arguments["model_id"] in str(error.value)
    assert resolve_checkpoint("user/private", token=TOKEN)


def test_a_bad_token_is_refused_and_not_shown(hub, log):
    hub.create("user/private", SMALL, private=True)
    with pytest.raises(HfHubHTTPError) as error:
        resolve_checkpoint("user/private", token=BAD_TOKEN)
    assert error.value.response.status_code == 401
    assert BAD_TOKEN not in "".join(traceback.format_exception(None, error.value, error.tb)) + repr(error.value)
    assert not hub.downloaded()


def test_a_cache_that_cannot_be_written_is_named(hub, tmp_path):
    hub.create("user/model", SMALL)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file") as error:
        resolve_checkpoint("user/model", cache_dir=tmp_path / "file")
    assert not isinstance(error.value, DownloadError)


def test_a_connection_cut_once_during_a_download_is_taken_up_again(hub, monkeypatch, log):
    """By the client itself or, with clients that give up at once, by the next call."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # the client keeps whole chunks
    hub.create("user/model", SMALL, private=True)
    hub.cut["model.safetensors"] = [100_000]
    try:
        folder = resolve_checkpoint("user/model", token=TOKEN)
    except DownloadError:
        folder = resolve_checkpoint("user/model", token=TOKEN)
    assert "bytes=100000-" in hub.ranges
    assert (folder / "model.safetensors").read_bytes() == SMALL["model.safetensors"]


def test_a_connection_that_stays_cut_leaves_no_half_file_in_place(hub, tmp_path, monkeypatch, log):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.create("user/model", SMALL, private=True)
    hub.cut["model.safetensors"] = [100_000] + [0] * 10
    with pytest.raises(DownloadError, match="user/model: the download was interrupted.*Call again") as error:
        resolve_checkpoint("user/model", token=TOKEN)
    assert TOKEN not in "".join(traceback.format_exception(None, error.value, error.tb))
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
    with pytest.raises(CheckpointError, match="the weights"):
        resolve_checkpoint("user/model", local_files_only=True)

    hub.cut.clear()
    hub.requests.clear()
    folder = resolve_checkpoint("user/model", token=TOKEN)
    assert (folder / "model.safetensors").read_bytes() == SMALL["model.safetensors"]
    assert hub.downloaded() == {"model.safetensors"}


def test_a_full_cache_is_named(hub, tmp_path):
    """In a process whose files cannot grow."""
    hub.create("user/model", SMALL)

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        export_model("user/model", tmp_path / "ir", cache_dir=tmp_path / "own")

    error = in_child(limited)
    assert error.startswith("OSError: ") and str(tmp_path / "own") in error
    assert not (tmp_path / "ir").exists()


# Pushing -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return OVChatGLMForCausalLM.from_pretrained(MODELS / "chatglm3-6b", compile=False)


@pytest.fixture
def saved(model, tmp_path):
    """A saved model with a folder inside and a file that is large enough for LFS."""
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "nested").mkdir()
    (tmp_path / "saved" / "nested" / "large.dat").write_bytes(b"l" * 200_000)
    return tmp_path / "saved"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_push_in_the_convention_of_optimum(hub, model, saved, log):
    commit = model.push_to_hub(
        saved, "user/pushed", private=True, token=TOKEN, commit_message="A message", revision="v1.0"
    )
    repository = hub.repositories["user/pushed"]
    assert repository.private
    assert set(repository.branches) == {"main", "v1.0"}
    assert set(repository.branches["main"].files) == {".gitattributes"}
    pushed = repository.branches["v1.0"]
    assert pushed.message == "A message"
    assert (commit.oid, commit.commit_url) == (pushed.oid, f"{hub.endpoint}/user/pushed/commit/{pushed.oid}")
    assert {name: data for name, data in pushed.files.items() if name != ".gitattributes"} == files_of(saved)
    assert hub.counts()["POST", "commit"] == 1
    assert 'model_id = "user/pushed"' in pushed.files["README.md"].decode()


def test_push_in_the_convention_of_transformers(hub, model, saved, log):
    commit = model.push_to_hub("user/pushed", token=TOKEN, commit_description="Longer")
    pushed = hub.repositories["user/pushed"].branches["main"]
    assert (pushed.oid, pushed.message, pushed.description) == (commit.oid, "Upload model", "Longer")
    assert set(pushed.files) == set(files_of(saved)) - {"nested/large.dat"} | {".gitattributes"}
    assert hub.counts()["POST", "commit"] == 1
    assert 'model_id = "user/pushed"' in pushed.files["README.md"].decode()
    assert not hub.repositories["user/pushed"].private


@pytest.mark.parametrize("keyword", ["repository_id", "repo_id", None])
def test_push_while_saving(hub, model, tmp_path, keyword):
    arguments = {keyword: "user/saved"} if keyword else {}
    model.save_pretrained(str(tmp_path / "saved"), push_to_hub=True, token=TOKEN, **arguments)
    pushed = hub.repositories["user/saved"].branches["main"].files
    assert set(pushed) == {*files_of(tmp_path / "saved"), ".gitattributes"}


def test_pushing_again_uploads_what_has_changed_and_keeps_an_edited_card(hub, model, saved):
    model.push_to_hub(saved, "user/pushed", token=TOKEN)
    (saved / "generation_config.json").write_text('{"changed": true}')
    (saved / "README.md").write_text("---\nlanguage: zh\n---\nMy own text.")
    hub.requests.clear()
    model.push_to_hub(saved, "user/pushed", token=TOKEN)
    assert not any(method == "PUT" for method, _ in hub.requests)
    files = hub.repositories["user/pushed"].branches["main"].files
    assert files["generation_config.json"] == b'{"changed": true}' and b"My own text." in files["README.md"]


def test_what_a_killed_process_left_is_not_pushed(hub, model, saved):
    expected = set(files_of(saved))

    def killed():
        with complete_folder(saved) as folder:
            (folder / "openvino_model.bin").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == signal.SIGKILL and set(files_of(saved)) > expected
    model.push_to_hub(saved, "user/pushed", token=TOKEN)
    assert set(hub.repositories["user/pushed"].branches["main"].files) == {*expected, ".gitattributes"}


def test_a_pull_request_leaves_the_branch_alone(hub, model, saved):
    model.push_to_hub("user/pushed", token=TOKEN)
    before = hub.repositories["user/pushed"].branches["main"].oid
    commit = model.push_to_hub(saved, "user/pushed", token=TOKEN, create_pr=True)
    assert commit.pr_revision == "refs/pr/1"
    assert hub.repositories["user/pushed"].branches["main"].oid == before


def test_refused_pushes(hub, model, saved, log):
    for token, repo_id, status in ((False, "user/x", 401), (BAD_TOKEN, "user/x", 401), (TOKEN, "other/x", 403)):
        with pytest.raises(OSError) as error:
            model.push_to_hub(saved, repo_id, token=token)
        assert error.value.response.status_code == status
        assert str(token) not in "".join(traceback.format_exception(None, error.value, None)) or token is False
    assert not hub.repositories


def test_pushes_that_cannot_be_meant(hub, model, tmp_path):
    with pytest.raises(ValueError, match="No Hub id"):
        model.push_to_hub()
    with pytest.raises(ValueError, match="give one of them"):
        model.push_to_hub(tmp_path, "user/a", repo_id="user/b")
    with pytest.raises(HFValidationError):
        model.push_to_hub(tmp_path, "a/b/c")
    with pytest.raises(FileNotFoundError, match="openvino_model.xml.*save_pretrained"):
        model.push_to_hub(tmp_path, "user/x", token=TOKEN)
    assert not hub.requests


# Models --------------------------------------------------------------------------------------------------------------


def greedy_ids(model, tokenizer) -> list[int]:
    inputs = tokenizer("你好 hello", return_tensors="pt")
    return model.generate(**inputs, do_sample=False, max_new_tokens=8, min_new_tokens=8)[0].tolist()


def test_a_pushed_model_is_pulled_and_generates_the_same(hub, model, saved, log):
    tokenizer = AutoTokenizer.from_pretrained(saved)
    expected = greedy_ids(model, tokenizer)
    first = model.push_to_hub(saved, "user/pushed", token=TOKEN, private=True, revision="first").oid
    (saved / "tokenizer_config.json").write_text("not the same")
    model.push_to_hub(saved, "user/pushed", token=TOKEN)
    hub.requests.clear()
    for revision in ("first", first):
        pulled = OVChatGLMForCausalLM.from_pretrained("user/pushed", token=TOKEN, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained("user/pushed", token=TOKEN, revision=revision)
        assert greedy_ids(pulled, tokenizer) == expected
    assert not {"README.md", "large.dat"} & hub.downloaded()
    with pytest.raises(OSError):
        OVChatGLMForCausalLM.from_pretrained("user/pushed", token=BAD_TOKEN, cache_dir=saved / "empty")


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"])
def test_an_original_checkpoint_is_exported_by_id(hub, name):
    files = checkpoint_files(name)
    hub.create("THUDM/" + name, {"config.json": b"{}"}).commit("original", files)
    local = greedy_ids(
        OVChatGLMForCausalLM.from_pretrained(MODELS / name), AutoTokenizer.from_pretrained(MODELS / name)
    )
    arguments = {"pretrained_model_name_or_path": "THUDM/" + name, "revision": "original"}
    tokenizer = AutoTokenizer.from_pretrained(**arguments)
    pulled = OVChatGLMForCausalLM.from_pretrained("THUDM/" + name, revision="original")
    assert greedy_ids(pulled, tokenizer) == local
    assert not any(file.endswith(".py") for file in hub.downloaded())


@pytest.mark.parametrize("original", [False, True])
def test_auto_class_loads_what_a_repository_of_glm4_holds(hub, exported, checkpoint, original, monkeypatch):
    """An exported model by this package's class; torch's own of an original, and no request beside."""
    folder, repo = checkpoint("glm4") if original else exported("glm4"), f"user/glm4-{original}"
    hub.create(repo, {file.name: file.read_bytes() for file in folder.iterdir()})
    ids = torch.tensor([[5, 6, 100, 101, 102]])
    expected = OVChatGLMForCausalLM.from_pretrained(folder, export=original, ov_config=EXACT)(ids).logits
    for offline in (False, True):
        if offline:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
            monkeypatch.setattr(transformers.utils.hub, "_is_offline_mode", True, raising=False)
            asked = list(hub.requests)
        arguments = {} if original else {"ov_config": EXACT}
        model = AutoModelForCausalLM.from_pretrained(repo, **arguments)
        assert isinstance(model, PreTrainedModel if original else OVChatGLMForCausalLM)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-3, rtol=0)
    assert hub.requests == asked
    assert any("openvino" in path for _, path in asked) != original


@pytest.mark.slow
def test_the_snippet_of_a_pushed_card_runs_as_pasted(hub, model, tmp_path):
    """In a process of its own, which knows the server from its environment alone."""
    model.push_to_hub("user/pushed", token=TOKEN, private=True)
    card = ModelCard.load("user/pushed", token=TOKEN)
    snippet = card.text.partition("```python\n")[2].partition("```")[0]
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONIOENCODING": "utf-8",
    }
    command = [sys.executable, "-c", snippet]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "你好" in done.stdout
    assert TOKEN not in done.stdout + done.stderr


# Model card ----------------------------------------------------------------------------------------------------------


def test_model_card():
    config = ChatGLMConfig.from_pretrained(MODELS / "chatglm3-6b")
    card = ModelCard(model_card(config, repo_id="user/pushed", precision="int8", versions={"openvino": "2026.1"}))
    assert card.data.base_model == "THUDM/chatglm3-6b" and card.data.base_model_relation == "quantized"
    assert card.data.language == ["zh", "en"] and card.data.pipeline_tag == "text-generation"
    assert {"openvino", "chatglm", "text-generation", "optimum-intel", "int8"} <= set(card.data.tags)
    assert "| Saved with openvino | 2026.1 |" in card.text and "| int8 |" in card.text
    assert "from optimum_chatglm_ov import OVChatGLMForCausalLM" in card.text


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int4", "nf4", "mxfp4", "cb4"])
def test_the_card_knows_the_precision_of_the_weights(tmp_path, precision):
    export_model(MODELS / "chatglm3-6b", tmp_path / "exported", weight_format=precision)
    model = OVChatGLMForCausalLM.from_pretrained(tmp_path / "exported", compile=False)
    assert weight_precision(model.model) == precision
    model.save_model_card(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert precision in data.tags and len(data.tags) == 5
    is_quantized = data.to_dict().get("base_model_relation") == "quantized"
    assert is_quantized == (precision not in ("fp32", "fp16", "bf16"))


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_saving_again_renews_a_generated_card_and_keeps_any_other(model, saved, encoding):
    card = saved / "README.md"
    generated = card.read_bytes()
    card.write_bytes(generated + b"changed")
    model.save_pretrained(saved)
    assert card.read_bytes() == generated
    own = "---\nlanguage: zh\n---\n我的说明".encode(encoding)
    card.write_bytes(own)
    model.save_pretrained(saved)
    assert card.read_bytes() == own and (saved / "nested" / "large.dat").is_file()


def test_model_card_of_a_model_of_unknown_origin(tmp_path):
    config = ChatGLMConfig(num_layers=2, _name_or_path=str(tmp_path))
    card = ModelCard(model_card(config, repo_id=str(tmp_path)))
    assert card.data.base_model is None and "not recorded" in card.text and str(tmp_path) in card.text
    assert "| Saved with openvino |" in card.text


def test_the_server_lists_what_it_holds(hub):
    """The parts of the protocol that only other programs use."""
    hub.create("user/model", {**SMALL, "nested/file": b"1"})
    api = HfApi(token=TOKEN)
    assert [branch.name for branch in api.list_repo_refs("user/model").branches] == ["main"]
    tree = {item.path: item for item in api.list_repo_tree("user/model", recursive=True)}
    assert set(tree) == {*SMALL, "nested", "nested/file"} and tree["model.safetensors"].lfs.size == 300_000
    assert [item.path for item in api.list_repo_tree("user/model", "nested")] == ["nested/file"]
    assert api.model_info("user/model").sha == hub.repositories["user/model"].branches["main"].oid
