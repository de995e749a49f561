# SPDX-License-Identifier: Apache-2.0
"""The public names of the package; importing them registers its classes with transformers' auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .. import tokenization
from ..configuration import ChatGLMConfig
from ..errors import ChatGLMError, CheckpointError, ContextLengthError, ExportError, ModelFileError
from . import remote_code


AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)
tokenization.register(ChatGLMConfig)
remote_code.replace_remote_code()

from ..chat import ToolCallError  # noqa: E402
from ..export.exporter import export_model  # noqa: E402  the modules below read checkpoints through the classes above
from ..hub.repository import DownloadError  # noqa: E402
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


AutoModelForCausalLM.register(ChatGLMConfig, OVChatGLMForCausalLM, exist_ok=True)
AutoModel.register(ChatGLMConfig, OVChatGLMForCausalLM, exist_ok=True)  # the original repositories name it here, too

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
    "export_model",
    "extension_path",
]
