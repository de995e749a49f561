# SPDX-License-Identifier: Apache-2.0
"""Exceptions of this package; each message names the file or argument, what was found and what to do."""


class ChatGLMError(Exception):
    """Base of the package's own exceptions."""


class CheckpointError(ChatGLMError, ValueError):
    """The weights of a checkpoint cannot be used."""


class ExportError(ChatGLMError, RuntimeError):
    """An export could not be finished; nothing was written to the output folder."""


class ContextLengthError(ChatGLMError, ValueError):
    """Prompt and requested new tokens do not fit into the model's context."""
