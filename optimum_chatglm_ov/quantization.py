# SPDX-License-Identifier: Apache-2.0
"""Which precision weights get, and NNCF asked to give it to them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
from nncf.errors import InvalidGroupSizeError, ParameterNotSupportedError, ValidationError
from optimum.intel.openvino.configuration import OVWeightQuantizationConfig
from optimum.intel.openvino.quantization import _weight_only_quantization

from . import texts
from .checkpoint import Derived, Weight
from .configuration import ChatGLMConfig
from .int8 import quantize_rows


FLOATING_FORMATS = ("original", "fp32", "fp16", "bf16")
QUANTIZED_FORMATS = ("int8", "int4", "nf4", "mxfp4", "cb4")
WEIGHT_FORMATS = FLOATING_FORMATS + QUANTIZED_FORMATS
# Models with more parameters are quantised to int8 unless the caller decides, as in optimum-intel.
_INT8_BY_DEFAULT_ABOVE = 1_000_000_000
# Of the embedding, the output layer and whatever else does not become 4-bit.
_BACKUP = "int8_sym"
# Calibration: samples and their tokens, unless the settings say otherwise.
_NUM_SAMPLES = 128
_SEQUENCE_LENGTH = 128


def default_config(weight_format: str) -> OVWeightQuantizationConfig:
    """The settings that `weight_format` stands for.

    int8 is symmetric per output channel, the form that the CPU plugin's fused AMX nodes accept. The 4-bit formats are
    group-wise in the linears of the blocks; the embedding and the output layer are int8, symmetric per row, unless
    `all_layers` asks for them too.

    Raises:
        ValueError: an unknown format.
    """
    if weight_format == "int8":
        return OVWeightQuantizationConfig(bits=8, sym=True)
    if weight_format == "int4":
        return OVWeightQuantizationConfig(bits=4, sym=False, group_size=64, ratio=1.0, backup_precision=_BACKUP)
    if weight_format in QUANTIZED_FORMATS:
        return OVWeightQuantizationConfig(bits=4, dtype=weight_format, ratio=1.0, backup_precision=_BACKUP)
    raise ValueError(f"`weight_format` is {weight_format!r}; expected one of {', '.join(WEIGHT_FORMATS)}.")


def resolve_config(
    config: ChatGLMConfig,
    weight_format: str | None,
    quantization_config: OVWeightQuantizationConfig | Mapping[str, Any] | None,
    num_parameters: int,
    dataset: Any = None,
) -> OVWeightQuantizationConfig | None:
    """The quantisation to apply, or `None` to keep floating-point (or the checkpoint's own quantised) weights.

    Raises:
        ValueError: arguments that contradict each other or the checkpoint, a method that needs texts and has none, or
            texts (`dataset`, also of the settings) without a use for them.
    """
    if quantization_config is not None and weight_format is not None:
        raise ValueError("Give `weight_format` or `quantization_config`, not both.")
    if isinstance(quantization_config, Mapping):
        if dict(quantization_config) in ({"bits": 4}, {"bits": 8}):
            quantization_config = default_config(f"int{quantization_config['bits']}")
        else:
            quantization_config = settings_of(quantization_config)
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
            "the same integers; quantising it again would lose accuracy. Leave out `weight_format`, `load_in_8bit` "
            "and `quantization_config`, or start from the 16-bit checkpoint."
        )
    if not isinstance(quantization_config, OVWeightQuantizationConfig):
        raise ValueError(
            f"`quantization_config` is a {type(quantization_config).__name__}; expected an "
            "`OVWeightQuantizationConfig` or a dictionary of its arguments."
        )
    has_texts = dataset is not None or quantization_config.dataset is not None
    needing = _needs_data(quantization_config)
    if needing and not has_texts:
        raise ValueError(
            f"{needing} looks at activations and needs texts: give `dataset`, a text file, a list of strings or a "
            "`datasets.Dataset`."
        )
    if has_texts and quantization_config.bits == 8:
        raise ValueError("`dataset` is only for 4-bit weights; int8 rounds without looking at texts. Leave it out.")
    return _with_fallback(quantization_config)


def settings_of(arguments: Mapping[str, Any]) -> OVWeightQuantizationConfig:
    """The settings with these arguments; `dataset` may also be a text file or rows with texts."""
    arguments = dict(arguments)
    dataset = arguments.get("dataset")
    if isinstance(dataset, Path) or (isinstance(dataset, str) and Path(dataset).is_file()):
        arguments["dataset"] = list(texts.read_texts(dataset))
    elif dataset is not None and not isinstance(dataset, (str, list)):
        arguments["dataset"] = list(islice(texts.read_texts(dataset), arguments.get("num_samples") or _NUM_SAMPLES))
    quantization_config = OVWeightQuantizationConfig(**arguments)
    # whatever the class does not know is for NNCF
    unknown = set(quantization_config.kwargs) - set(inspect.signature(nncf.compress_weights).parameters)
    if unknown:
        raise ValueError(
            f"`quantization_config` has {', '.join(sorted(unknown))}, which neither `OVWeightQuantizationConfig` nor "
            "`nncf.compress_weights` knows."
        )
    return quantization_config


def _with_fallback(quantization_config: OVWeightQuantizationConfig) -> OVWeightQuantizationConfig:
    """The settings with an answer to columns that are not a multiple of the group size.

    NNCF would stop. Such a linear gets the largest group that fits, or the backup precision if that is under 32;
    mxfp4, whose groups are always 32, leaves it as it is.
    """
    if quantization_config.bits != 4 or quantization_config.group_size_fallback is not None:
        return quantization_config
    quantization_config = deepcopy(quantization_config)
    quantization_config.group_size_fallback = "ignore" if quantization_config.dtype == "mxfp4" else "adjust"
    return quantization_config


def int8_rows(weights: Mapping[str, Weight], quantization_config: OVWeightQuantizationConfig) -> Mapping[str, Weight]:
    """`weights`, with those already int8 that are to become int8, symmetric per row, whatever NNCF finds.

    These are all matrices under `default_config("int8")`, the embedding and the output layer under 4 bits.
    """
    if _all_int8(quantization_config):
        return Derived(weights, quantize_rows)
    if _int8_ends(quantization_config):
        ends = ("embed_tokens.weight", "lm_head.weight")
        return Derived(weights, lambda name, weight: quantize_rows(name, weight) if name in ends else weight)
    return weights


def _all_int8(quantization_config: OVWeightQuantizationConfig) -> bool:
    return (
        quantization_config.bits == 8
        and quantization_config.sym
        and not (quantization_config.ignored_scope or quantization_config.kwargs)
    )


def _int8_ends(quantization_config: OVWeightQuantizationConfig) -> bool:
    return (
        quantization_config.bits == 4
        and quantization_config.backup_precision == _BACKUP
        and not (quantization_config.all_layers or quantization_config.ignored_scope)
    )


def compress(
    model: ov.Model,
    quantization_config: OVWeightQuantizationConfig,
    tokenizer: Any = None,
    dataset: str | Path | Iterable[Any] | None = None,
) -> None:
    """Quantises the weights of `model` in place with NNCF, but for those that `int8_rows` has made int8.

    Args:
        model: a graph of `graph.build_model`.
        quantization_config: what to do.
        tokenizer: the model's own; needed by the methods that look at activations.
        dataset: texts for those (see `texts.read_texts`), instead of the settings' own.

    Raises:
        ValueError: texts without a tokenizer, or settings that NNCF refuses.
    """
    if _all_int8(quantization_config):
        return
    if _int8_ends(quantization_config):  # else NNCF would take the last linear of the blocks for the output layer
        quantization_config = deepcopy(quantization_config)
        quantization_config.all_layers = True
    dataset = quantization_config.dataset if dataset is None else dataset
    calibration = None
    if dataset is not None:
        if tokenizer is None:
            raise ValueError("Calibration needs the tokenizer, and the checkpoint has no tokenizer files.")
        calibration = nncf.Dataset(calibration_inputs(quantization_config, tokenizer, dataset))
    with _quiet_nncf():
        try:
            _weight_only_quantization(model, quantization_config, calibration)
        except (ParameterNotSupportedError, InvalidGroupSizeError, ValidationError) as error:
            raise ValueError(f"NNCF refuses the quantisation settings: {error}") from error


def calibration_inputs(
    quantization_config: OVWeightQuantizationConfig, tokenizer: Any, dataset: str | Path | Iterable[Any]
) -> list[dict[str, np.ndarray]]:
    """Inputs of the stateful graph: up to `num_samples` blocks of `dataset`, each as a model generates it.

    A block has 128 tokens, or the `seq_len` of a data set named like "wikitext2:seq_len=64".

    Raises:
        ValueError: `dataset` holds no text.
    """
    settings = getattr(quantization_config, "_dataset_kwargs", None) or {}
    blocks = texts.blocks(texts.read_texts(dataset), tokenizer, settings.get("seq_len") or _SEQUENCE_LENGTH)
    samples = islice(blocks, quantization_config.num_samples or _NUM_SAMPLES)
    return [_inputs(texts.generated(block, tokenizer)[0]) for block in samples]


def _inputs(ids: list[int]) -> dict[str, np.ndarray]:
    input_ids = np.array([ids], dtype=np.int64)
    return {
        "input_ids": input_ids,
        "attention_mask": np.ones_like(input_ids),
        "position_ids": np.arange(len(ids), dtype=np.int64)[None],
        "beam_idx": np.zeros(1, dtype=np.int32),
    }


def _needs_data(quantization_config: OVWeightQuantizationConfig) -> str | None:
    """Name of the first setting that cannot work without texts."""
    return next(
        (name for name in ("scale_estimation", "gptq", "lora_correction") if getattr(quantization_config, name)), None
    )


def for_saving(quantization_config: OVWeightQuantizationConfig) -> OVWeightQuantizationConfig:
    """The settings without the texts that were used, which are the user's and may be long."""
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
