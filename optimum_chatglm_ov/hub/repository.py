# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face Hub: which files of a repository are downloaded, and how an exported model is pushed."""

from __future__ import annotations

import glob
import json
import logging
import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import PretrainedConfig

from ..checkpoint.checkpoint import WEIGHT_FILES, shard_names
from ..choices import QUANTIZED_FORMATS
from ..errors import ChatGLMError, CheckpointError
from ..export.quantization import weight_precision
from ..native.fuse_attention import cache_layout
from ..output import UNFINISHED
from .native_linear import has_native_linears, native_linear_usage


logger = logging.getLogger(__name__)

OPENVINO_MODEL_FILES = ("openvino_model.xml", "openvino_model.bin")
# Everything but weights that loading a checkpoint or an exported model can ask for. Never a Python file.
CONFIGURATION_FILES = (
    "config.json",
    "generation_config.json",
    "openvino_config.json",
    "ice_text.model",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_CARD_MARK = "<!-- Written by optimum_chatglm_ov and renewed on every save; delete this line to keep your text. -->"


class DownloadError(ChatGLMError, OSError):
    """A download from the Hub was interrupted; files that have arrived are kept, half of a file is never used."""


def resolve_checkpoint(
    model_id: str | Path,
    *,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str = "",
    export: bool = False,
) -> Path:
    """The local folder of a checkpoint or an exported model, downloaded first when `model_id` is a Hub id.

    Of a Hub repository only the files that are needed come: configurations, tokenizer, and either the OpenVINO model,
    or the safetensors, or the `.bin` weights, in this order; never Python files.

    Args:
        model_id: local folder, used as it is, or Hub id `"user/name"`.
        revision: branch, tag or commit; the default branch when `None`.
        token: access token; `None` or `True` takes the one stored by `hf auth login`, `False` sends none.
        cache_dir: cache folder of huggingface_hub; its default when `None`.
        local_files_only: use the cache alone, without network access. `HF_HUB_OFFLINE=1` does the same.
        force_download: download again what is in the cache.
        subfolder: folder inside the repository or local folder that holds the files.
        export: take the original weights even if an OpenVINO model is there.

    Returns:
        The folder that holds `config.json` and the weights.

    Raises:
        FileNotFoundError: no such local folder or subfolder; offline and not in the cache.
        RepositoryNotFoundError, GatedRepoError, RevisionNotFoundError, HfHubHTTPError: as huggingface_hub raises
            them; all are `OSError`s.
        DownloadError: the connection broke; calling again downloads the rest.
        CheckpointError: the repository, or what the cache holds of it, lacks files that are needed.
    """
    subfolder = _checked_subfolder(subfolder)
    if isinstance(model_id, Path) or Path(model_id).exists() or not _is_hub_id(model_id):
        return _local_folder(model_id, subfolder)

    download = {"repo_id": model_id, "token": token, "cache_dir": cache_dir, "force_download": force_download}
    files = None
    if not (local_files_only or constants.HF_HUB_OFFLINE):
        files = _repository_files(model_id, revision=revision, token=token)
    if files is None:
        download |= {"local_files_only": True, "force_download": False}
        try:
            folder = Path(snapshot_download(revision=revision, **download)) / subfolder
        except LocalEntryNotFoundError as error:
            raise LocalEntryNotFoundError(
                f"{model_id}: no such local folder, and revision {revision or constants.DEFAULT_REVISION!r} of a Hub "
                f"repository of that name is not in the cache ({cache_dir or constants.HF_HUB_CACHE}). Check the "
                "name, or call again with network access (`local_files_only=False`, HF_HUB_OFFLINE unset)."
            ) from error
        _check_complete(folder, model_id, export)
        return folder

    files = {PurePosixPath(file).name for file in files if str(PurePosixPath(file).parent) == (subfolder or ".")}
    weights = _weight_files(files, export)
    if "config.json" not in files or not weights:
        missing = "config.json" if weights else "weights"
        raise CheckpointError(
            f"{'/'.join(filter(None, (model_id, subfolder)))}: the repository has no {missing}; expected config.json "
            f"and one of {', '.join((OPENVINO_MODEL_FILES[0], *WEIGHT_FILES))}. "
            "Check the name, `revision` and `subfolder`."
        )
    try:
        snapshot = _download(files & {*CONFIGURATION_FILES, *weights}, subfolder, revision=revision, **download)
        folder = snapshot / subfolder
        shards = {shard for index in weights if index.endswith(".index.json") for shard in shard_names(folder / index)}
        if shards & files:
            # the commit that the first download found, in case the branch has moved since
            _download(shards & files, subfolder, revision=snapshot.name, **download)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, CheckpointError):
        raise
    except Exception as error:  # httpx's, requests' or urllib3's own, depending on the version of huggingface_hub
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            error.filename = error.filename or str(cache_dir or constants.HF_HUB_CACHE)
            raise  # the disk: full, not writable, ...
        raise DownloadError(
            f"{model_id}: the download was interrupted ({type(error).__name__}: {error}). Call again: files that have "
            "arrived are kept, and only the rest is downloaded."
        ) from error
    _check_complete(folder, model_id, export)
    return folder


def has_openvino_model(folder: str | Path) -> bool:
    """Whether `folder` holds an exported model (`openvino_model.xml` and `.bin`)."""
    return all((Path(folder) / name).is_file() for name in OPENVINO_MODEL_FILES)


def _checked_subfolder(subfolder: str) -> str:
    path = PurePosixPath(subfolder or "")
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"`subfolder` is {subfolder!r}; expected a relative path inside the repository.")
    return "" if path == PurePosixPath() else str(path)


def _is_hub_id(model_id: str) -> bool:
    try:
        validate_repo_id(model_id)
    except HFValidationError:
        return False
    return True


def _local_folder(model_id: str | Path, subfolder: str) -> Path:
    folder = Path(model_id) / subfolder
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: {'a file, not a folder' if folder.exists() else 'no such folder'}. Expected the folder of a "
            "checkpoint or of an exported model, or a Hub id such as 'THUDM/chatglm3-6b'."
        )
    return folder


def _repository_files(model_id: str, *, revision: str | None, token: bool | str | None) -> list[str] | None:
    """The names of all files of a repository; `None` when the Hub cannot be reached and the cache must do."""
    try:
        return HfApi(token=token).list_repo_files(model_id, revision=revision)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code < 500:
            raise
        reason = error
    except HFValidationError:
        raise
    except Exception as error:  # httpx's or requests' own, depending on the version of huggingface_hub
        reason = error
    logger.warning(f"{model_id}: the Hub cannot be reached ({type(reason).__name__}: {reason}); using the cache.")
    return None


def _weight_files(files: Iterable[str], export: bool) -> set[str]:
    """Which of `files` hold the weights: an OpenVINO model, or the first kind of original weights that is there.

    Shards are not among them, they are known from the index.
    """
    files = set(files)
    if not export and files.issuperset(OPENVINO_MODEL_FILES):
        return {name for name in files if name.startswith("openvino_") and name.endswith((".xml", ".bin"))}
    return set([name for name in WEIGHT_FILES if name in files][:1])


def _download(names: Iterable[str], subfolder: str, **options: Any) -> Path:
    patterns = [glob.escape(str(PurePosixPath(subfolder, name))) for name in sorted(names)]
    return Path(snapshot_download(allow_patterns=patterns, **options))


def _check_complete(folder: Path, model_id: str, export: bool) -> None:
    """Raises `CheckpointError` unless `folder` of the cache holds a configuration and all weights."""
    present = {file.name for file in folder.iterdir() if file.is_file()} if folder.is_dir() else set()
    weights = _weight_files(present, export)
    needed = {"config.json"} | weights
    for index in weights:
        if index.endswith(".index.json"):
            needed |= set(shard_names(folder / index))
    missing = sorted(needed - present) + ([] if weights else ["the weights"])
    if missing:
        raise CheckpointError(
            f"{model_id}: {folder} is incomplete, {len(missing)} missing: {', '.join(missing)}. Call again with "
            "network access (`local_files_only=False`, HF_HUB_OFFLINE unset) to download the rest."
        )


# Model card ----------------------------------------------------------------------------------------------------------


def model_card(
    config: PretrainedConfig,
    *,
    repo_id: str = ".",
    base_model: str | None = None,
    precision: str | None = None,
    is_fused: bool = False,
    has_native_linears: bool = False,
    versions: Mapping[str, str] | None = None,
) -> str:
    """The README.md of an exported model: metadata, where it comes from, and a snippet that runs as pasted.

    Args:
        config: configuration of the model.
        repo_id: what the snippet gives to `from_pretrained`: a Hub id or a folder; by default the folder it is run in.
        base_model: Hub id of the original checkpoint; from `config` when `None`.
        precision: of the weights, `"fp16"`, `"int8"`, ...
        is_fused: whether the model holds the fused attention operation.
        has_native_linears: whether its linear layers are native operations.
        versions: version by package name; those that are installed when `None`.
    """
    base_model = base_model or _base_model(config)
    versions = _installed_versions() if versions is None else versions
    quantized = precision in QUANTIZED_FORMATS
    data = ModelCardData(
        language=["zh", "en"],
        library_name="openvino",
        pipeline_tag="text-generation",
        tags=["openvino", "optimum-intel", "chatglm", "text-generation"] + ([precision] if precision else []),
        base_model=base_model,
        base_model_relation="quantized" if quantized and base_model else None,
    )
    title = base_model.rpartition("/")[2] if base_model else "ChatGLM"
    origin = f"`{base_model}`" if base_model else "a ChatGLM checkpoint"
    attention = "| Attention | fused: for CPU, built with a C++ compiler at first use |\n" if is_fused else ""
    card = f"""---
{data.to_yaml()}
---

{_CARD_MARK}

# {title} for OpenVINO

This is {origin}, exported with optimum_chatglm_ov to an OpenVINO model with a stateful key-value cache.
It runs without remote code.

| | |
|---|---|
| Base model | {origin if base_model else "not recorded"} |
| Precision of the weights | {precision or "not recorded"} |
| Layers, hidden size | {config.num_hidden_layers}, {config.hidden_size} |
| Context length | {config.max_position_embeddings} tokens |
{attention}{"".join(f"| Saved with {name} | {number} |" + chr(10) for name, number in versions.items())}
## Usage

```python
from optimum_chatglm_ov import OVChatGLMForCausalLM
from transformers import AutoTokenizer

model_id = {json.dumps(str(repo_id), ensure_ascii=False)}
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = OVChatGLMForCausalLM.from_pretrained(model_id)

inputs = tokenizer("你好", return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
```
{native_linear_usage(repo_id) if has_native_linears else ""}
The license of the base model applies to these weights.
"""
    return str(ModelCard(card))


def has_own_card(folder: str | Path) -> bool:
    """Whether `folder` has a README.md that was not generated."""
    file = Path(folder) / "README.md"
    return file.exists() and _CARD_MARK not in file.read_text(encoding="utf-8", errors="replace")


def _base_model(config: PretrainedConfig) -> str | None:
    """Hub id of the original checkpoint, as its authors wrote it into config.json, or as it was loaded from."""
    for name in (getattr(config, "original_name_or_path", None), getattr(config, "_name_or_path", None)):
        if name and "/" in name and _is_hub_id(name) and not Path(name).exists():
            return name
    return None


def _installed_versions() -> dict[str, str]:
    versions = {}
    for package in ("optimum-chatglm-ov", "openvino", "optimum-intel", "nncf", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # the package itself, run from its source folder
            continue
    return versions


class HubMixin:
    """`push_to_hub` in one commit and the model card, for an optimum-intel model class.

    Comes before `OVModelForCausalLM` in the list of base classes.
    """

    def push_to_hub(
        self,
        save_directory: str | Path | None = None,
        repository_id: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        *,
        repo_id: str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Uploads a saved model to the Hub in one commit, folders kept.

        Both conventions work: `push_to_hub(save_directory, repository_id)` of optimum uploads an existing folder, and
        `push_to_hub(repo_id)` of transformers saves the model to a temporary folder first. A single name is a Hub id
        if it can be one; a `Path`, or a string that cannot, is a folder, and the repository gets its name.

        Args:
            save_directory: folder made by `save_pretrained`, or the Hub id.
            repository_id: Hub id `"user/name"`; created when it does not exist.
            private: whether a repository that is created is private; the account's default when `None`.
            token: access token; `None` or `True` takes the one stored by `hf auth login`.
            repo_id: the same as `repository_id`.
            revision: branch to commit to; created when it does not exist.
            commit_message: `"Upload model"` when `None`.
            commit_description: longer text of the commit.
            create_pr: open a pull request instead of committing.

        Returns:
            `CommitInfo`: the URL of the commit as a string, with `oid`, `commit_message`, `pr_url`, ...

        Raises:
            ValueError: no Hub id, two different ones, or not a valid one.
            FileNotFoundError: `save_directory` holds no exported model.
            HfHubHTTPError: the Hub refused (an `OSError`).
        """
        if repository_id and repo_id and repository_id != repo_id:
            raise ValueError(f"`repository_id` is {repository_id!r} and `repo_id` {repo_id!r}; give one of them.")
        repository_id = repository_id or repo_id
        if repository_id is None:
            if save_directory is None:
                raise ValueError('No Hub id: call `push_to_hub("user/name")`.')
            if isinstance(save_directory, str) and _is_hub_id(save_directory):
                save_directory, repository_id = None, save_directory
            else:
                repository_id = Path(save_directory).resolve().name
        validate_repo_id(repository_id)
        options = {
            "revision": revision,
            "commit_message": commit_message or "Upload model",
            "commit_description": commit_description,
            "create_pr": create_pr,
        }
        if save_directory is not None:
            return self._upload(Path(save_directory), repository_id, private, token, options)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return self._upload(Path(folder), repository_id, private, token, options)

    def _upload(
        self, folder: Path, repo_id: str, private: bool | None, token: bool | str | None, options: dict[str, Any]
    ) -> CommitInfo:
        if not has_openvino_model(folder):
            raise FileNotFoundError(
                f"{folder}: no {' and '.join(OPENVINO_MODEL_FILES)} to upload; call `save_pretrained` first."
            )
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        revision = options["revision"]
        if revision not in (None, constants.DEFAULT_REVISION) and not options["create_pr"]:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        self.save_model_card(folder, repo_id)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=f"{UNFINISHED}*", **options)

    def save_model_card(self, folder: str | Path, repo_id: str = ".") -> None:
        """Writes README.md into `folder`, unless there is one that was not generated (see [`model_card`])."""
        if has_own_card(folder):
            return
        model = getattr(self, "model", None)
        described = {}
        if hasattr(model, "get_ops"):
            described = {"precision": weight_precision(model), "is_fused": cache_layout(model) is not None}
            described["has_native_linears"] = has_native_linears(model)
        card = model_card(self.config, repo_id=repo_id, **described)
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")
