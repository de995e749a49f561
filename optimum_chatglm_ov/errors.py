# SPDX-License-Identifier: Apache-2.0
"""Exceptions of this package; each message names the file or argument, what was found and what to do."""

from __future__ import annotations

import re


class ChatGLMError(Exception):
    """Base of the package's own exceptions."""


class CheckpointError(ChatGLMError, ValueError):
    """The weights of a checkpoint cannot be used."""


class ExportError(ChatGLMError, RuntimeError):
    """An export could not be finished; nothing was written to the output folder."""


class ModelFileError(ChatGLMError, RuntimeError):
    """The files of an exported model cannot be read."""


class ContextLengthError(ChatGLMError, ValueError):
    """Prompt and requested new tokens do not fit into the model's context."""


_PLACES = re.compile(r"Exception from \S+:\d+:|Check '.*' failed at \S+:\d+:")


def openvino_message(error: RuntimeError) -> str:
    """Puts the message of an exception of OpenVINO on one line, without places in its sources."""
    return " ".join(_PLACES.sub("", str(error)).split())
