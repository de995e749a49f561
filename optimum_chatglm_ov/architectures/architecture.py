# SPDX-License-Identifier: Apache-2.0
"""What an architecture has to define, and what is the same in all that do not say otherwise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import openvino as ov
import torch
from transformers import PretrainedConfig

from ..checkpoint.weights import StoredTensor, Weight
from .modules import Module, stored_tensors


class Architecture(ABC):
    """One architecture with the sizes and switches of a configuration.

    Nothing else knows of it: what a checkpoint holds, what the graph computes and what a prompt looks like is asked
    here.
    """

    has_gated_mlp = True
    """Whether the MLP multiplies two projections: NNCF's AWQ scales the inputs of a linear behind such a product."""

    has_two_positions = False
    """Whether the original's position ids are two rows a sequence, `[B, 2, L]` (see `prompt_layout`)."""

    def __init__(self, config: PretrainedConfig):
        self.config = config

    def paged_attention_error(self) -> str | None:
        """Says why PagedAttention, and continuous batching with it, does not take the model; `None`: it does."""
        if self.has_two_positions:
            return "PagedAttention has no prompts that see themselves from both sides, as ChatGLM-6B's do"
        if getattr(self.config, "pre_seq_len", None):
            return "PagedAttention has no prefix of P-Tuning"
        return None

    def settle_config(self) -> None:  # noqa: B027  most have nothing to settle
        """Writes into the configuration what follows from its keys.

        Raises:
            ValueError: a key asks for mathematics that this architecture has not.
        """

    # The model -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def modules(self) -> Sequence[Module]:
        """Declares the modules whose weights the graph is made of, in the order of their use."""

    def prefix_modules(self) -> Sequence[Module]:
        """Declares the modules of the prefix encoder inside the checkpoint (P-Tuning v2); none without one."""
        return ()

    @abstractmethod
    def key_channels(self) -> np.ndarray:
        """Maps each channel of the graph's queries and keys to that of the checkpoint's heads, int64 `[D]`."""

    @abstractmethod
    def build(self, weights: Mapping[str, Weight], prefix: np.ndarray | None = None) -> ov.Model:
        """Builds the stateful OpenVINO model.

        Inputs: i64 `input_ids` `[B, L]`, `attention_mask` `[B, past + L]`, `position_ids` `[B, L]`, i32 `beam_idx`
        `[B]`. Output: f32 `logits` `[B, L, vocab_size]`.

        Args:
            weights: tensors by canonical name (see `tensors`); the graph's constants share their memory.
            prefix: keys and values of a P-Tuning v2 prefix, f32 `[layers, 2, num_key_value_heads, P, head_dim]`.
        """

    # What follows from its modules ---------------------------------------------------------------------------------

    def tensors(self) -> dict[str, StoredTensor]:
        """Lists the tensors that the graph is made of, by canonical name."""
        return stored_tensors(self.modules(), self.config.num_hidden_layers)

    def prefix_tensors(self) -> dict[str, StoredTensor]:
        """Lists the tensors of the prefix encoder, by canonical name."""
        return stored_tensors(self.prefix_modules(), self.config.num_hidden_layers)

    # Prompts -------------------------------------------------------------------------------------------------------

    def prompt_error(self, input_ids: torch.LongTensor) -> str | None:
        """Says why int64 `[B, L]` is no prompt; `None`: it is one."""
        return None

    def example_prompt(self, length: int, seed: int = 0) -> torch.LongTensor:
        """Returns a prompt of ordinary tokens, int64 `[1, length]`."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(5, self.config.vocab_size // 2, (1, length), generator=generator)

    def context_of(self, input_ids: np.ndarray) -> np.ndarray | None:
        """Length of the context of a prompt int64 `[L]`, whose tokens see each other in both directions, and what
        else the graph's state keeps of it, i32 `[2]`; `None` where tokens see those before them alone."""
        return None

    def prompt_layout(self, position_ids: torch.LongTensor, attention_mask: torch.LongTensor) -> np.ndarray:
        """Reads what the two rows of original positions say of a prompt, in the form of the graph's state.

        Args:
            position_ids: int64 `[B, 2, L]`.
            attention_mask: int64 `[B, L]`.
        """
        raise NotImplementedError(f"{type(self).__name__} has one row of positions.")
