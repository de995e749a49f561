# SPDX-License-Identifier: Apache-2.0
"""Weight files, memory-mapped and read without running anything that is in them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError


# What holds the weights or the list of their shards; the first that is there counts.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
# What training tools put in front of the original names, and what they nest the tensors in.
_PREFIX = re.compile(r"(?:(?:base_model\.model|module|model|_forward_module|_orig_mod|_fsdp_wrapped_module)\.)+")
_WRAPPERS = re.compile(r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # of layers
_NESTS = ("state_dict", "model_state_dict", "module", "model")


def split_name(name: str) -> tuple[str, str]:
    """Splits the name of a tensor: what a training tool or a model class has put in front, and the rest."""
    prefix = match[0] if (match := _PREFIX.match(name)) else ""
    return prefix, _WRAPPERS.sub("", name[len(prefix) :])


def read_tensor(shard: Shard, name: str, check: bool = True) -> torch.Tensor:
    """Reads tensor `name` of a weight file, still on disk where the file is mapped, searched for NaN if `check`.

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


def weight_files(folder: Path) -> list[Path]:
    """Finds the files that hold the weights of `folder`: safetensors if there are any, else pickles.

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
    """Reads the names of the weight files that `index` lists; they lie beside it.

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
        while nest := next((name for name in _NESTS if isinstance(self._tensors.get(name), dict)), None):
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
    """Opens a weight file, safetensors or a pickle of tensors; it has `names()`, `describe(name)`, `tensor(name)`.

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
