# SPDX-License-Identifier: Apache-2.0
"""P-Tuning v2 (Liu et al. 2021): trained keys and values in front of every sequence's cache."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig

from ..errors import CheckpointError
from .adapters import ADAPTER_FILES
from .shards import open_shard, read_tensor, weight_files
from .weights import Weight


_INSIDE = "prefix_encoder."
_EMBEDDING = "embedding.weight"
_OF_PEFT = re.compile(r"(?:.*\.)?prompt_encoder\.(?:default\.)?(?P<name>.+)")
# Linear, tanh, Linear
_PROJECTION = ("trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")


def prefix_size(config: PretrainedConfig) -> int:
    """Counts the numbers of one token of a prefix: keys and values of all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def load_prefix(
    weights: Mapping[str, Weight],
    prefix_encoder: str | Path | None,
    config: PretrainedConfig,
    key_channels: np.ndarray,
) -> np.ndarray:
    """Loads the prefix of every layer, in the form of the graph's key/value cache.

    Args:
        weights: the checkpoint, read when `prefix_encoder` is `None`.
        prefix_encoder: a weight file, or a folder with one, that has the `prefix_encoder.*` tensors, or PEFT's of
            `PREFIX_TUNING`; its other tensors are not read. Length and projection of the prefix are those of its
            tensors.
        config: configuration of the checkpoint.
        key_channels: channel of a trained head that each channel of the graph's keys is, int64 `[head_dim]`.

    Returns:
        f32 `[num_hidden_layers, 2, num_key_value_heads, P, head_dim]`, keys before values; the channels of the keys
        are in the order of the graph's.

    Raises:
        CheckpointError: tensors are missing, not numbers, or of a prefix for another model.
    """
    if prefix_encoder is None:
        source = "the checkpoint"
        tensors = {name.removeprefix(_INSIDE): weights[name].data for name in weights if name.startswith(_INSIDE)}
    else:
        source = str(prefix_encoder)
        tensors = _read(Path(prefix_encoder))
    encoded = _encode(tensors, source)
    layers, groups, head_dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    size = prefix_size(config)
    if encoded.shape[1] != size:
        raise CheckpointError(
            f"{source}: the prefix has {encoded.shape[1]} numbers a token, expected {size} (2 x {layers} "
            f"layers x {groups} key/value heads x {head_dim}). It was trained for another model."
        )
    if not torch.isfinite(encoded).all():
        raise CheckpointError(
            f"{source}: the prefix that its tensors give has values beyond the range of float32; they are damaged or "
            "from a diverged training."
        )
    prefix = encoded.view(-1, layers, 2, groups, head_dim).permute(1, 2, 3, 0, 4).contiguous().numpy()
    prefix[:, 0] = prefix[:, 0][..., key_channels]
    return prefix


def _encode(tensors: Mapping[str, torch.Tensor], source: str) -> torch.Tensor:
    """Encodes token `i` of the prefix as row `i`: f32 `[P, 2 * layers * groups * head_dim]`."""
    if _EMBEDDING not in tensors:
        raise CheckpointError(
            f"{source}: no tensor 'prefix_encoder.{_EMBEDDING}' found; expected the weights of a P-Tuning v2 training "
            "or of PEFT's PREFIX_TUNING."
        )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{source}: prefix_encoder.{name} is {tensor.dtype}; expected float32, float16 or bfloat16."
            )
    embedding = tensors[_EMBEDDING].float()
    if embedding.ndim != 2 or not len(embedding):
        raise CheckpointError(
            f"{source}: prefix_encoder.{_EMBEDDING} is {list(embedding.shape)}; expected two dimensions, the tokens "
            "of the prefix (at least one) and the numbers of each."
        )
    if not any(name in tensors for name in _PROJECTION):
        return embedding
    missing = [f"prefix_encoder.{name}" for name in _PROJECTION if name not in tensors]
    if missing:
        raise CheckpointError(f"{source}: a projected prefix lacks {', '.join(missing)}.")
    first, first_bias, second, second_bias = (tensors[name].float() for name in _PROJECTION)
    expected = (*first_bias.shape, embedding.shape[1]), (*second_bias.shape, *first_bias.shape)
    if first_bias.ndim != 1 or (first.shape, second.shape) != expected:
        shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in (_EMBEDDING, *_PROJECTION))
        raise CheckpointError(f"{source}: the shapes of the prefix encoder do not fit together: {shapes}.")
    return torch.tanh(embedding @ first.T + first_bias) @ second.T + second_bias


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.exists():
        raise CheckpointError(f"{path}: not found; `prefix_encoder` is a weight file or a folder with one.")
    tensors = {}
    for file in _files(path):
        shard = open_shard(file)
        for name in shard.names():
            # training scripts save them as `transformer.prefix_encoder.*`, `prefix_encoder.*` or without a parent
            short = name.rpartition("prefix_encoder.")[2]
            if name == "prompt_embeddings":  # PEFT's, with the projection computed
                short = _EMBEDDING
            elif match := _OF_PEFT.fullmatch(name):  # the same module, as a whole training state has it
                short = match["name"].replace("transform.", "trans.")
            if short in (_EMBEDDING, *_PROJECTION):
                tensors[short] = read_tensor(shard, name)
    return tensors


def _files(path: Path) -> list[Path]:
    """Finds the weight files at `path`.

    Raises:
        CheckpointError: there are none, or they are of another adapter than a prefix.
    """
    if not path.is_dir():
        return [path]
    adapter_config = path / "adapter_config.json"
    if not adapter_config.is_file():
        return weight_files(path)
    try:
        peft_type = json.loads(adapter_config.read_text(encoding="utf-8"))["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{adapter_config}: not the JSON of a PEFT adapter ({error}).") from error
    if peft_type != "PREFIX_TUNING":
        advice = " Give its folder in `adapters`." if peft_type == "LORA" else ""
        raise CheckpointError(f"{adapter_config}: peft_type is {peft_type!r}; expected 'PREFIX_TUNING'.{advice}")
    file = next((path / name for name in ADAPTER_FILES if (path / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{path}: no adapter weights found; expected {' or '.join(ADAPTER_FILES)}.")
    return [file]
