# SPDX-License-Identifier: Apache-2.0
"""Lets `AutoModelForCausalLM` load exported models whose original checkpoints transformers has classes for."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from ..architectures.families import MODEL_TYPES_OF_TRANSFORMERS
from ..errors import CheckpointError
from ..ir import has_openvino_model
from .remote_code import read_config


def load_exported_models() -> None:
    """Makes `AutoModelForCausalLM.from_pretrained` look whether a folder holds an exported model.

    Its model type may be one of transformers, which would look for weights of torch. Calling this again changes
    nothing.
    """
    original = AutoModelForCausalLM.from_pretrained.__func__
    if getattr(original, "_loads_exported_models", False):
        return

    @functools.wraps(original)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_exported(pretrained_model_name_or_path, kwargs.get("subfolder")):
            from ..modeling import OVChatGLMForCausalLM

            return OVChatGLMForCausalLM.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return original(cls, pretrained_model_name_or_path, *args, **kwargs)

    from_pretrained._loads_exported_models = True
    AutoModelForCausalLM.from_pretrained = classmethod(from_pretrained)


def _is_exported(name_or_path: Any, subfolder: str | None) -> bool:
    if not isinstance(name_or_path, (str, os.PathLike)):
        return False
    folder = Path(name_or_path, subfolder or "")
    try:
        return has_openvino_model(folder) and read_config(folder).get("model_type") in MODEL_TYPES_OF_TRANSFORMERS
    except CheckpointError:  # of another package
        return False
