# SPDX-License-Identifier: Apache-2.0
"""How an architecture declares its modules, and what follows: names, shapes, what is quantised and adapted."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from ..checkpoint.prefix import prefix_size
from ..checkpoint.weights import StoredTensor


@dataclass(frozen=True)
class Module:
    """One module of a checkpoint; `{i}` in its names is the layer.

    Args:
        name: the canonical name, which all architectures share.
        original: the name in the checkpoint.
        shape: of its weight, `[rows, columns]` or `[rows]`.
        bias: whether it has a bias `[rows]`, too.
    """

    name: str
    original: str
    shape: tuple[int, ...]
    bias: bool = False

    @property
    def is_in_layer(self) -> bool:
        """Whether every layer has it."""
        return "{i}" in self.name

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer inside a block, which quantisation and LoRA are about."""
        return self.is_in_layer and len(self.shape) == 2

    def tensors(self, i: int) -> dict[str, StoredTensor]:
        """Lists what a checkpoint holds of it in layer `i`, by canonical name."""
        name, original = (pattern.format(i=i) for pattern in (self.name, self.original))
        tensors = {f"{name}.weight": StoredTensor(f"{original}.weight", self.shape, self.is_linear)}
        return tensors | ({f"{name}.bias": StoredTensor(f"{original}.bias", self.shape[:1])} if self.bias else {})


def stored_tensors(modules: Iterable[Module], num_hidden_layers: int) -> dict[str, StoredTensor]:
    """Lists what a checkpoint holds of `modules`, by canonical name and in their order, layer by layer."""
    tensors: dict[str, StoredTensor] = {}
    for is_in_layer, group in itertools.groupby(modules, lambda module: module.is_in_layer):
        group = list(group)
        for i in range(num_hidden_layers if is_in_layer else 1):
            for module in group:
                tensors |= module.tensors(i)
    return tensors


def prefix_encoder(config: PretrainedConfig, original: str, embedded: int | None = None) -> tuple[Module, ...]:
    """Declares the modules of a P-Tuning v2 prefix encoder; none without `pre_seq_len`.

    Args:
        config: the configuration.
        original: name of the encoder in the checkpoint.
        embedded: numbers of a token before they are projected; as many as after it by default.
    """
    if not config.pre_seq_len:
        return ()
    hidden, size = config.hidden_size, prefix_size(config)
    embedded = embedded or size
    # a published revision of the original configuration class makes it a tuple, (False,), by accident
    is_projected = config.prefix_projection
    if isinstance(is_projected, (list, tuple)):
        is_projected = is_projected[0]
    table = Module("prefix_encoder.embedding", f"{original}.embedding", (config.pre_seq_len, size))
    if not is_projected:
        return (table,)
    return (
        replace(table, shape=(config.pre_seq_len, embedded)),
        Module("prefix_encoder.trans.0", f"{original}.trans.0", (hidden, embedded), bias=True),
        Module("prefix_encoder.trans.2", f"{original}.trans.2", (size, hidden), bias=True),
    )
