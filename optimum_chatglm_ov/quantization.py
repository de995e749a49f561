# SPDX-License-Identifier: Apache-2.0
"""Which precision weights get, and NNCF asked to give it to them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import nncf
import openvino as ov
from optimum.intel.openvino.configuration import OVWeightQuantizationConfig
from optimum.intel.openvino.quantization import _weight_only_quantization

from .configuration import ChatGLMConfig


FLOATING_FORMATS = ("original", "fp32", "fp16", "bf16")
QUANTIZED_FORMATS = ("int8", "int4", "nf4", "mxfp4", "cb4")
# Models with more parameters are quantised to int8 unless the caller decides, as in optimum-intel.
_INT8_BY_DEFAULT_ABOVE = 1_000_000_000


def default_config(weight_format: str) -> OVWeightQuantizationConfig:
    """The settings that `weight_format` stands for.

    int8 is symmetric per output channel, the form that the CPU plugin's fused AMX nodes accept. The 4-bit formats are
    group-wise in the linears of the blocks; the embedding and the output layer stay int8.

    Raises:
        ValueError: an unknown format.
    """
    if weight_format == "int8":
        return OVWeightQuantizationConfig(bits=8, sym=True)
    if weight_format == "int4":
        return OVWeightQuantizationConfig(bits=4, sym=False, group_size=64, ratio=1.0)
    if weight_format in QUANTIZED_FORMATS:
        return OVWeightQuantizationConfig(bits=4, dtype=weight_format, ratio=1.0)
    raise ValueError(
        f"`weight_format` is {weight_format!r}; expected one of {', '.join(FLOATING_FORMATS + QUANTIZED_FORMATS)}."
    )


def resolve_config(
    config: ChatGLMConfig,
    weight_format: str | None,
    quantization_config: OVWeightQuantizationConfig | Mapping[str, Any] | None,
    num_parameters: int,
) -> OVWeightQuantizationConfig | None:
    """The quantisation to apply, or `None` to keep floating-point (or the checkpoint's own quantised) weights.

    Raises:
        ValueError: arguments that contradict each other or the checkpoint.
    """
    if quantization_config is not None and weight_format is not None:
        raise ValueError("Give `weight_format` or `quantization_config`, not both.")
    if isinstance(quantization_config, Mapping):
        if dict(quantization_config) in ({"bits": 4}, {"bits": 8}):
            quantization_config = default_config(f"int{quantization_config['bits']}")
        else:
            quantization_config = OVWeightQuantizationConfig(**quantization_config)
    if quantization_config is None:
        if weight_format in FLOATING_FORMATS:
            return None
        if weight_format is None:
            if config.quantization_bit or num_parameters <= _INT8_BY_DEFAULT_ABOVE:
                return None
            weight_format = "int8"
        quantization_config = default_config(weight_format)
    if config.quantization_bit:
        raise ValueError(
            f"The checkpoint is already quantised (`quantization_bit`={config.quantization_bit}) and is exported with "
            "the same integers; quantising it again would lose accuracy. Leave out `weight_format`, `load_in_8bit` and "
            "`quantization_config`, or start from the 16-bit checkpoint."
        )
    return quantization_config


def compress(model: ov.Model, quantization_config: OVWeightQuantizationConfig, tokenizer: Any = None) -> None:
    """Quantises the weights of `model` in place with NNCF."""
    with _quiet_nncf():
        _weight_only_quantization(model, quantization_config)


@contextmanager
def _quiet_nncf():
    level = logging.getLogger("nncf").level
    nncf.set_log_level(logging.ERROR)
    try:
        yield
    finally:
        nncf.set_log_level(level or logging.INFO)
