# SPDX-License-Identifier: Apache-2.0
"""Packages that only some users need."""

from __future__ import annotations

import importlib.util

from ..errors import ChatGLMError


_PACKAGES = {"serve": ("fastapi", "uvicorn", "prometheus_client"), "web": ("gradio",), "ray": ("ray",)}


class MissingExtraError(ChatGLMError, ImportError):
    """Packages of an extra are not installed."""


def require(extra: str) -> None:
    """Checks that the packages of `extra` are installed.

    Raises:
        MissingExtraError: a package of `extra` is not installed; the message has the line that installs it.
    """
    missing = [package for package in _PACKAGES[extra] if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingExtraError(
            f'{", ".join(missing)} not found; install what this needs: pip install "optimum-chatglm-ov[{extra}]"'
        )
