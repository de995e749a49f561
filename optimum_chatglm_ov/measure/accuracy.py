# SPDX-License-Identifier: Apache-2.0
"""How far a candidate model (quantised, fused, another precision) is from a reference, measured on a text."""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint.weights import Scratch
from ..export import texts
from ..modeling import OVChatGLMForCausalLM
from ..tokenization import load_tokenizer


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured.

    Attributes:
        tokens: tokens of the text whose distributions were compared.
        reference_perplexity: `exp` of the mean negative log-likelihood of the text under the reference.
        candidate_perplexity: the same under the candidate.
        kl_divergence: mean of `KL(reference || candidate)`, in nats a token.
        top1_agreement: share of tokens for which both find the same id the most likely.
        greedy_prefixes: of each prompt, how many greedily generated ids are equal before the first difference.
        greedy_tokens: of each prompt, how many ids the reference generated: the most that can be equal.
    """

    tokens: int
    reference_perplexity: float
    candidate_perplexity: float
    kl_divergence: float
    top1_agreement: float
    greedy_prefixes: tuple[int, ...]
    greedy_tokens: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """The measurements as JSON knows them."""
        return asdict(self)

    def table(self) -> str:
        """The measurements as a markdown table."""
        change = 100 * (self.candidate_perplexity / self.reference_perplexity - 1)
        rows = {
            "tokens": f"{self.tokens}",
            "perplexity, reference": f"{self.reference_perplexity:.4f}",
            "perplexity, candidate": f"{self.candidate_perplexity:.4f} ({change:+.2f} %)",
            "mean KL divergence (nats)": f"{self.kl_divergence:.6f}",
            "top-1 agreement": f"{100 * self.top1_agreement:.2f} %",
            "common greedy prefix, sum": f"{sum(self.greedy_prefixes)} of {sum(self.greedy_tokens)} tokens",
            "common greedy prefix, longest": f"{max(self.greedy_prefixes, default=0)}",
        }
        width = max(map(len, rows))
        values = max(map(len, rows.values()))
        lines = [f"| {'measure':<{width}} | {'value':<{values}} |", f"|{'-' * (width + 2)}|{'-' * (values + 2)}|"]
        return "\n".join(lines + [f"| {name:<{width}} | {value:<{values}} |" for name, value in rows.items()])


def compare(
    reference: str | Path,
    candidate: str | Path,
    text: str | Path | Iterable[Any],
    *,
    reference_config: Mapping[str, str] | None = None,
    candidate_config: Mapping[str, str] | None = None,
    reference_attention: str | None = None,
    candidate_attention: str | None = None,
    reference_linear: str | None = None,
    candidate_linear: str | None = None,
    max_tokens: int = 4096,
    block_length: int = 512,
    prompts: int = 8,
    prompt_length: int = 32,
    new_tokens: int = 64,
) -> Comparison:
    """Measures the distance of two models on a text.

    The models are loaded one after the other, original checkpoints in their stored precision; the reference's
    log-probabilities wait in a temporary file of `max_tokens * vocab_size * 4` bytes.

    Args:
        reference: IR folder, local checkpoint or Hub id.
        candidate: another one with the same vocabulary, or the same under other properties or attention.
        text: text file, strings or rows with a "text" column (see `texts.read_texts`).
        reference_config, candidate_config: OpenVINO properties, for example `{"KV_CACHE_PRECISION": "u8"}`.
        reference_attention, candidate_attention, reference_linear, candidate_linear: as `attention` and `linear` of
            `from_pretrained`.
        max_tokens: tokens of the text to measure.
        block_length: tokens that are read in one call; the context of each token is its own block, and the first of
            each has none and is not measured.
        prompts: blocks whose beginnings are continued greedily.
        prompt_length: tokens of those beginnings.
        new_tokens: tokens to generate from each.

    Raises:
        ValueError: the text has less than two tokens, a number is too small, a block exceeds the context, or the
            vocabularies differ.
        OSError: the temporary file has no room.
    """
    for name, number, least in (
        ("max_tokens", max_tokens, 1),
        ("block_length", block_length, 2),
        ("prompts", prompts, 0),
        ("prompt_length", prompt_length, 1),
        ("new_tokens", new_tokens, 1),
    ):
        if number < least:
            raise ValueError(f"`{name}` is {number}; expected at least {least}.")
    model = _load(reference, reference_config, reference_attention, reference_linear)
    tokenizer = load_tokenizer(model.model_save_dir)
    context = model.config.max_position_embeddings - len(texts.generated([], tokenizer)[0])
    if block_length > context:
        raise ValueError(f"`block_length` is {block_length}; the context of {reference} holds at most {context}.")
    blocks = list(_measured(texts.blocks(texts.read_texts(text), tokenizer, block_length), max_tokens))
    if not blocks:
        raise ValueError("The text has less than two tokens; give a longer one.")
    ids = [texts.generated(block, tokenizer) for block in blocks]
    beginnings = [texts.generated(block[:prompt_length], tokenizer)[0] for block in blocks[:prompts]]

    counts = [len(block) - 1 for block in blocks]
    shape = (sum(counts), model.config.vocab_size)
    kept = _reserved(shape)
    targets = torch.cat([torch.tensor(block[1:]) for block in blocks])
    position = 0
    for log_probabilities in _log_probabilities(model, ids):
        kept[position : position + len(log_probabilities)] = log_probabilities
        position += len(log_probabilities)
    expected = [_continue(model, prompt, new_tokens) for prompt in beginnings]
    del model
    gc.collect()

    model = _load(candidate, candidate_config, candidate_attention, candidate_linear)
    if model.config.vocab_size != shape[1]:
        raise ValueError(
            f"The vocabularies differ: {shape[1]} ids in {reference}, {model.config.vocab_size} in {candidate}. "
            "Compare models of one checkpoint."
        )
    sums, position = np.zeros(4), 0
    for candidates in _log_probabilities(model, ids):
        rows = slice(position, position + len(candidates))
        sums += _sums(kept[rows], candidates, targets[rows])
        position = rows.stop
    found = [_continue(model, prompt, new_tokens) for prompt in beginnings]
    reference_loss, candidate_loss, divergence, agreement = sums / shape[0]
    return Comparison(
        tokens=shape[0],
        reference_perplexity=math.exp(reference_loss),
        candidate_perplexity=math.exp(candidate_loss),
        kl_divergence=float(divergence),
        top1_agreement=float(agreement),
        greedy_prefixes=tuple(_common(a, b) for a, b in zip(expected, found)),
        greedy_tokens=tuple(len(continuation) for continuation in expected),
    )


def _load(
    folder: str | Path, ov_config: Mapping[str, str] | None, attention: str | None, linear: str | None
) -> OVChatGLMForCausalLM:
    return OVChatGLMForCausalLM.from_pretrained(
        folder, load_in_8bit=False, ov_config=dict(ov_config or {}), attention=attention, linear=linear
    )


def _measured(blocks: Iterable[list[int]], tokens: int) -> Iterator[list[int]]:
    """`blocks`, the last one cut, with `tokens` tokens besides the first of each."""
    for block in blocks:
        block = block[: tokens + 1]
        if len(block) > 1:
            yield block
        tokens -= len(block) - 1
        if tokens == 0:
            return


def _reserved(shape: tuple[int, int]) -> torch.Tensor:
    """f32 `shape` in a temporary file, whose room is taken at once."""
    folder = tempfile.gettempdir()
    try:
        return Scratch(folder).empty(shape, torch.float32)
    except OSError as error:
        raise OSError(
            f"{folder}: no room for the log-probabilities of {shape[0]} tokens, {4 * math.prod(shape) / 1e6:.1f} MB "
            f"({error.strerror}). Give a smaller `max_tokens`, or another folder in the variable TMPDIR."
        ) from error


def _log_probabilities(model: OVChatGLMForCausalLM, ids: Sequence[tuple[list[int], int]]) -> Iterable[torch.Tensor]:
    """Of each block, f32 `[tokens - 1, vocab]`: the distributions of all its tokens but the first."""
    for block, special in ids:
        logits = model(torch.tensor([block])).logits[0]
        yield logits[special:-1].log_softmax(-1)


def _sums(reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """Sums over the rows `[tokens, vocab]`: both losses, divergence and agreement."""
    losses = [-part.gather(1, targets[:, None]).double().sum().item() for part in (reference, candidate)]
    divergence = (reference.exp() * (reference - candidate)).sum(-1).double().sum().item()
    agreement = (reference.argmax(-1) == candidate.argmax(-1)).sum().item()
    return np.array([*losses, divergence, agreement])


def _continue(model: OVChatGLMForCausalLM, prompt: list[int], new_tokens: int) -> list[int]:
    output = model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, num_beams=1)
    return output[0, len(prompt) :].tolist()


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    for i, (a, b) in enumerate(zip(first, second)):
        if a != b:
            return i
    return min(len(first), len(second))
