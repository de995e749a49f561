# SPDX-License-Identifier: Apache-2.0
"""Reads original ChatGLM checkpoints: tensors by canonical name, memory-mapped, never unpickling code."""

from __future__ import annotations

import json
import logging
import math
import mmap
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..configuration import ChatGLMConfig
from ..errors import CheckpointError


logger = logging.getLogger(__name__)

# Canonical module -> module in the original checkpoint; `{i}` is the layer.
ORIGINAL_MODULES: Mapping[str, Mapping[str, str]] = {
    "chatglm": {
        "embed_tokens": "transformer.word_embeddings",
        "layers.{i}.input_layernorm": "transformer.layers.{i}.input_layernorm",
        "layers.{i}.self_attn.qkv_proj": "transformer.layers.{i}.attention.query_key_value",
        "layers.{i}.self_attn.o_proj": "transformer.layers.{i}.attention.dense",
        "layers.{i}.post_attention_layernorm": "transformer.layers.{i}.post_attention_layernorm",
        "layers.{i}.mlp.up_proj": "transformer.layers.{i}.mlp.dense_h_to_4h",
        "layers.{i}.mlp.down_proj": "transformer.layers.{i}.mlp.dense_4h_to_h",
        "norm": "transformer.final_layernorm",
        "lm_head": "lm_head",
        "prefix_encoder.embedding": "transformer.prefix_encoder.embedding",
        "prefix_encoder.trans.0": "transformer.prefix_encoder.trans.0",
        "prefix_encoder.trans.2": "transformer.prefix_encoder.trans.2",
    },
    "chatglm2": {
        "embed_tokens": "transformer.embedding.word_embeddings",
        "layers.{i}.input_layernorm": "transformer.encoder.layers.{i}.input_layernorm",
        "layers.{i}.self_attn.qkv_proj": "transformer.encoder.layers.{i}.self_attention.query_key_value",
        "layers.{i}.self_attn.o_proj": "transformer.encoder.layers.{i}.self_attention.dense",
        "layers.{i}.post_attention_layernorm": "transformer.encoder.layers.{i}.post_attention_layernorm",
        "layers.{i}.mlp.gate_up_proj": "transformer.encoder.layers.{i}.mlp.dense_h_to_4h",
        "layers.{i}.mlp.down_proj": "transformer.encoder.layers.{i}.mlp.dense_4h_to_h",
        "norm": "transformer.encoder.final_layernorm",
        "lm_head": "transformer.output_layer",
        "prefix_encoder.embedding": "transformer.prefix_encoder.embedding",
        "prefix_encoder.trans.0": "transformer.prefix_encoder.trans.0",
        "prefix_encoder.trans.2": "transformer.prefix_encoder.trans.2",
    },
}
# Buffers that the original modules save and never read back.
_KNOWN_BUFFERS = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
_QUANTIZED_MODULES = ("qkv_proj", "o_proj", "up_proj", "gate_up_proj", "down_proj")
# Rows converted at a time: copies stay below 100 MB.
_ROWS = 1024
# What training tools put in front of the original names, and what they nest the tensors in.
_PREFIX = re.compile(r"(?:(?:base_model\.model|module|model|_orig_mod)\.)+")
_NESTS = ("state_dict", "module", "model")
_LISTED = 10  # problems of a checkpoint in one message
_SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# What holds the weights or the list of their shards; the first that is there counts.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class Weight:
    """A matrix or vector of the checkpoint, possibly quantised per row.

    Attributes:
        data: fp16, bf16 or fp32 `[rows, columns]` or `[rows]`; int8 `[rows, columns]` when `bits` is 8; when `bits` is
            4, int8 `[rows, columns / 2]` with the even column in the high nibble, both sign-extended.
        scale: fp16 `[rows]`; the weight is `integer * scale`. `None` for floating-point data.
        bits: 4 or 8 for quantised data, else 16 or 32.
        scratch: where copies of rows go; ordinary memory when `None`.
    """

    data: torch.Tensor
    scale: torch.Tensor | None = None
    bits: int = 16
    scratch: Scratch | None = None

    def rows(self, index: slice | np.ndarray) -> Weight:
        """The rows `index`, in that order: a view for a slice, a copy otherwise."""
        if isinstance(index, slice):
            return replace(self, data=self.data[index], scale=None if self.scale is None else self.scale[index])
        index = torch.from_numpy(index)
        out = self.scratch.empty((len(index), *self.data.shape[1:]), self.data.dtype) if self.scratch else None
        data = torch.index_select(self.data, 0, index, out=out)
        return replace(self, data=data, scale=None if self.scale is None else self.scale[index])

    def to(self, dtype: torch.dtype) -> Weight:
        """The weight as floating-point numbers of `dtype`, rounded once; itself, if it has that already."""
        if self.scale is None and self.data.dtype == dtype:
            return self
        shape = list(self.data.shape)
        if self.bits == 4:
            shape[1] *= 2
        out = self.scratch.empty(tuple(shape), dtype) if self.scratch else torch.empty(shape, dtype=dtype)
        for start in range(0, shape[0], _ROWS):
            rows = slice(start, start + _ROWS)
            out[rows] = self.rows(rows)._numbers()
        return replace(self, data=out, scale=None, bits=8 * dtype.itemsize)

    def _numbers(self) -> torch.Tensor:
        if self.scale is None:
            return self.data
        integers = self.data
        if self.bits == 4:
            integers = torch.stack((self.data >> 4, (self.data << 4) >> 4), dim=-1).flatten(-2)
        return integers * self.scale.float()[:, None]


class Scratch:
    """Memory of a temporary file that has no name: copies kept here need no anonymous memory and no cleaning up.

    Args:
        folder: an existing folder on the file system to use.
    """

    def __init__(self, folder: str | Path):
        self._file = tempfile.TemporaryFile(dir=folder)
        self._size = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of `shape` and `dtype` with undefined content, mapped from the file."""
        size = math.prod(shape) * dtype.itemsize
        start = -(-self._size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._size = start + size
        os.posix_fallocate(self._file.fileno(), start, size)  # a full disk must fail here, not as a bus error
        array = np.memmap(self._file, dtype=np.uint8, mode="r+", offset=start, shape=(size,))
        return torch.from_numpy(array).view(dtype).view(shape)


class Derived(Mapping[str, Weight]):
    """Weights made of other weights, under the same names, when they are asked for.

    Args:
        weights: tensors by canonical name.
        derive: of a name and the weight in `weights`, the weight here.
    """

    def __init__(self, weights: Mapping[str, Weight], derive: Callable[[str, Weight], Weight]):
        self._weights = weights
        self._derive = derive
        self._matrix: tuple[str, Weight] | None = None

    def __getitem__(self, name: str) -> Weight:
        if self._matrix is not None and self._matrix[0] == name:  # query, key and value are rows of one matrix
            return self._matrix[1]
        weight = self._derive(name, self._weights[name])
        if weight.data.ndim == 2:
            self._matrix = name, weight
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __contains__(self, name: object) -> bool:
        return name in self._weights


class Checkpoint(Mapping[str, Weight]):
    """The tensors of an original checkpoint folder by canonical name.

    Opening it reads the headers of all files and checks every name and shape; the data stay on disk until asked for.

    Args:
        folder: local folder with `model.safetensors` or `pytorch_model.bin`, sharded with an index or in one file.
        config: the folder's configuration.
        shapes: shape of every tensor that the architecture needs, by canonical name (see `graph.tensor_shapes`).
        scratch: where reordered copies of tensors go.

    Raises:
        CheckpointError: no weights, a shard missing, truncated or outside the folder, or tensors that are missing,
            surplus, of another shape or of an unsupported dtype; up to ten of those are listed at once.
    """

    def __init__(
        self,
        folder: str | Path,
        config: ChatGLMConfig,
        shapes: Mapping[str, tuple[int, ...]],
        scratch: Scratch | None = None,
    ):
        self.scratch = scratch
        self.folder = Path(folder)
        self.config = config
        self.shapes = dict(shapes)
        self._readers = [open_shard(file) for file in weight_files(self.folder)]
        self._reader_of: dict[str, Shard] = {}
        self._stored_name: dict[str, str] = {}
        prefixes = set()
        for reader in self._readers:
            for stored in reader.names():
                prefix, name = split_name(stored)
                if name in self._reader_of:
                    raise CheckpointError(
                        f"{self.folder}: {stored!r} and {self._stored_name[name]!r} are both {name!r}. Keep the file "
                        "that one of the trainings saved."
                    )
                prefixes.add(prefix)
                self._reader_of[name], self._stored_name[name] = reader, stored
        nests = sorted({reader.nest for reader in self._readers} - {""})
        if found := [repr(prefix) for prefix in sorted(prefixes - {""})] + [f"the dictionary {n!r}" for n in nests]:
            logger.warning(f"{self.folder}: the tensors are under {' and '.join(found)}, and are read as if not.")
        self._original_name = original_names(config, self.shapes)
        self._checked: set[str] = set()
        self._check()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> Weight:
        """The tensor `name`; quantised linears come with their scale.

        Raises:
            CheckpointError: the tensor holds NaN or infinity, or its data cannot be read.
        """
        original = self._original_name[name]
        data = self._read(original)
        if not self._is_quantized(name):
            return Weight(data, bits=8 * data.element_size(), scratch=self.scratch)
        return Weight(data, self._read(original + "_scale"), self.config.quantization_bit, self.scratch)

    def _read(self, original: str) -> torch.Tensor:
        reader = self._reader_of[original]
        is_new = original not in self._checked
        data = read_tensor(reader, self._stored_name[original], check=is_new)
        # the first row of an embedding may be zeros, and is looked at first because it costs nothing
        if is_new and not original.endswith(".bias") and not data[0].any() and not data.any():
            logger.warning(
                f"{reader.file}: tensor {original!r} is all zeros, as in a download that was given its size and not "
                "finished. Unless it was trained so, download the file again."
            )
        self._checked.add(original)  # q, k and v are rows of one tensor: it is checked once
        return data

    def _is_quantized(self, name: str) -> bool:
        module, _, kind = name.rpartition(".")
        return bool(self.config.quantization_bit) and kind == "weight" and module.endswith(_QUANTIZED_MODULES)

    def _check(self) -> None:
        problems = []
        expected = set()
        for name, shape in self.shapes.items():
            original = self._original_name[name]
            wanted = {original: tuple(shape)}
            if self._is_quantized(name):
                rows, columns = shape
                wanted = {
                    original: (rows, columns // 2 if self.config.quantization_bit == 4 else columns),
                    original + "_scale": (rows,),
                }
            for tensor, wanted_shape in wanted.items():
                expected.add(tensor)
                if tensor not in self._reader_of:
                    problems.append(f"missing: {tensor} {list(wanted_shape)}")
                    continue
                found_shape, dtype = self._reader_of[tensor].describe(self._stored_name[tensor])
                quantized = tensor == original and len(wanted) == 2
                if found_shape != wanted_shape:
                    problems.append(f"wrong shape: {tensor} is {list(found_shape)}, expected {list(wanted_shape)}")
                elif dtype not in ((torch.int8,) if quantized else _SUPPORTED_DTYPES):
                    problems.append(
                        f"unsupported dtype: {tensor} is {dtype}, expected "
                        + ("int8" if quantized else "float16, bfloat16 or float32")
                    )
        tied_head = "lm_head.weight" if self.config.tie_word_embeddings else None
        for tensor in self._reader_of:
            replaced_prefix = self.config.pre_seq_len and ".prefix_encoder." in tensor
            unused = tensor == tied_head or tensor.endswith(_KNOWN_BUFFERS) or replaced_prefix
            if tensor not in expected and not unused:
                shape, _ = self._reader_of[tensor].describe(self._stored_name[tensor])
                problems.append(f"surplus: {tensor} {list(shape)}")
        if problems:
            listed = problems[:_LISTED]
            if len(problems) > _LISTED:
                listed.append(f"and {len(problems) - _LISTED} more")
            raise CheckpointError(
                f"{self.folder}: the weights do not fit config.json ({len(problems)} problems). Check that both come "
                "from the same revision and that the download is complete.\n  " + "\n  ".join(listed)
            )


def split_name(stored: str) -> tuple[str, str]:
    """What a training tool put in front of the name of a tensor, and the name in the original checkpoint."""
    prefix = match[0] if (match := _PREFIX.match(stored)) else ""
    return prefix, stored[len(prefix) :]


def read_tensor(shard: Shard, name: str, check: bool = True) -> torch.Tensor:
    """Tensor `name` of a weight file, still on disk where the file is mapped, searched for NaN if `check`.

    Raises:
        CheckpointError: the tensor holds NaN or infinity, or its data cannot be read.
    """
    try:
        data = shard.tensor(name)
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(f"{shard.file}: cannot read tensor {name!r}: {error}") from error
    if check and data.is_floating_point() and data.numel():
        # min and max propagate NaN, and cost one pass over the mapped file
        low, high = torch.aminmax(data)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise CheckpointError(
                f"{shard.file}: tensor {name!r} holds NaN or infinity; the checkpoint is damaged or was saved from a "
                "diverged training run. Download it again or use another revision."
            )
    return data


def original_names(config: ChatGLMConfig, shapes: Mapping[str, object]) -> dict[str, str]:
    """Name in the original checkpoint of every canonical name in `shapes`."""
    table = ORIGINAL_MODULES[config.architecture]
    modules = {
        canonical.format(i=i): original.format(i=i)
        for canonical, original in table.items()
        for i in (range(config.num_hidden_layers) if "{i}" in canonical else (0,))
    }
    return {name: f"{modules[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}" for name in shapes}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of `folder`: safetensors if there are any, else pickles.

    Raises:
        CheckpointError: there are none, shards are missing, or the index names files outside the folder.
    """
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder}: no weights found; expected one of {', '.join(WEIGHT_FILES)}.")
    if not file.name.endswith(".index.json"):
        return [file]
    names = shard_names(file)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} shards named in {file.name} are missing: "
            f"{', '.join(missing)}. Download them again."
        )
    return [folder / name for name in names]


def shard_names(index: Path) -> list[str]:
    """The names of the weight files that lie beside `index`, which lists them.

    Raises:
        CheckpointError: the index is damaged, or names other files.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f'{index}: not a weight index (expected JSON with a "weight_map"): {error}') from error
    for name in names:
        if not isinstance(name, str) or set(name) & set("/\\:\0") or Path(name).suffix not in (".safetensors", ".bin"):
            raise CheckpointError(
                f"{index}: shard name {name!r} is not the plain name of a .safetensors or .bin file. A shard must lie "
                "beside its index; this index is damaged or hostile."
            )
    return names


class _SafetensorsShard:
    nest = ""

    def __init__(self, file: Path):
        self.file = file
        self._handle = safe_open(file, framework="pt")

    def names(self) -> list[str]:
        return list(self._handle.keys())

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        tensor = self._handle.get_tensor(name)  # a view of the mapped file: nothing is read
        return tuple(tensor.shape), tensor.dtype

    def tensor(self, name: str) -> torch.Tensor:
        return self._handle.get_tensor(name)


class _PickleShard:
    def __init__(self, file: Path):
        self.file = file
        try:
            self._tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            # files of torch < 1.6 are not zip archives and cannot be mapped
            self._tensors = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(self._tensors, dict):
            raise ValueError(f"expected a dictionary of tensors, found {type(self._tensors).__name__}")
        nests = []
        while not self.names() and (nest := next((n for n in _NESTS if isinstance(self._tensors.get(n), dict)), None)):
            nests.append(nest)
            self._tensors = self._tensors[nest]
        self.nest = ".".join(nests)
        """The dictionary, or dictionaries inside another, that the tensors were found in."""

    def names(self) -> list[str]:
        return [name for name, tensor in self._tensors.items() if isinstance(tensor, torch.Tensor)]

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        tensor = self._tensors[name]
        return tuple(tensor.shape), tensor.dtype

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()


Shard = _SafetensorsShard | _PickleShard


def open_shard(file: Path) -> Shard:
    """A weight file (safetensors, or a pickle of tensors alone) with `names()`, `describe(name)`, `tensor(name)`.

    Raises:
        CheckpointError: the file is truncated, damaged or holds more than tensors.
    """
    try:
        file.open("rb").close()  # safetensors tells no reason
        return _SafetensorsShard(file) if file.suffix == ".safetensors" else _PickleShard(file)
    except PermissionError as error:
        raise CheckpointError(f"{file}: no permission to read it.") from error
    except Exception as error:  # torch.load and safetensors raise many types for a damaged or hostile file
        raise CheckpointError(
            f"{file}: not a readable weight file ({file.stat().st_size} bytes): {_reason(error)}. It is "
            "truncated, damaged or holds more than tensors; download it again."
        ) from error


def _reason(error: Exception) -> str:
    # torch's own first lines advise against `weights_only`
    refused = re.search(r"Trying to load .*|(?<=WeightsUnpickler error: ).*", str(error))
    return refused[0] if refused else (str(error).splitlines() or [type(error).__name__])[0]
