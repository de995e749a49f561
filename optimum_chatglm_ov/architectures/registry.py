# SPDX-License-Identifier: Apache-2.0
"""Which architecture a configuration belongs to."""

from __future__ import annotations

import importlib

from transformers import PretrainedConfig

from .architecture import Architecture
from .families import ARCHITECTURES


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Finds the architecture of `config`, with its sizes and switches.

    The table of families names its module, and that its class as `ARCHITECTURE`.

    Raises:
        ValueError: no family has it.
    """
    name = getattr(config, "architecture", config.model_type)  # `ChatGLMConfig` is that of two
    if name not in ARCHITECTURES:
        raise ValueError(f"{name!r} is no architecture of this package; it has {', '.join(sorted(ARCHITECTURES))}.")
    module = importlib.import_module(f".{name}", __package__)
    return module.ARCHITECTURE(config)
