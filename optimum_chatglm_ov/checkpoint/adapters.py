# SPDX-License-Identifier: Apache-2.0
"""Merges LoRA adapters (Hu et al. 2021), in the folders that PEFT writes, into the weights of a checkpoint."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from ..errors import CheckpointError
from .shards import Shard, open_shard, read_tensor, split_name
from .weights import Derived, StoredTensor, Weight


ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B|embedding_A|embedding_B)(?:\.default)?(?:\.weight)?")
# Of tensors that take the place of the base's: `modules_to_save`, and embeddings that PEFT saves with an adapter.
_WHOLE = re.compile(r"(?P<module>.+?)(?:\.modules_to_save(?:\.default)?|\.base_layer)?\.(?P<kind>weight|bias)")
# Variants that are not W + scale * B @ A in every layer and for every token, by key of adapter_config.json.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "trainable_token_indices",
    "use_qalora",
    "target_parameters",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Initialisations that also change the base weights an adapter belongs to.
_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva")
# Rows merged at a time: the fp32 copies stay below 100 MB.
_ROWS = 1024


@dataclass(frozen=True)
class _LoRA:
    """One adapter's change of one linear: `scale * b @ a`, a `[r, in]`, b `[out, r]`, both fp32."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True)
class _Whole:
    """A tensor that was trained as a whole: `weight * (data - base)` is one adapter's change."""

    data: torch.Tensor
    weight: float


def adapter_targets(tensors: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """Names the linear layers as adapters do: by the last part of the names of their modules."""
    modules = (tensor.original.removesuffix(".weight") for tensor in tensors.values() if tensor.is_linear)
    return tuple(dict.fromkeys(module.rpartition(".")[2] for module in modules))


def merge_adapters(
    weights: Mapping[str, Weight],
    adapters: Sequence[str | Path | tuple[str | Path, float]],
    config: PretrainedConfig,
    tensors: Mapping[str, StoredTensor],
    dtype: torch.dtype | None = None,
) -> Mapping[str, Weight]:
    """Returns `weights` with `W + sum(weight * alpha / r * B @ A)` for every linear `W` that an adapter changes.

    The embedding is changed alike, and what an adapter has as a whole (`modules_to_save`) replaces the base's, with a
    weight other than 1 in part. Sums are computed in fp32 and rounded once, when a tensor is asked for.

    Args:
        weights: the checkpoint, by canonical name.
        adapters: PEFT LoRA folders, each alone (weight 1) or with a weight.
        config: configuration of the checkpoint.
        tensors: what the checkpoint holds, by canonical name.
        dtype: of the changed tensors; that of the checkpoint by default.

    Raises:
        CheckpointError: a folder is not a LoRA adapter, was made for another model, uses a variant of LoRA that cannot
            be merged, or the checkpoint is quantised.
        ValueError: `adapters` is a single path, or holds what is neither a folder nor a folder with a finite weight.
    """
    if isinstance(adapters, (str, Path)):
        raise ValueError(f"`adapters` is {str(adapters)!r}; expected a list of folders, or of (folder, weight).")
    if getattr(config, "quantization_bit", None):
        raise CheckpointError(
            f"The checkpoint is quantised (`quantization_bit`={config.quantization_bit}); adapters cannot be merged "
            "into rounded weights without losing most of the change. Start from the 16-bit checkpoint and quantise at "
            "the export."
        )
    changes: dict[str, list[_LoRA | _Whole]] = {}
    for adapter in adapters:
        folder, weight = adapter if isinstance(adapter, tuple) and len(adapter) == 2 else (adapter, 1.0)
        if not isinstance(folder, (str, Path)):
            raise ValueError(f"`adapters` has {adapter!r}; expected a folder, or a tuple (folder, weight).")
        if not _is_number(weight):
            raise ValueError(f"{folder}: the adapter's weight is {weight!r}; expected a finite number.")
        for name, change in _read(Path(folder), float(weight), config, tensors):
            changes.setdefault(name, []).append(change)

    def merge(name: str, base: Weight) -> Weight:
        return _merged(name, base, changes[name], dtype) if name in changes else base

    return Derived(weights, merge)


def _merged(name: str, base: Weight, changes: Sequence[_LoRA | _Whole], dtype: torch.dtype | None) -> Weight:
    shape, dtype = tuple(base.data.shape), dtype or base.data.dtype
    merged = base.scratch.empty(shape, dtype) if base.scratch else torch.empty(shape, dtype=dtype)
    wholes = [change for change in changes if isinstance(change, _Whole)]
    loras = [change for change in changes if isinstance(change, _LoRA)]
    for start in range(0, shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        own = base.data[rows].float()
        total = own.clone()
        for i, whole in enumerate(wholes):
            data = whole.data[rows].float()
            # `lerp` is exactly `data` where the weight is 1
            total = torch.lerp(own, data, whole.weight) if i == 0 else total + whole.weight * (data - own)
        for lora in loras:
            total += lora.scale * (lora.b[rows] @ lora.a)
        merged[rows] = total
    if not torch.isfinite(torch.stack(torch.aminmax(merged))).all():
        wider = ", or export with `weight_format` bf16 or fp32" if dtype == torch.float16 else ""
        raise CheckpointError(
            f"{name}: the base and the adapters add up to values beyond the range of {dtype}. Give the adapters "
            f"smaller weights{wider}."
        )
    return replace(base, data=merged, bits=8 * merged.element_size())


def _read(
    folder: Path, weight: float, config: PretrainedConfig, tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, _LoRA | _Whole]]:
    """Yields the changes that the adapter in `folder` makes, each with the canonical name of the tensor."""
    settings = _settings(folder / "adapter_config.json")
    file = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder}: no adapter weights found; expected {' or '.join(ADAPTER_FILES)}.")
    shard = open_shard(file)
    canonical = {split_name(tensor.original)[1]: name for name, tensor in tensors.items()}
    if config.tie_word_embeddings:  # PEFT changes it as one of the two alone, and here they are one
        canonical = {original: name for original, name in canonical.items() if name != "embed_tokens.weight"}
    pairs, whole, unknown = _tensors(shard, canonical)
    adaptable = {original for original, name in canonical.items() if tensors[name].is_adaptable}
    adapted = {module for module in pairs if f"{module}.weight" in adaptable}
    unknown += [module for module in pairs if module not in adapted]
    if unknown or not (pairs or whole):
        found = f"cannot merge {_shortened(unknown)}" if unknown else "no lora_A and lora_B tensors found"
        more = "for its embedding or its output layer, or whole tensors of it"
        if config.tie_word_embeddings:
            more = "or whole tensors of it, but not of its embedding, which is its output layer, too"
        raise CheckpointError(
            f"{file}: {found}. Expected pairs of lora_A and lora_B for {', '.join(adapter_targets(tensors))} in the "
            f"{config.num_hidden_layers} layers of this model, {more} (modules_to_save); the adapter was trained for "
            "another model or on other modules."
        )
    saved = {name.rpartition(".")[0] for name in whole}
    for module in settings.get("modules_to_save") or ():
        if not any(f".{name}".endswith(f".{module}") for name in saved):
            raise CheckpointError(
                f"{file}: modules_to_save in adapter_config.json names {module!r}, but the file has no tensor of a "
                "module of this model that is called so. The two files do not belong together, or to this model."
            )
    for original, stored in whole.items():
        name = canonical[original]
        data, shape = read_tensor(shard, stored), tensors[name].shape
        if tuple(data.shape) != shape or not data.is_floating_point():
            raise CheckpointError(
                f"{file}: {stored} is {data.dtype} {list(data.shape)}; expected floating-point numbers "
                f"{list(shape)}, as in this model. The adapter was trained for another model, or for a changed "
                "vocabulary."
            )
        yield name, _Whole(data, weight)
    for module, sides in pairs.items():
        name = canonical[f"{module}.weight"]
        module = tensors[name].original.removesuffix(".weight")  # as rank_pattern names it
        yield name, _lora(shard, module, sides, settings, weight, tensors[name].shape)


def _tensors(
    shard: Shard, canonical: Mapping[str, str]
) -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
    """Sorts the adapter's tensors: A and B by the original name of the module, whole tensors by theirs, others."""
    pairs: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    others = []
    for stored in shard.names():
        _, name = split_name(stored)
        if match := _TENSOR.fullmatch(name):
            pairs.setdefault(match["module"], {})[match["side"]] = stored
        elif (match := _WHOLE.fullmatch(name)) and (original := f"{match['module']}.{match['kind']}") in canonical:
            whole[original] = stored
        else:
            others.append(stored)
    return pairs, whole, others


def _lora(
    shard: Shard,
    module: str,
    sides: Mapping[str, str],
    settings: Mapping[str, Any],
    weight: float,
    shape: tuple[int, int],
) -> _LoRA:
    if set(sides) == {"embedding_A", "embedding_B"}:  # [r, rows] and [columns, r]: a token's row of A is looked up
        b, a = (read_tensor(shard, sides[side]).T for side in ("embedding_A", "embedding_B"))
    elif set(sides) == {"A", "B"}:
        a, b = (read_tensor(shard, sides[side]) for side in "AB")
    else:
        raise CheckpointError(f"{shard.file}: {module} has only lora_{''.join(sides)}; the file is incomplete.")
    for side in (a, b):
        if not side.is_floating_point():
            raise CheckpointError(
                f"{shard.file}: {module} has an adapter of {side.dtype}; expected float32, float16 or bfloat16."
            )
    rank = _for_module(settings.get("rank_pattern"), module, settings["r"])
    alpha = _for_module(settings.get("alpha_pattern"), module, settings["lora_alpha"])
    rows, columns = shape
    if tuple(a.shape) != (rank, columns) or tuple(b.shape) != (rows, rank):
        raise CheckpointError(
            f"{shard.file}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; expected "
            f"{[rank, columns]} and {[rows, rank]} (rank {rank} in adapter_config.json, a linear of {rows} x "
            f"{columns}). The adapter was trained for another model, or its two files do not belong together."
        )
    return _LoRA(a.float(), b.float(), weight * alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _for_module(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the end of `module`, as PEFT reads `rank_pattern`."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _settings(file: Path) -> dict[str, Any]:
    """Reads adapter_config.json, and refuses an adapter that is more than `W + scale * B @ A`."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        found = "not found" if isinstance(error, (FileNotFoundError, NotADirectoryError)) else error.strerror
        raise CheckpointError(
            f"{file}: {found}; expected a folder that PEFT's `save_pretrained` wrote for a LoRA adapter."
        ) from error
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}).") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        found = settings.get("peft_type") if isinstance(settings, dict) else settings
        advice = " Give its folder as `prefix_encoder`." if found == "PREFIX_TUNING" else ""
        raise CheckpointError(
            f"{file}: peft_type is {found!r}; expected 'LORA', the only kind that can be merged.{advice}"
        )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not _is_rank(rank):
        raise CheckpointError(f"{file}: r is {rank!r}; expected the rank, a positive whole number.")
    if not _is_number(alpha):
        raise CheckpointError(f"{file}: lora_alpha is {alpha!r}; expected a finite number.")
    _check_patterns(file, "rank_pattern", settings.get("rank_pattern"), _is_rank)
    _check_patterns(file, "alpha_pattern", settings.get("alpha_pattern"), _is_number)
    used = [key for key in _UNSUPPORTED if settings.get(key)]
    if settings.get("bias", "none") != "none":
        used.append("bias")
    if settings.get("init_lora_weights") not in _INITIALISATIONS:
        used.append("init_lora_weights")
    if used:
        raise CheckpointError(
            f"{file}: {', '.join(f'{key}={settings[key]!r}' for key in used)} is not supported: such an adapter is "
            "not just a product of two matrices added to a linear. If PEFT can merge it (`merge_and_unload`), export "
            "the result."
        )
    if settings.get("fan_in_fan_out"):
        raise CheckpointError(
            f"{file}: fan_in_fan_out is true, but no ChatGLM stores transposed weights; the adapter was trained for "
            "another model. Set it to false if it was set by mistake."
        )
    return settings


def _check_patterns(file: Path, key: str, patterns: Any, is_valid: Callable[[Any], bool]) -> None:
    if not isinstance(patterns or {}, dict):
        raise CheckpointError(f"{file}: {key} is {patterns!r}; expected an object with a number for each pattern.")
    for pattern, value in (patterns or {}).items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(
                f"{file}: {key} has {pattern!r}, which is no regular expression: {error}."
            ) from error
        if not is_valid(value):
            expected = "a finite number" if is_valid is _is_number else "a positive whole number"
            raise CheckpointError(f"{file}: {key} has {value!r} for {pattern!r}; expected {expected}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return _is_number(value) and value == int(value) and value >= 1


def _shortened(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
