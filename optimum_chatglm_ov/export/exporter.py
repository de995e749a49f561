# SPDX-License-Identifier: Apache-2.0
"""From an original checkpoint to an OpenVINO IR folder."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

import openvino as ov
import torch
from optimum.intel.openvino.configuration import OVConfig, OVWeightQuantizationConfig
from transformers import GenerationConfig

from .. import native
from ..architectures import registry as graph
from ..architectures.families import GENERATIONS_OF_RANKS, is_base, rope_ratio_type_of_generation
from ..checkpoint.adapters import merge_adapters
from ..checkpoint.checkpoint import WEIGHT_FILES, Checkpoint, Derived, Scratch, Weight
from ..checkpoint.prefix import load_prefix
from ..checkpoint.prefix import tensor_shapes as prefix_shapes
from ..choices import KV_CACHE_PRECISIONS
from ..configuration import ChatGLMConfig
from ..errors import CheckpointError, ExportError
from ..hub.repository import CONFIGURATION_FILES, OPENVINO_MODEL_FILES, has_own_card, model_card, resolve_checkpoint
from ..integrations.remote_code import read_config
from ..native.fuse_attention import fuse_attention
from ..output import complete_folder
from ..signals import signals_elsewhere
from ..tokenization import has_vocabulary, load_tokenizer
from . import quantization
from .model_server import MODEL_SERVER_FILES, save_model_server_files
from .native_linear import check_linear, make_linears_native
from .openvino_tokenizers import OPENVINO_TOKENIZER_FILES, save_tokenizers


logger = logging.getLogger(__name__)

MODEL_FILE = "openvino_model.xml"
# What an export may write: none of it is left over from an earlier one in the same folder.
_EXPORTED_FILES = frozenset(CONFIGURATION_FILES + OPENVINO_MODEL_FILES + OPENVINO_TOKENIZER_FILES + MODEL_SERVER_FILES)
# Settings of a generation that count in one mode alone.
_OF_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
_OF_BEAMS = ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty", "constraints")
_OF_RETURNED_DICT = ("output_attentions", "output_hidden_states", "output_logits", "output_scores")
_OF_OTHER_CACHES = ("cache_implementation", "cache_config", "return_legacy_cache")
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
    attention: str = "sdpa",
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
        attention: "sdpa", a portable IR, which `from_pretrained` fuses where it can; or "fused", an IR that holds the
            native operation of this package: for CPU, and only for what this package loads.
        kv_cache_precision: of the caches of `attention="fused"`: "bf16" (default; "f16" means it, too), "u8" or "f32".
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
        NativeBuildError: `attention="fused"` or `linear="native"`, and the native library is not there and cannot be
            built.
        ValueError: an argument or a key of config.json is not supported.
    """
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
        tokenizer = load_tokenizer(source) if has_vocabulary(source) else None
        if tokenizer is None:
            logger.warning(f"{source}: no tokenizer files; the exported folder will have no tokenizer.")
        config = load_config(source, rope_ratio_type, tokenizer)
        quantization_config = quantization.resolve_config(
            config, weight_format, quantization_config, _parameters(config), dataset
        )
        if quantization_config:
            _check_calibration(source, quantization_config, tokenizer, dataset)
        shapes = graph.tensor_shapes(config) | ({} if prefix_encoder else prefix_shapes(config))
        generation_config = _generation_config(source, config, tokenizer)
        weights: Mapping[str, Weight] = Checkpoint(source, config, shapes, Scratch(folder))
        if adapters:
            weights = merge_adapters(weights, adapters, config, _DTYPES.get(weight_format))
        prefix = None
        if config.pre_seq_len or prefix_encoder:
            prefix = load_prefix(weights, prefix_encoder, config)
            config.pre_seq_len = prefix.shape[3]
        if weight_format in _DTYPES:
            weights = _in_precision(weights, _DTYPES[weight_format])
        if quantization_config:
            weights = quantization.int8_rows(weights, quantization_config)
        model = graph.build_model(config, _counted(weights, progress) if progress else weights, prefix)
        if quantization_config:
            with signals_elsewhere():
                quantization.compress(model, quantization_config, tokenizer, dataset)
        if attention == "fused":
            fuse_attention(model, KV_CACHE_PRECISIONS[kv_cache_precision or "bf16"])
        if linear == "native":
            make_linears_native(model)
        _describe(model)
        ov.save_model(model, folder / MODEL_FILE, compress_to_fp16=False)
        _check_size(folder / MODEL_FILE)
        config.quantization_bit = 0
        config.use_cache = True
        config.save_pretrained(folder)
        generation_config.save_pretrained(folder)
        if tokenizer is not None:
            save_tokenizers(tokenizer, folder)
        if ovms:
            save_model_server_files(folder, output.name, config)
        if linear == "native" and not has_own_card(output):
            card = model_card(config, precision=quantization.weight_precision(model), has_native_linears=True)
            (folder / "README.md").write_text(card, encoding="utf-8")
        if quantization_config:
            OVConfig(quantization_config=quantization.for_saving(quantization_config)).save_pretrained(folder)
    return output


def _check_attention(attention: str, kv_cache_precision: str | None) -> None:
    if attention not in ("sdpa", "fused"):
        raise ValueError(f"`attention` is {attention!r}; expected 'sdpa' or 'fused'.")
    if attention == "sdpa" and kv_cache_precision is not None:
        raise ValueError(
            "`kv_cache_precision` is for `attention='fused'` alone; a portable IR takes KV_CACHE_PRECISION in "
            "`ov_config` when it is loaded."
        )
    if kv_cache_precision not in (None, *KV_CACHE_PRECISIONS):
        raise ValueError(
            f"`kv_cache_precision` is {kv_cache_precision!r}; expected one of {', '.join(KV_CACHE_PRECISIONS)}."
        )
    if attention == "fused":
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


def model_folder(output: str | Path) -> AbstractContextManager[Path]:
    """A `complete_folder` for a model, with nothing left over of an earlier one.

    Raises:
        ExportError: `output` holds original weights; or see `complete_folder`.
    """
    folder = Path(os.path.realpath(output))
    weights = next((folder / name for name in WEIGHT_FILES if os.path.lexists(folder / name)), None)
    if weights is not None:
        raise ExportError(
            f"{output}: a model written here would replace the configuration and tokenizer of the original weights "
            f"{weights}. Choose another output folder."
        )
    return complete_folder(folder, replaces=_EXPORTED_FILES)


def load_config(source: Path, rope_ratio_type: str | None = None, tokenizer: Any = None) -> ChatGLMConfig:
    """The configuration in folder `source`, where the tokenizer, too, tells what `rope_ratio` means.

    Raises:
        CheckpointError: config.json is missing, not JSON or of another model type.
        ValueError: nothing tells what `rope_ratio` means, or the configuration and the tokenizer contradict.
    """
    found = read_config(source)
    config = ChatGLMConfig.from_pretrained(source, **({"rope_ratio_type": rope_ratio_type} if rope_ratio_type else {}))
    if config.architecture == "chatglm2" and not (rope_ratio_type or found.get("rope_ratio_type")):
        config.rope_ratio_type = _agreed_rope_ratio_type(config, tokenizer)
        config.rope_theta  # noqa: B018  raises the explanation where nothing tells
    return config


def _agreed_rope_ratio_type(config: ChatGLMConfig, tokenizer: Any) -> str | None:
    """What `rope_ratio` means by the configuration and by the tokenizer.

    Raises:
        ValueError: they contradict each other.
    """
    by_config, generation = config.rope_ratio_type, getattr(tokenizer, "chatglm_generation", None)
    if config.rope_ratio in (None, 1) or generation is None or getattr(tokenizer, "generation_is_assumed", False):
        return by_config
    by_tokenizer = rope_ratio_type_of_generation(generation)
    if by_tokenizer in (None, by_config):
        return by_config
    if by_config is not None and generation not in GENERATIONS_OF_RANKS:  # whose vocabulary leaves no doubt
        raise ValueError(
            f"What `rope_ratio`={config.rope_ratio} means is contradictory: the tokenizer is that of {generation}, "
            f"which makes it {by_tokenizer!r}, and config.json (`_name_or_path` {config.original_name_or_path!r}, "
            f"`padded_vocab_size` {config.padded_vocab_size}) makes it {by_config!r}. Decide with "
            'rope_ratio_type="linear" (positions are divided by it) or rope_ratio_type="theta" (the rotary base is '
            "multiplied by it), in config.json or as an argument of the export (`--rope-ratio-type` on the command "
            "line)."
        )
    logger.info(f"rope_ratio={config.rope_ratio} is read as {by_tokenizer!r}, from the {generation} tokenizer.")
    return by_tokenizer


def end_turns(generation_config: GenerationConfig, config: ChatGLMConfig, tokenizer: Any) -> None:
    """Lets generation stop at every id that ends a turn, beside those that `generation_config` names.

    A base model, which completes text, knows no turns.
    """
    if is_base(config.original_name_or_path):
        return
    named = generation_config.eos_token_id
    named = named if isinstance(named, list) else [] if named is None else [named]
    ids = list(dict.fromkeys([*named, *tokenizer.turn_end_ids]))
    generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]


def _check_calibration(
    source: Path, quantization_config: OVWeightQuantizationConfig, tokenizer: Any, dataset: Any
) -> None:
    """Refuses what would fail after all weights were read.

    Raises:
        ExportError: the statistics cannot be written.
        ValueError: there are texts, and no tokenizer for them.
    """
    if dataset is None and quantization_config.dataset is None:
        return
    if tokenizer is None:
        raise ValueError(
            f"{source}: no tokenizer files, but the model is to see the texts of `dataset`. Add them, or choose a "
            "quantisation without texts."
        )
    statistics = quantization_config.statistics_path
    if statistics is not None and not Path(statistics).is_dir():
        with complete_folder(statistics):  # removed again: NNCF takes one that is there for written
            pass


def _generation_config(source: Path, config: ChatGLMConfig, tokenizer: Any) -> GenerationConfig:
    """The defaults of `generate` in folder `source`, without what has no effect or would spoil every generation.

    They name every id that ends a turn.

    Raises:
        CheckpointError: generation_config.json cannot be read, or asks for what transformers refuses.
    """
    file = source / "generation_config.json"
    if file.is_file():
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            without_effect = _without_effect(settings)
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{file}: not a JSON object ({error}). Download it again.") from error
    else:
        file = source / "config.json"
        settings = {key: getattr(config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        without_effect = _without_effect(settings)
    if settings.pop("use_cache", True) is False or not config.use_cache:
        log_ignored_cache(file if config.use_cache else source / "config.json")
    if without_effect:
        logger.info(f"{file}: without effect and left out: {', '.join(without_effect)}.")
    try:
        generation_config = GenerationConfig.from_dict(
            {name: value for name, value in settings.items() if name not in without_effect}
        )
        if tokenizer is not None:
            end_turns(generation_config, config, tokenizer)
        with TemporaryDirectory(prefix="optimum_chatglm_ov-") as folder:
            generation_config.save_pretrained(folder)  # strict, as when the model is written
    except ValueError as error:
        raise CheckpointError(f"{file}: transformers refuses it. Mend or remove the file. {error}") from error
    return generation_config


def _without_effect(settings: Mapping[str, Any]) -> list[str]:
    """Names of settings of a generation that only count in a mode which the others do not choose.

    transformers does not save those, and some versions do not even read them.
    """
    names = set(_OF_OTHER_CACHES)  # keys and values stay inside this model
    has_beams = (settings.get("num_beams") or 1) > 1
    if not settings.get("do_sample"):
        names |= set(_OF_SAMPLING)
    if not has_beams:
        names |= set(_OF_BEAMS)
        if settings.get("num_beams") is None:
            names.add("num_beams")
    if not (settings.get("do_sample") or has_beams) or settings.get("num_return_sequences") is None:
        names.add("num_return_sequences")
    if not settings.get("return_dict_in_generate"):
        names |= set(_OF_RETURNED_DICT)
    if (settings.get("pad_token_id") or 0) < 0:
        names.add("pad_token_id")
    return sorted(names & settings.keys())


def log_ignored_cache(file: Path) -> None:
    """Logs that a file would compute every token of a generation from the first, and that this is ignored."""
    logger.warning(
        f'{file}: "use_cache": false, as training leaves it, is ignored: every token would cost a pass over the whole '
        "text. Load the model with `use_cache=False` if that is meant."
    )


def _parameters(config: ChatGLMConfig) -> int:
    return sum(math.prod(shape) for shape in graph.tensor_shapes(config).values())


def _describe(model: ov.Model) -> None:
    """Writes what made the model into its `rt_info`, in the form optimum-intel reads."""
    for package in ("transformers", "optimum-intel", "nncf", "optimum-chatglm-ov"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        model.set_rt_info(version, ["optimum", f"{package.replace('-', '_')}_version"])
    precision, compression = quantization.weight_precision(model), ["nncf", "weight_compression"]
    if precision in ("int8", "int4") and not model.has_rt_info(compression):
        # integers that NNCF did not make: marked as its own, so that no tool quantises them again
        model.set_rt_info(f"{precision}_sym", [*compression, "mode"])


def _check_size(xml: Path) -> None:
    """A disk that fills up while OpenVINO writes does not always raise; its file is then too short.

    Raises:
        ExportError: the weights are shorter than the graph says.
    """
    ends = (int(data.get("offset", 0)) + int(data.get("size", 0)) for data in ElementTree.parse(xml).iter("data"))
    expected, weights = max(ends, default=0), xml.with_suffix(".bin")
    found = weights.stat().st_size if weights.is_file() else 0
    if found < expected:
        raise ExportError(
            f"{xml.parent}: only {found} of {expected} bytes of the weights were written; is the disk full? Nothing "
            "was changed."
        )


def _in_precision(weights: Mapping[str, Weight], dtype: torch.dtype) -> Mapping[str, Weight]:
    """`weights` as floating-point numbers in one precision."""

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
    """`weights`, reporting each tensor's first use."""
    seen: set[str] = set()

    def count(name: str, weight: Weight) -> Weight:
        if name not in seen:
            seen.add(name)
            progress("Reading weights", len(seen), len(weights))
        return weight

    return Derived(weights, count)
