# SPDX-License-Identifier: Apache-2.0
"""Uploads to the Hugging Face Hub: a saved model in one commit, with its model card."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, constants
from huggingface_hub.utils import validate_repo_id
from transformers import PretrainedConfig

from ..ir import OPENVINO_MODEL_FILES, has_openvino_model, weight_precision
from ..native.fuse_attention import cache_layout
from ..output import UNFINISHED
from .download import is_hub_id
from .model_card import has_own_card, model_card
from .native_linear import has_native_linears


class HubMixin:
    """Gives a model class of optimum-intel `push_to_hub`, in one commit, and the model card.

    Comes before `OVModelForCausalLM` in the list of base classes.
    """

    config: PretrainedConfig
    save_pretrained: Callable[[str], None]

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
        folder, name = _target(save_directory, repository_id, repo_id)
        options = {
            "revision": revision,
            "commit_message": commit_message or "Upload model",
            "commit_description": commit_description,
            "create_pr": create_pr,
        }
        if folder is not None:
            return self._upload(folder, name, private, token, options)
        with tempfile.TemporaryDirectory() as temporary:
            self.save_pretrained(temporary)
            return self._upload(Path(temporary), name, private, token, options)

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
        described: dict[str, Any] = {}
        if hasattr(model, "get_ops"):
            described = {"precision": weight_precision(model), "is_fused": cache_layout(model) is not None}
            described["has_native_linears"] = has_native_linears(model)
        card = model_card(self.config, repo_id=repo_id, **described)
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")


def _target(
    save_directory: str | Path | None, repository_id: str | None, repo_id: str | None
) -> tuple[Path | None, str]:
    """Tells which folder, if any, and which repository the arguments of `push_to_hub` mean."""
    if repository_id and repo_id and repository_id != repo_id:
        raise ValueError(f"`repository_id` is {repository_id!r} and `repo_id` {repo_id!r}; give one of them.")
    name = repository_id or repo_id
    if name is None:
        if save_directory is None:
            raise ValueError('No Hub id: call `push_to_hub("user/name")`.')
        if isinstance(save_directory, str) and is_hub_id(save_directory):
            name, save_directory = save_directory, None
        else:
            name = Path(save_directory).resolve().name
    validate_repo_id(name)
    return None if save_directory is None else Path(save_directory), name
