# SPDX-License-Identifier: Apache-2.0
"""Which precision weights get, and NNCF asked to give it to them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import nncf
import openvino as ov
from nncf.errors import InvalidGroupSizeError, ParameterNotSupportedError, ValidationError
from optimum.intel.openvino.configuration import OVQuantizationMethod, OVWeightQuantizationConfig
from transformers import PretrainedConfig

from ..architectures.registry import architecture_of
from ..checkpoint.weights import Derived, Weight
from ..choices import FLOATING_FORMATS, WEIGHT_FORMATS
from ..ir import weight_precision
from . import texts
from .calibration import NUM_SAMPLES, SEQUENCE_LENGTH, calibration_inputs
from .int8 import quantize_rows


logger = logging.getLogger(__name__)

# Models with more parameters are quantised to int8 unless the caller decides, as in optimum-intel.
_INT8_BY_DEFAULT_ABOVE = 1_000_000_000
# Of the embedding, the output layer and whatever else does not become 4-bit.
_BACKUP = "int8_sym"
_4BIT = {"bits": 4, "backup_precision": _BACKUP}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "int8": {"bits": 8, "sym": True},
    "int4": _4BIT | {"sym": False, "group_size": 64},
    "nf4": _4BIT | {"group_size": 64},
    "mxfp4": _4BIT,
    "cb4": _4BIT,
}
_NEEDING_TEXTS = ("scale_estimation", "gptq", "lora_correction")
# The one way to choose the layers that stay 8-bit that looks at weights alone.
_WITHOUT_TEXTS = "weight_quantization_error"


def refined(weight_format: str, /, **details: Any) -> OVWeightQuantizationConfig:
    """Returns what `weight_format` stands for, but for what `details` say otherwise.

    int8 is symmetric per output channel, the form that the CPU plugin's fused AMX nodes accept. The 4-bit formats are
    group-wise in the linears of the blocks (64 weights a group in int4 and nf4, 32 in mxfp4, whole rows in cb4), int4
    with zero points; the embedding and the output layer are int8, symmetric per row, unless `all_layers` asks for them
    too.

    Args:
        weight_format: one of `QUANTIZED_FORMATS`.
        details: arguments of `OVWeightQuantizationConfig`, or of `nncf.compress_weights`; `dataset` may be any texts
            that `texts.read_texts` takes.

    Raises:
        ValueError: an unknown format or detail, or a combination that optimum-intel refuses.
    """
    if weight_format not in _DEFAULTS:
        raise ValueError(
            f"`weight_format`, or `dtype` or `bits` of a dictionary, asks for {weight_format!r}; expected one of "
            f"{', '.join(WEIGHT_FORMATS)}."
        )
    details = {"dtype": weight_format, **_DEFAULTS[weight_format], **details}
    dataset = details.get("dataset")
    if dataset is not None and texts.name_and_length(dataset)[0] is None:
        most = (details.get("num_samples") or NUM_SAMPLES) * SEQUENCE_LENGTH  # a text has at least one token
        details["dataset"] = list(islice(texts.read_texts(dataset), most))
    quantization_config = OVWeightQuantizationConfig(**details)
    # whatever the class does not know is for NNCF
    unknown = set(quantization_config.kwargs) - set(inspect.signature(nncf.compress_weights).parameters)
    if unknown:
        raise ValueError(
            f"`quantization_config` has {', '.join(sorted(unknown))}, which neither `OVWeightQuantizationConfig` nor "
            "`nncf.compress_weights` knows."
        )
    return quantization_config


def resolve_config(
    config: PretrainedConfig,
    weight_format: str | None,
    quantization_config: OVWeightQuantizationConfig | Mapping[str, Any] | None,
    num_parameters: int,
    dataset: Any = None,
) -> OVWeightQuantizationConfig | None:
    """Decides which quantisation to apply; `None` keeps floating-point (or the checkpoint's own quantised) weights.

    A dictionary names what differs from the defaults of its `dtype` or `bits` (see `refined`); an
    `OVWeightQuantizationConfig` is taken as it was written, with optimum-intel's defaults.

    Raises:
        ValueError: arguments that contradict each other or the checkpoint, a method that needs texts and has none, or
            texts (`dataset`, also of the settings) that cannot be read or have no use.
    """
    if quantization_config is not None and weight_format is not None:
        raise ValueError("Give `weight_format` or `quantization_config`, not both.")
    bits = getattr(config, "quantization_bit", None) or 0
    if isinstance(quantization_config, Mapping):
        default = f"int{quantization_config.get('bits', 8)}"
        quantization_config = refined(quantization_config.get("dtype") or default, **quantization_config)
    if quantization_config is None:
        weight_format = _chosen_format(weight_format, bits, num_parameters)
        if weight_format is None:
            return None
        quantization_config = refined(weight_format)
    if bits:
        raise ValueError(
            f"The checkpoint is already quantised (`quantization_bit`={bits}) and is exported with the same integers; "
            "quantising it again would lose accuracy. Leave out `weight_format`, `load_in_8bit` and "
            "`quantization_config`, or start from the 16-bit checkpoint."
        )
    if not isinstance(quantization_config, OVWeightQuantizationConfig):
        raise ValueError(
            f"`quantization_config` is a {type(quantization_config).__name__}; expected an "
            "`OVWeightQuantizationConfig` or a dictionary of its arguments."
        )
    if quantization_config.ratio == 0:  # which NNCF takes for 1
        raise ValueError("`ratio` is 0, so no layer would become 4-bit; ask for int8 (`bits` 8) instead.")
    _check_texts(quantization_config, dataset)
    is_awq = quantization_config.quant_method == OVQuantizationMethod.AWQ
    if is_awq and not architecture_of(config).has_gated_mlp:
        logger.warning(
            "AWQ changes nothing in this model: NNCF scales the inputs of a linear behind a Swish or a product, and "
            "ChatGLM-6B has a GELU there. Try scale_estimation or gptq."
        )
    return _with_fallback(quantization_config)


def _chosen_format(weight_format: str | None, bits: int, num_parameters: int) -> str | None:
    """Decides the quantised format: what was asked for, or what large models get; `None`: weights stay as they are.

    `bits` are those of a checkpoint that is quantised already, else 0.
    """
    if weight_format in FLOATING_FORMATS:
        if bits and weight_format != "original":
            logger.warning(
                f"The int{bits} weights of the checkpoint become {weight_format}, with the same values; the format "
                "'original' keeps the integers, which are smaller and faster."
            )
        return None
    if weight_format is None and not bits and num_parameters > _INT8_BY_DEFAULT_ABOVE:
        return "int8"
    return weight_format


def uses_texts(quantization_config: OVWeightQuantizationConfig) -> bool:
    """Tells whether a method of the settings looks at texts where it has some."""
    is_mixed = quantization_config.ratio < 1 and quantization_config.sensitivity_metric != _WITHOUT_TEXTS
    return quantization_config.bits == 4 and (
        quantization_config.quant_method == OVQuantizationMethod.AWQ
        or is_mixed
        or any(getattr(quantization_config, method) for method in _NEEDING_TEXTS)
    )


def _check_texts(quantization_config: OVWeightQuantizationConfig, dataset: Any) -> None:
    metric = quantization_config.sensitivity_metric
    metrics = [known.value for known in nncf.SensitivityMetric]
    if metric is not None and metric not in metrics:
        raise ValueError(f"`sensitivity_metric` is {metric!r}; expected one of {', '.join(metrics)}.")
    given = [source for source in (dataset, quantization_config.dataset) if source is not None]
    needing = [method for method in _NEEDING_TEXTS if getattr(quantization_config, method)]
    if metric not in (None, _WITHOUT_TEXTS):
        if quantization_config.ratio == 1:
            raise ValueError(
                "`sensitivity_metric` chooses which layers stay 8-bit, and at `ratio` 1 none do; give a ratio below 1."
            )
        needing.append(f"sensitivity_metric={metric}")
    if needing and not given:
        raise ValueError(
            f"{needing[0]} looks at activations and needs texts: give `dataset`, a text file, a list of strings or a "
            "`datasets.Dataset`."
        )
    if given and not uses_texts(quantization_config):
        raise ValueError(
            "`dataset` would have no effect: texts are for 4-bit weights with awq, scale_estimation, gptq, "
            "lora_correction or a ratio below 1. Choose one of them, or leave `dataset` out."
        )
    for source in given:
        # what can be read twice is tried before the weights are
        if not isinstance(source, Iterator) and texts.name_and_length(source)[0] != texts.OWN_TEXTS:
            texts.read_texts(source)


def _with_fallback(quantization_config: OVWeightQuantizationConfig) -> OVWeightQuantizationConfig:
    """Returns the settings with an answer to columns that are not a multiple of the group size.

    NNCF would stop. Such a linear gets the largest group that fits, or the backup precision if that is under 32;
    mxfp4, whose groups are always 32, leaves it as it is.
    """
    if quantization_config.bits != 4 or quantization_config.group_size_fallback is not None:
        return quantization_config
    quantization_config = deepcopy(quantization_config)
    quantization_config.group_size_fallback = "ignore" if quantization_config.dtype == "mxfp4" else "adjust"
    return quantization_config


def int8_rows(weights: Mapping[str, Weight], quantization_config: OVWeightQuantizationConfig) -> Mapping[str, Weight]:
    """Returns `weights` with those already int8 that are to become int8, symmetric per row, whatever NNCF finds.

    These are all matrices under `refined("int8")`, the embedding and the output layer under 4 bits.
    """
    if quantization_config.ignored_scope:
        return weights
    if quantization_config.bits == 8 and quantization_config.sym and not quantization_config.kwargs:
        return Derived(weights, quantize_rows)
    if (
        quantization_config.bits == 4
        and quantization_config.backup_precision == _BACKUP
        and not quantization_config.all_layers
    ):
        ends = ("embed_tokens.weight", "lm_head.weight")
        return Derived(weights, lambda name, weight: quantize_rows(name, weight) if name in ends else weight)
    return weights


def compress(
    model: ov.Model,
    quantization_config: OVWeightQuantizationConfig,
    tokenizer: Any = None,
    dataset: str | Path | Iterable[Any] | None = None,
) -> None:
    """Quantises the weights of `model` in place with NNCF, but for those that `int8_rows` has made int8.

    Args:
        model: a graph of an `Architecture`, or an IR of one, with floating-point weights.
        quantization_config: what to do.
        tokenizer: the model's own; needed by the methods that look at activations.
        dataset: texts for those (see `texts.read_texts`), instead of the settings' own; "auto" takes texts that the
            model generates before it is quantised.

    Raises:
        ValueError: texts without a tokenizer, or settings that NNCF refuses.
    """
    if quantization_config.dq_group_size is not None:
        path = ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]  # where optimum-intel writes it
        model.set_rt_info(str(quantization_config.dq_group_size), path)
    if weight_precision(model) == "int8":  # the work of `int8_rows`
        if quantization_config.bits == 8:
            return
        # else NNCF would take the last linear of the blocks for the output layer
        quantization_config = deepcopy(quantization_config)
        quantization_config.all_layers = True
    dataset = quantization_config.dataset if dataset is None else dataset
    calibration = None
    if dataset is not None:
        if tokenizer is None:
            raise ValueError("Calibration needs the tokenizer, and the checkpoint has no tokenizer files.")
        calibration = nncf.Dataset(calibration_inputs(quantization_config, tokenizer, dataset, model))
    with _quiet_nncf():
        try:
            nncf.compress_weights(model, dataset=calibration, **_arguments_of_nncf(quantization_config, calibration))
        except (ParameterNotSupportedError, InvalidGroupSizeError, ValidationError) as error:
            raise ValueError(f"NNCF refuses the quantisation settings: {' '.join(str(error).split())}") from error


def _arguments_of_nncf(
    quantization_config: OVWeightQuantizationConfig, calibration: nncf.Dataset | None
) -> dict[str, Any]:
    """Returns the settings as arguments of `nncf.compress_weights`, without a file of statistics that stays empty."""
    arguments = quantization_config.to_nncf_dict()
    advanced = arguments.get("advanced_parameters")
    if calibration is None and advanced is not None and advanced.statistics_path is not None:
        arguments["advanced_parameters"] = replace(advanced, statistics_path=None)
    return arguments


def for_saving(quantization_config: OVWeightQuantizationConfig) -> OVWeightQuantizationConfig:
    """Returns the settings without the texts that were used, which are the user's and may be long."""
    if not isinstance(quantization_config.dataset, list):
        return quantization_config
    quantization_config = deepcopy(quantization_config)
    quantization_config.dataset = None
    return quantization_config


@contextmanager
def _quiet_nncf():
    level = logging.getLogger("nncf").level
    nncf.set_log_level(logging.ERROR)
    try:
        yield
    finally:
        nncf.set_log_level(level or logging.INFO)
