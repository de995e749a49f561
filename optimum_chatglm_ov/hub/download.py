# SPDX-License-Identifier: Apache-2.0
"""Downloads from the Hugging Face Hub: which files of a repository are needed, and where they are then."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..checkpoint.shards import WEIGHT_FILES, shard_names
from ..errors import ChatGLMError, CheckpointError
from ..ir import CONFIGURATION_FILES, OPENVINO_MODEL_FILES


logger = logging.getLogger(__name__)


class DownloadError(ChatGLMError, OSError):
    """A download from the Hub was interrupted. Files that have arrived are kept; half a file is never used."""


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
    """Finds the local folder of a checkpoint or an exported model; downloads it first when `model_id` is a Hub id.

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
    if isinstance(model_id, Path) or Path(model_id).exists() or not is_hub_id(model_id):
        return _local_folder(model_id, subfolder)
    source: dict[str, Any] = {"repo_id": model_id, "revision": revision, "token": token, "cache_dir": cache_dir}
    files = None
    if not (local_files_only or constants.HF_HUB_OFFLINE):
        files = _repository_files(model_id, revision=revision, token=token)
    if files is None:
        folder = _cached_folder(source, subfolder)
    else:
        names = {PurePosixPath(file).name for file in files if str(PurePosixPath(file).parent) == (subfolder or ".")}
        folder = _downloaded_folder(source | {"force_download": force_download}, subfolder, names, export)
    _check_complete(folder, model_id, export)
    return folder


def _cached_folder(source: dict[str, Any], subfolder: str) -> Path:
    """Finds what the cache holds of a repository.

    Args:
        source: arguments of `snapshot_download`.
    """
    try:
        return Path(snapshot_download(**source, local_files_only=True)) / subfolder
    except LocalEntryNotFoundError as error:
        raise LocalEntryNotFoundError(
            f"{source['repo_id']}: no such local folder, and revision "
            f"{source['revision'] or constants.DEFAULT_REVISION!r} of a Hub repository of that name is not in the "
            f"cache ({source['cache_dir'] or constants.HF_HUB_CACHE}). Check the name, or call again with network "
            "access (`local_files_only=False`, HF_HUB_OFFLINE unset)."
        ) from error


def _downloaded_folder(source: dict[str, Any], subfolder: str, files: set[str], export: bool) -> Path:
    """Downloads those of `files`, names in `subfolder`, that are needed."""
    model_id = source["repo_id"]
    weights = _weight_files(files, export)
    if "config.json" not in files or not weights:
        missing = "config.json" if weights else "weights"
        raise CheckpointError(
            f"{'/'.join(filter(None, (model_id, subfolder)))}: the repository has no {missing}; expected config.json "
            f"and one of {', '.join((OPENVINO_MODEL_FILES[0], *WEIGHT_FILES))}. "
            "Check the name, `revision` and `subfolder`."
        )
    try:
        snapshot = _download(source, subfolder, files & {*CONFIGURATION_FILES, *weights})
        folder = snapshot / subfolder
        shards = {shard for index in weights if index.endswith(".index.json") for shard in shard_names(folder / index)}
        if shards & files:
            # the commit that the first download found, in case the branch has moved since
            _download(source | {"revision": snapshot.name}, subfolder, shards & files)
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, CheckpointError):
        raise
    except Exception as error:  # httpx's, requests' or urllib3's own, depending on the version of huggingface_hub
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            error.filename = error.filename or str(source["cache_dir"] or constants.HF_HUB_CACHE)
            raise  # the disk: full, not writable, ...
        raise DownloadError(
            f"{model_id}: the download was interrupted ({type(error).__name__}: {error}). Call again: files that have "
            "arrived are kept, and only the rest is downloaded."
        ) from error


def _checked_subfolder(subfolder: str) -> str:
    path = PurePosixPath(subfolder or "")
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"`subfolder` is {subfolder!r}; expected a relative path inside the repository.")
    return "" if path == PurePosixPath() else str(path)


def is_hub_id(model_id: str) -> bool:
    """Tells whether the Hub could have a repository of this name."""
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
    """Lists the files of a repository; `None` when the Hub cannot be reached and the cache must do."""
    reason: Exception
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
    """Picks the files with the weights: an OpenVINO model, or the first kind of original weights that is there.

    Shards are not among them: their index names them.
    """
    files = set(files)
    if not export and files.issuperset(OPENVINO_MODEL_FILES):
        return {name for name in files if name.startswith("openvino_") and name.endswith((".xml", ".bin"))}
    return set([name for name in WEIGHT_FILES if name in files][:1])


def _download(source: dict[str, Any], subfolder: str, names: Iterable[str]) -> Path:
    patterns = [glob.escape(str(PurePosixPath(subfolder, name))) for name in sorted(names)]
    return Path(snapshot_download(allow_patterns=patterns, **source))


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
