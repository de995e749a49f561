# SPDX-License-Identifier: Apache-2.0
"""Reads original checkpoints: tensors by canonical name, memory-mapped, never unpickling code."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import PretrainedConfig

from ..errors import CheckpointError
from .shards import Shard, open_shard, read_tensor, split_name, weight_files
from .weights import Scratch, StoredTensor, Weight


logger = logging.getLogger(__name__)

# Buffers that the original modules save and never read back.
_KNOWN_BUFFERS = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
_LISTED = 10  # problems of a checkpoint in one message
_SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Checkpoint(Mapping[str, Weight]):
    """The tensors of an original checkpoint folder by canonical name.

    Opening it reads the headers of all files and checks every name and shape; the data stay on disk until asked for.

    Args:
        folder: local folder with `model.safetensors` or `pytorch_model.bin`, sharded with an index or in one file.
        config: the folder's configuration.
        tensors: what the architecture needs, by canonical name.
        scratch: where reordered copies of tensors go.

    Raises:
        CheckpointError: no weights, a shard missing, truncated or outside the folder, or tensors that are missing,
            surplus, of another shape or of an unsupported dtype; up to ten of those are listed at once.
    """

    def __init__(
        self,
        folder: str | Path,
        config: PretrainedConfig,
        tensors: Mapping[str, StoredTensor],
        scratch: Scratch | None = None,
    ):
        self.scratch = scratch
        self.folder = Path(folder)
        self.config = config
        self.tensors = dict(tensors)
        self.quantization_bit = getattr(config, "quantization_bit", None) or 0
        self._readers = [open_shard(file) for file in weight_files(self.folder)]
        self._reader_of: dict[str, Shard] = {}
        self._stored_name: dict[str, str] = {}
        self._checked: set[str] = set()
        self._find_tensors()
        self._check()

    def _find_tensors(self) -> None:
        """Finds out which file has which tensor, and under which name, whatever stands in front of it."""
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
        own = {"", *(split_name(tensor.original)[0] for tensor in self.tensors.values())}
        nests = sorted({reader.nest for reader in self._readers} - {""})
        if found := [repr(prefix) for prefix in sorted(prefixes - own)] + [f"the dictionary {n!r}" for n in nests]:
            logger.warning(f"{self.folder}: the tensors are under {' and '.join(found)}, and are read as if not.")

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Weight:
        """Reads the tensor `name`; quantised linears come with their scale.

        Raises:
            CheckpointError: the tensor holds NaN or infinity, or its data cannot be read.
        """
        original = self.tensors[name].original
        data = self._read(original)
        if not self._is_quantized(name):
            return Weight(data, bits=8 * data.element_size(), scratch=self.scratch)
        return Weight(data, self._read(original + "_scale"), self.quantization_bit, self.scratch)

    def _read(self, original: str) -> torch.Tensor:
        _, name = split_name(original)
        reader = self._reader_of[name]
        is_new = original not in self._checked
        data = read_tensor(reader, self._stored_name[name], check=is_new)
        # the first row of an embedding may be zeros, and is looked at first because it costs nothing
        if is_new and not original.endswith(".bias") and not data[0].any() and not data.any():
            logger.warning(
                f"{reader.file}: tensor {original!r} is all zeros, as in a download that was given its size and not "
                "finished. Unless it was trained so, download the file again."
            )
        self._checked.add(original)  # q, k and v are rows of one tensor: it is checked once
        return data

    def _is_quantized(self, name: str) -> bool:
        return bool(self.quantization_bit) and self.tensors[name].is_linear

    def _check(self) -> None:
        wanted: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {}
        for name, tensor in self.tensors.items():
            wanted |= self._wanted(name, tensor)
        problems = [problem for original, form in wanted.items() if (problem := self._problem(original, *form))]
        used = {split_name(original)[1] for original in wanted}
        for name, reader in self._reader_of.items():
            if name not in used and not self._is_unused(name):
                shape, _ = reader.describe(self._stored_name[name])
                problems.append(f"surplus: {name} {list(shape)}")
        if problems:
            listed = problems[:_LISTED]
            if len(problems) > _LISTED:
                listed.append(f"and {len(problems) - _LISTED} more")
            raise CheckpointError(
                f"{self.folder}: the weights do not fit config.json ({len(problems)} problems). Check that both come "
                "from the same revision and that the download is complete.\n  " + "\n  ".join(listed)
            )

    def _wanted(self, name: str, tensor: StoredTensor) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        """Describes what the files must have for `tensor`: shape and possible types, by the name there."""
        if not self._is_quantized(name):
            return {tensor.original: (tensor.shape, _SUPPORTED_DTYPES)}
        rows, columns = tensor.shape
        integers = rows, columns // 2 if self.quantization_bit == 4 else columns
        return {
            tensor.original: (integers, (torch.int8,)),
            tensor.original + "_scale": ((rows,), _SUPPORTED_DTYPES),
        }

    def _problem(self, original: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> str | None:
        """Says what is wrong with the tensor that the files have as `original`."""
        _, name = split_name(original)
        if name not in self._reader_of:
            return f"missing: {original} {list(shape)}"
        found_shape, dtype = self._reader_of[name].describe(self._stored_name[name])
        if found_shape != shape:
            return f"wrong shape: {original} is {list(found_shape)}, expected {list(shape)}"
        if dtype not in dtypes:
            expected = "int8" if dtypes == (torch.int8,) else "float16, bfloat16 or float32"
            return f"unsupported dtype: {original} is {dtype}, expected {expected}"
        return None

    def _is_unused(self, name: str) -> bool:
        """Tells whether the files may have `name`, too: a tied head, a buffer, or a replaced prefix."""
        is_tied_head = self.config.tie_word_embeddings and name == "lm_head.weight"
        is_replaced = getattr(self.config, "pre_seq_len", None) and ".prefix_encoder." in name
        return bool(is_tied_head or name.endswith(_KNOWN_BUFFERS) or is_replaced)
