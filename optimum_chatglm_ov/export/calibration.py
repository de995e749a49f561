# SPDX-License-Identifier: Apache-2.0
"""What a model sees while NNCF looks at its activations."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from optimum.intel.openvino.configuration import OVWeightQuantizationConfig

from ..output import complete_folder
from . import texts


# Samples and their tokens, unless the settings say otherwise.
NUM_SAMPLES = 128
SEQUENCE_LENGTH = 128


def check_calibration(
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


def calibration_inputs(
    quantization_config: OVWeightQuantizationConfig,
    tokenizer: Any,
    dataset: str | Path | Iterable[Any],
    model: ov.Model | None = None,
) -> list[dict[str, np.ndarray]]:
    """Makes inputs of the stateful graph: up to `num_samples` blocks of `dataset`, each as a model generates it.

    A block has 128 tokens, or the `seq_len` of a data set given as "wikitext2:seq_len=64". The dataset "auto" is what
    `model` generates.

    Raises:
        ValueError: `dataset` holds no text.
    """
    name, length = texts.name_and_length(dataset)
    # optimum-intel splits the option from a name in the settings
    options = getattr(quantization_config, "_dataset_kwargs", None) or {}
    length = length or options.get("seq_len") or SEQUENCE_LENGTH
    samples = quantization_config.num_samples or NUM_SAMPLES
    if name == texts.OWN_TEXTS:
        blocks = _generate(model, tokenizer, samples, length)
    else:
        blocks = islice(texts.blocks(texts.read_texts(dataset), tokenizer, length), samples)
    return [_inputs([texts.generated(block, tokenizer)[0]]) for block in blocks]


def _generate(model: ov.Model, tokenizer: Any, samples: int, length: int) -> list[list[int]]:
    """Generates blocks of `length` ids with `model`: any first token, then samples of its distributions."""
    generator = torch.Generator().manual_seed(0)
    prompt = texts.generated([], tokenizer)[0]
    special = {*prompt, *tokenizer.all_special_ids, tokenizer.eos_token_id}
    unwanted = [token for token in special if token is not None and token < len(tokenizer)]
    request = ov.Core().compile_model(model, "CPU").create_infer_request()
    ids, past = torch.tensor(prompt).expand(samples, -1), 0
    while ids.shape[1] < len(prompt) + length:
        logits = torch.from_numpy(request.infer(_inputs(ids.tolist(), past))["logits"][:, -1, : len(tokenizer)].copy())
        if past == 0:
            logits.zero_()
        logits[:, unwanted] = -torch.inf
        past = ids.shape[1]
        ids = torch.cat((ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)), dim=1)
    return ids[:, len(prompt) :].tolist()


def _inputs(rows: list[list[int]], past: int = 0) -> dict[str, np.ndarray]:
    """Makes the graph's inputs for sequences of equal length, whose first `past` tokens are in its cache."""
    ids = np.array(rows, dtype=np.int64)
    positions = np.broadcast_to(np.arange(past, ids.shape[1], dtype=np.int64), (len(ids), ids.shape[1] - past))
    return {
        "input_ids": np.ascontiguousarray(ids[:, past:]),
        "attention_mask": np.ones_like(ids),
        "position_ids": np.ascontiguousarray(positions),
        "beam_idx": np.arange(len(ids), dtype=np.int32),
    }
