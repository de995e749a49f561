# SPDX-License-Identifier: Apache-2.0
"""Settings of `generate` that no model of this package can follow: refused at export, and by `generate`."""

from __future__ import annotations

from transformers import GenerationConfig


# Settings of generation whose way does not lead through this model: the value that means nothing, and why.
_UNSUPPORTED = {
    "guidance_scale": (1, "it computes two sequences in turns, and this model holds the keys and values of one"),
    "penalty_alpha": (0, "contrastive search copies keys and values, which this model keeps inside"),
    "dola_layers": (None, "it compares layers, and this model gives what follows from the last one"),
    "assistant_early_exit": (None, "it leaves a model after some layers, and this one is compiled as a whole"),
    "prefill_chunk_size": (None, "this model computes a prompt in one call"),
    "output_attentions": (False, "attention is one operation, which keeps its weights to itself"),
    "output_hidden_states": (False, "what is between the layers does not leave the compiled model"),
}


def check_settings(settings: GenerationConfig) -> None:
    """Refuses settings of generation that no model of this package can follow.

    Raises:
        ValueError: `settings` ask for what this model cannot do.
    """
    for name, (neutral, reason) in _UNSUPPORTED.items():
        value = getattr(settings, name, None)
        if value not in (None, neutral):
            raise ValueError(f"`{name}` is {value!r}: {reason}. Leave it out.")
