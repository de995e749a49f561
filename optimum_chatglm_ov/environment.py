# SPDX-License-Identifier: Apache-2.0
"""What this package reads of its surroundings: its variables, the cache folder, and installed versions.

Imports neither torch nor transformers nor OpenVINO.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import platformdirs

from .errors import ChatGLMError


ATTENTION = "CHATGLM_OV_ATTENTION"
"""Who computes attention where the argument `attention` says nothing: one of `choices.ATTENTIONS`."""
LINEAR = "CHATGLM_OV_LINEAR"
"""Who computes linear layers where the argument `linear` says nothing: one of `choices.LINEARS`."""
CACHE = "CHATGLM_OV_CACHE"
"""The folder of built libraries and of the exported tiny model, instead of one in the user's cache folder."""
INSTRUCTION_SET = "CHATGLM_OV_ISA"
"""The kernels that the native operations use, instead of the best for the CPU. The library reads it itself."""
API_KEY = "CHATGLM_OV_API_KEY"
"""The key that clients of the server must send where the option `--api-key` is not given."""

_PACKAGE = "optimum-chatglm-ov"


class CacheFolderError(ChatGLMError, OSError):
    """The user has no cache folder."""


def variable(name: str) -> str | None:
    """Reads an environment variable; `None` if it is unset or empty."""
    return os.environ.get(name) or None


def cache_dir() -> Path:
    """Finds the package's cache folder: `$CHATGLM_OV_CACHE`, else `optimum_chatglm_ov` in the user's cache folder.

    Raises `CacheFolderError` for a user who has none.
    """
    chosen = variable(CACHE)
    if chosen is not None:
        return Path(chosen)
    try:
        return platformdirs.user_cache_path("optimum_chatglm_ov")
    except RuntimeError as error:
        raise CacheFolderError(
            f"the user has no home folder to keep a cache in; set {CACHE} to a writable folder"
        ) from error


def package_version() -> str:
    """Finds the installed version of this package; "source" if it is run from its source folder."""
    return installed_versions(_PACKAGE).get(_PACKAGE, "source")


def installed_versions(*packages: str) -> dict[str, str]:
    """Finds the versions of those packages that are installed, by name; without names, of those that matter here."""
    versions = {}
    for package in packages or (_PACKAGE, "openvino", "optimum-intel", "nncf", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
