# SPDX-License-Identifier: Apache-2.0
"""The README.md of an exported model, from the template beside this file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PretrainedConfig

from ..choices import QUANTIZED_FORMATS
from ..environment import installed_versions
from .download import is_hub_id
from .native_linear import native_linear_usage


_TEMPLATE = Path(__file__).with_name("model_card.md")
_MARK = "<!-- Written by optimum_chatglm_ov and renewed on every save; delete this line to keep your text. -->"


def model_card(
    config: PretrainedConfig,
    *,
    repo_id: str = ".",
    base_model: str | None = None,
    precision: str | None = None,
    is_fused: bool = False,
    has_native_linears: bool = False,
    versions: Mapping[str, str] | None = None,
) -> str:
    """Writes the README.md of an exported model: metadata, where it comes from, and a snippet that runs as pasted.

    Args:
        config: configuration of the model.
        repo_id: what the snippet gives to `from_pretrained`: a Hub id or a folder; by default the folder it is run in.
        base_model: Hub id of the original checkpoint; from `config` when `None`.
        precision: of the weights, `"fp16"`, `"int8"`, ...
        is_fused: whether the model holds the fused attention operation.
        has_native_linears: whether its linear layers are native operations.
        versions: version by package name; those that are installed when `None`.
    """
    base_model = base_model or _base_model(config)
    versions = installed_versions() if versions is None else versions
    quantized = precision in QUANTIZED_FORMATS
    data = ModelCardData(
        language=["zh", "en"],
        library_name="openvino",
        pipeline_tag="text-generation",
        tags=["openvino", "optimum-intel", "chatglm", "text-generation"] + ([precision] if precision else []),
        base_model=base_model,
        base_model_relation="quantized" if quantized and base_model else None,
    )
    origin = f"`{base_model}`" if base_model else "a ChatGLM checkpoint"
    facts = {
        "Base model": origin if base_model else "not recorded",
        "Precision of the weights": precision or "not recorded",
        "Layers, hidden size": f"{config.num_hidden_layers}, {config.hidden_size}",
        "Context length": f"{config.max_position_embeddings} tokens",
    }
    if is_fused:
        facts["Attention"] = "native: for CPU, built with a C++ compiler at first use"
    facts |= {f"Saved with {name}": number for name, number in versions.items()}
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        mark=_MARK,
        title=base_model.rpartition("/")[2] if base_model else "ChatGLM",
        origin=origin,
        facts=facts,
        model_id=json.dumps(str(repo_id), ensure_ascii=False),
        usage_elsewhere=native_linear_usage(repo_id) if has_native_linears else "",
    )
    return str(card)


def has_own_card(folder: str | Path) -> bool:
    """Tells whether `folder` has a README.md that was not generated."""
    file = Path(folder) / "README.md"
    return file.exists() and _MARK not in file.read_text(encoding="utf-8", errors="replace")


def _base_model(config: PretrainedConfig) -> str | None:
    """Finds the Hub id of the original checkpoint: the one in its config.json, or the one that it was loaded from."""
    for name in (getattr(config, "original_name_or_path", None), getattr(config, "_name_or_path", None)):
        if name and "/" in name and is_hub_id(name) and not Path(name).exists():
            return name
    return None
