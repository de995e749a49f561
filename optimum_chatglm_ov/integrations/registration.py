# SPDX-License-Identifier: Apache-2.0
"""The public names of the package; importing them registers its classes with transformers' auto classes."""

from typing import Any

from ..configuration import ChatGLMConfig
from ..errors import ChatGLMError, CheckpointError, ContextLengthError, ExportError, ModelFileError
from .transformers import patch, register_model, register_tokenizers


register_tokenizers()
patch()

from ..hub.download import DownloadError  # noqa: E402  the modules below read checkpoints through the classes above
from ..modeling import OVChatGLMForCausalLM  # noqa: E402
from ..native import extension_path  # noqa: E402
from ..tokenization import (  # noqa: E402
    ChatGLM1Tokenizer,
    ChatGLM2Tokenizer,
    ChatGLM3Tokenizer,
    ChatGLM4Tokenizer,
    ChatGLMTextIteratorStreamer,
    ChatGLMTextStreamer,
    ChatGLMTokenizer,
    CodeGeeX4Tokenizer,
)
from ..tokenization.chat_rules import ToolCallError  # noqa: E402


register_model(OVChatGLMForCausalLM)

__all__ = [
    "ChatGLM1Tokenizer",
    "ChatGLM2Tokenizer",
    "ChatGLM3Tokenizer",
    "ChatGLM4Tokenizer",
    "ChatGLMConfig",
    "ChatGLMError",
    "ChatGLMTextIteratorStreamer",
    "ChatGLMTextStreamer",
    "ChatGLMTokenizer",
    "CheckpointError",
    "CodeGeeX4Tokenizer",
    "ContextLengthError",
    "DownloadError",
    "ExportError",
    "ModelFileError",
    "OVChatGLMForCausalLM",
    "ToolCallError",
    "export_model",  # noqa: F822  see `__getattr__`
    "extension_path",
]


def __getattr__(name: str) -> Any:
    """Imports `export_model`, whose modules only those need who export; an exported model runs without them."""
    if name == "export_model":
        from ..export.exporter import export_model

        return export_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
