# SPDX-License-Identifier: Apache-2.0
"""From an original checkpoint to an OpenVINO IR folder."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimum.intel.openvino.configuration import OVConfig, OVWeightQuantizationConfig
from transformers import GenerationConfig, PretrainedConfig

from .. import native
from ..architectures.architecture import Architecture
from ..architectures.registry import architecture_of
from ..checkpoint.adapters import merge_adapters
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.prefix import load_prefix
from ..checkpoint.shards import WEIGHT_FILES
from ..checkpoint.weights import Derived, Scratch, Weight
from ..choices import KV_CACHE_PRECISIONS, canonical
from ..errors import CheckpointError, ExportError
from ..hub.download import resolve_checkpoint
from ..hub.model_card import has_own_card, model_card
from ..integrations.recognition import read_config
from ..ir import MODEL_FILE, OPENVINO_MODEL_FILES, load_config, model_folder, weight_precision
from ..native.fuse_attention import fuse_attention
from ..signals import signals_elsewhere
from ..tokenization import has_vocabulary, load_tokenizer
from . import quantization
from .calibration import check_calibration
from .generation_settings import read_generation_config
from .model_server import save_model_server_files
from .native_linear import check_linear, make_linears_native
from .openvino_tokenizers import save_tokenizers
from .saving import save_model


logger = logging.getLogger(__name__)

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

Progress = Callable[[str, int, int], None]


def export_model(
    model_id: str | Path,
    output: str | Path,
    *,
    weight_format: str | None = None,
    quantization_config: OVWeightQuantizationConfig | Mapping[str, Any] | None = None,
    dataset: str | Path | Iterable[Any] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str = "",
    rope_ratio_type: str | None = None,
    adapters: Sequence[str | Path | tuple[str | Path, float]] = (),
    prefix_encoder: str | Path | None = None,
    attention: str = "openvino",
    kv_cache_precision: str | None = None,
    linear: str = "openvino",
    ovms: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Exports an original ChatGLM checkpoint to an IR folder: model, configuration and tokenizer.

    The folder gets all files of the model or none; an earlier export there is kept until the new one is complete, and
    what else is there stays.

    Args:
        model_id: local folder or Hub id of an original checkpoint.
        output: the folder to write; not one with original weights, whose configuration would be replaced.
        weight_format: "fp32", "fp16" or "bf16" (that precision for all weights, also for those that the checkpoint
            has as int4 or int8), "original" (as stored), "int8" (symmetric per output channel), "int4" and the other
            formats of `quantization.refined`; by default int8 for models over 10^9 parameters and the stored precision
            for smaller and for quantised ones.
        quantization_config: settings instead of `weight_format`: a dictionary of what differs from the defaults of its
            `dtype` or `bits`, or an `OVWeightQuantizationConfig`, taken as it is with the defaults of optimum-intel
            (embedding and output layer get its `backup_precision`, int8 with zero points unless it says otherwise).
        dataset: texts for the methods that look at activations (awq, scale_estimation, gptq, mixed precision): a text
            file, strings, a `datasets.Dataset` with a "text" column, "wikitext2", "c4" or "gsm8k", or "auto": what the
            model itself generates.
        revision, token, cache_dir, local_files_only, force_download, subfolder: as in transformers' `from_pretrained`.
        rope_ratio_type: what `rope_ratio` means, "linear" or "theta" (see `ChatGLMConfig`).
        adapters: folders of PEFT LoRA adapters to merge, each alone or with a weight; `modules_to_save` as well.
        prefix_encoder: folder or file with the `prefix_encoder` of a P-Tuning v2 training, if it is not part of the
            checkpoint, or a folder of PEFT's PREFIX_TUNING.
        attention: "openvino", a portable IR, whose attention `from_pretrained` replaces where it can; or "native", an
            IR that holds the operation of this package: for CPU, and only for what this package loads.
        kv_cache_precision: of the caches of `attention="native"`: "bf16" (default; also named "f16"), "u8" or "f32".
        linear: "openvino", or "native": the int8 and int4 layers of the blocks are native operations of this package,
            for CPU; `openvino_genai` and Model Server run the folder with the library of `extension_path()`.
        ovms: add what makes the folder a repository of OpenVINO Model Server.
        progress: called with a description, the number of tensors done and their total.

    Returns:
        The absolute path of `output`.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ExportError: the output, or statistics of activations, cannot be written.
        OSError: an input cannot be downloaded or read.
        NativeBuildError: `attention="native"` or `linear="native"`, and the native library is not there and cannot be
            built.
        ValueError: an argument or a key of config.json is not supported.
    """
    attention = canonical(attention)
    _check_attention(attention, kv_cache_precision)
    check_linear(linear, attention)
    output = Path(output).absolute()
    with model_folder(output) as folder:  # an output that cannot be written is found before a download
        source = resolve_checkpoint(
            model_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            subfolder=subfolder,
            export=True,
        )
        _check_original(source)
        read_config(source)
        tokenizer = _tokenizer(source)
        config = load_config(source, rope_ratio_type, tokenizer)
        architecture = architecture_of(config)
        quantization_config = quantization.resolve_config(
            config, weight_format, quantization_config, _parameters(architecture), dataset
        )
        if quantization_config:
            check_calibration(source, quantization_config, tokenizer, dataset)
        generation_config = read_generation_config(source, config, tokenizer)
        weights, prefix = _read_weights(
            source, architecture, adapters, prefix_encoder, _DTYPES.get(weight_format), Scratch(folder)
        )
        if quantization_config:
            weights = quantization.int8_rows(weights, quantization_config)
        model = architecture.build(_counted(weights, progress) if progress else weights, prefix)
        if quantization_config:
            with signals_elsewhere():
                quantization.compress(model, quantization_config, tokenizer, dataset)
        if attention == "native":
            fuse_attention(model, KV_CACHE_PRECISIONS[kv_cache_precision or "bf16"])
        if linear == "native":
            make_linears_native(model)
        save_model(model, folder / MODEL_FILE)
        _save_configuration(folder, config, generation_config, tokenizer, quantization_config)
        if ovms:
            save_model_server_files(folder, output.name, config)
        if linear == "native" and not has_own_card(output):
            card = model_card(config, precision=weight_precision(model), has_native_linears=True)
            (folder / "README.md").write_text(card, encoding="utf-8")
    return output


def _check_attention(attention: str, kv_cache_precision: str | None) -> None:
    if attention not in ("openvino", "native"):
        raise ValueError(f"`attention` is {attention!r}; expected 'openvino' or 'native'.")
    if attention == "openvino" and kv_cache_precision is not None:
        raise ValueError(
            "`kv_cache_precision` is for `attention='native'` alone; a portable IR takes KV_CACHE_PRECISION in "
            "`ov_config` when it is loaded."
        )
    if kv_cache_precision not in (None, *KV_CACHE_PRECISIONS):
        raise ValueError(
            f"`kv_cache_precision` is {kv_cache_precision!r}; expected one of {', '.join(KV_CACHE_PRECISIONS)}."
        )
    if attention == "native":
        native.extension_path()  # where it cannot be built, this raises before the checkpoint is read


def _check_original(source: Path) -> None:
    """Tells an exported model, or what is left of one, from a checkpoint without weights."""
    if any((source / name).is_file() for name in WEIGHT_FILES):
        return
    missing = [name for name in OPENVINO_MODEL_FILES if not (source / name).is_file()]
    if not missing:
        raise CheckpointError(
            f"{source}: a model that was exported already, without its original weights. Load it without "
            "`export=True`, or name the original checkpoint."
        )
    if len(missing) < len(OPENVINO_MODEL_FILES):
        raise CheckpointError(f"{source}: an exported model without {', '.join(missing)}. Copy or export it again.")


def _tokenizer(source: Path) -> Any:
    if has_vocabulary(source):
        return load_tokenizer(source)
    logger.warning(f"{source}: no tokenizer files; the exported folder will have no tokenizer.")
    return None


def _parameters(architecture: Architecture) -> int:
    return sum(math.prod(tensor.shape) for tensor in architecture.tensors().values())


def _read_weights(
    source: Path,
    architecture: Architecture,
    adapters: Sequence[str | Path | tuple[str | Path, float]],
    prefix_encoder: str | Path | None,
    dtype: torch.dtype | None,
    scratch: Scratch,
) -> tuple[Mapping[str, Weight], np.ndarray | None]:
    """Reads the weights of the graph, with adapters merged, all of `dtype` if that is asked for, and the prefix."""
    config, tensors = architecture.config, architecture.tensors()
    weights: Mapping[str, Weight] = Checkpoint(
        source, config, tensors | ({} if prefix_encoder else architecture.prefix_tensors()), scratch
    )
    if adapters:
        weights = merge_adapters(weights, adapters, config, tensors, dtype)
    prefix = None
    if getattr(config, "pre_seq_len", None) or prefix_encoder:
        prefix = load_prefix(weights, prefix_encoder, config, architecture.key_channels())
        config.pre_seq_len = prefix.shape[3]
    return (weights if dtype is None else _in_precision(weights, dtype)), prefix


def _in_precision(weights: Mapping[str, Weight], dtype: torch.dtype) -> Mapping[str, Weight]:
    """Returns `weights` as floating-point numbers of one precision."""

    def convert(name: str, weight: Weight) -> Weight:
        converted = weight.to(dtype)
        if converted is not weight and not torch.isfinite(torch.stack(torch.aminmax(converted.data))).all():
            largest = weight.to(torch.float32).data.abs().max()
            raise ExportError(
                f"{name}: values beyond the range of {dtype} (largest: {largest:.3g}); "
                "export with `weight_format` bf16, fp32 or int8."
            )
        return converted

    return Derived(weights, convert)


def _counted(weights: Mapping[str, Weight], progress: Progress) -> Mapping[str, Weight]:
    """Returns `weights` that report each tensor's first use."""
    seen: set[str] = set()

    def count(name: str, weight: Weight) -> Weight:
        if name not in seen:
            seen.add(name)
            progress("Reading weights", len(seen), len(weights))
        return weight

    return Derived(weights, count)


def _save_configuration(
    folder: Path,
    config: PretrainedConfig,
    generation_config: GenerationConfig,
    tokenizer: Any,
    quantization_config: OVWeightQuantizationConfig | None,
) -> None:
    """Writes what belongs to a model in `folder` beside its graph and weights."""
    if hasattr(config, "quantization_bit"):
        config.quantization_bit = 0
    config.use_cache = True
    config.save_pretrained(folder)
    generation_config.save_pretrained(folder)
    if tokenizer is not None:
        save_tokenizers(tokenizer, folder)
    if quantization_config:
        OVConfig(quantization_config=quantization.for_saving(quantization_config)).save_pretrained(folder)
