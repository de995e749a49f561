# SPDX-License-Identifier: Apache-2.0
"""What `from_pretrained` is asked for, and what it makes of an original checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import GenerationConfig

from . import environment
from .choices import ATTENTIONS, LINEARS
from .runtime.compilation import choice


logger = logging.getLogger(__name__)

_WEIGHT_FORMAT_OF_DTYPE = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Choices:
    """Who computes attention and linear layers, by argument, environment and default.

    Attributes:
        attention, linear: see `compile_engine`.
        named: whether `attention` was an argument.
    """

    attention: str
    linear: str
    named: bool

    @classmethod
    def of(cls, attention: str | None, linear: str | None, compile_only: bool) -> Choices:
        """Decides who computes, by arguments, variables and defaults in this order.

        Raises:
            ValueError: an unknown value; or native operations with `compile_only`.
        """
        named = attention is not None
        attention = choice("attention", attention, ATTENTIONS, environment.ATTENTION)
        own = "openvino" if attention == "openvino" else "auto"
        linear = choice("linear", linear, LINEARS, environment.LINEAR, own)
        if not compile_only:
            return cls(attention, linear, named)
        for argument, chosen, variable in (
            ("attention", attention, environment.ATTENTION),
            ("linear", linear, environment.LINEAR),
        ):
            if chosen.startswith("native"):
                raise ValueError(
                    f'`compile_only` compiles the IR as it is; `{argument}="{chosen}"` (or {variable}={chosen}) '
                    "changes it. Leave one out."
                )
        return cls("openvino", "openvino", named)

    def check_fused_ir(
        self, model_id: str, compile_only: bool, load_in_8bit: bool | None, quantization_config: Any
    ) -> None:
        """Refuses what contradicts an IR with native attention.

        Raises:
            ValueError: something was asked for that an IR with the fused attention operation cannot be.
        """
        for argument, is_given in (
            ("compile_only", compile_only),
            (
                "attention='openvino'" if self.named else f"{environment.ATTENTION}=openvino",
                self.attention == "openvino",
            ),
            ("load_in_8bit", load_in_8bit),
            ("quantization_config", quantization_config is not None),
        ):
            if is_given:
                raise ValueError(
                    f"{model_id}: `{argument}` is not for this IR, which holds the fused attention operation. "
                    "Leave it out, or export the original checkpoint again in the portable form."
                )


def no_ir_error(model_id: str | Path) -> FileNotFoundError:
    """Makes the error of `export=False` where nothing has been exported."""
    return FileNotFoundError(
        f"{model_id}: no openvino_model.xml with its .bin was found, and `export=False` forbids making them. "
        "Leave `export` unset to export the original checkpoint."
    )


def check_not_merged(model_id: str, adapters: Sequence[Any], prefix_encoder: Any) -> None:
    """Refuses to merge anything into an IR.

    Raises:
        ValueError: something is to be merged into an IR.
    """
    if adapters or prefix_encoder:
        raise ValueError(
            f"{model_id}: `adapters` and `prefix_encoder` are merged at export, but this is exported already. "
            "Export the original checkpoint again with them (`export=True`)."
        )


def export_temporarily(
    source: Path,
    *,
    compile_only: bool,
    load_in_8bit: bool | None,
    weight_format: str | None,
    quantization_config: Mapping[str, Any] | None,
    **arguments: Any,
) -> TemporaryDirectory:
    """Exports an original checkpoint for one model; arguments as those of `from_pretrained` and `export_model`.

    Returns:
        The temporary folder, with the IR in its subfolder `model`. It must live as long as the model that maps it.

    Raises:
        ValueError: `compile_only`; or see `export_model`.
    """
    from .export.exporter import export_model  # running a model needs no exporter

    if compile_only:
        raise ValueError(
            "`compile_only` loads an IR and cannot export; run `chatglm-ov export` or `save_pretrained` first."
        )
    if quantization_config is None and load_in_8bit:
        quantization_config = {"bits": 8}
    if quantization_config is not None:
        weight_format = None
    elif load_in_8bit is False:
        weight_format = weight_format or "original"
    temporary = TemporaryDirectory(prefix="optimum_chatglm_ov-")
    export_model(
        source,
        Path(temporary.name) / "model",
        weight_format=weight_format,
        quantization_config=quantization_config,
        **arguments,
    )
    return temporary


def stored_generation_config(folder: Path) -> GenerationConfig | None:
    """Reads generation_config.json in `folder`; `None` if none can be read: config.json tells instead."""
    try:
        generation_config = GenerationConfig.from_pretrained(folder)
    except OSError as error:
        logger.info(f"{folder}: no generation_config.json is used ({error}).")
        return None
    generation_config.cache_implementation = None  # keys and values are the engine's
    return generation_config


def weight_format_of(dtype: torch.dtype | str | None) -> str | None:
    """Returns the `weight_format` that `dtype` of transformers' `from_pretrained` means, `None` if it means none.

    Raises:
        ValueError: a type that weights cannot have.
    """
    if dtype is None or dtype == "auto":
        return None
    weight_format = _WEIGHT_FORMAT_OF_DTYPE.get(str(dtype).removeprefix("torch."))
    if weight_format is None:
        raise ValueError(
            f"`dtype` is {dtype!r}; expected torch.float32, torch.float16, torch.bfloat16 or 'auto'. Integers are "
            "asked for with `load_in_8bit` or `quantization_config`."
        )
    return weight_format
