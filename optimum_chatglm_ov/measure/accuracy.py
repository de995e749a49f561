# SPDX-License-Identifier: Apache-2.0
"""How far a candidate model (quantised, native, another precision) is from a reference, measured on a text."""

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
from .tables import markdown_lines


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
        """Returns the measurements as JSON knows them."""
        return asdict(self)

    def table(self) -> str:
        """Returns the measurements as a markdown table."""
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
        return "\n".join(markdown_lines([{"measure": name, "value": value} for name, value in rows.items()]))


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
        reference, candidate: IR folders, local checkpoints or Hub ids with one vocabulary; or one of them twice, under
            other properties or attention.
        text: text file, strings or rows with a "text" column (see `texts.read_texts`).
        reference_config, candidate_config: OpenVINO properties, for example `{"KV_CACHE_PRECISION": "u8"}`.
        reference_attention, candidate_attention, reference_linear, candidate_linear: as in `from_pretrained`.
        max_tokens: tokens of the text to measure.
        block_length: tokens that are read in one call; the context of each token is its own block, and the first of
            each has none and is not measured.
        prompts, prompt_length: how many blocks, and so many of their first tokens, are continued greedily.
        new_tokens: tokens to generate from each.

    Raises:
        ValueError: the text has less than two tokens, a number is too small, a block exceeds the context, or the
            vocabularies differ.
        OSError: the temporary file has no room.
    """
    _check_numbers(
        max_tokens=max_tokens,
        block_length=block_length,
        prompts=prompts,
        prompt_length=prompt_length,
        new_tokens=new_tokens,
    )
    model = _load(reference, reference_config, reference_attention, reference_linear)
    tokenizer, blocks = _blocks(model, text, block_length, max_tokens)
    ids, targets = _ids_and_targets(tokenizer, blocks)
    beginnings = [texts.generated(block[:prompt_length], tokenizer)[0] for block in blocks[:prompts]]
    kept = _kept_log_probabilities(model, ids, len(targets))
    expected = [_continue(model, prompt, new_tokens) for prompt in beginnings]
    del model
    gc.collect()

    model = _load(candidate, candidate_config, candidate_attention, candidate_linear)
    _check_vocabularies((reference, kept.shape[1]), (candidate, model.config.vocab_size))
    sums = _all_sums(model, ids, kept, targets)
    found = [_continue(model, prompt, new_tokens) for prompt in beginnings]
    return _comparison(sums, len(targets), expected, found)


def _check_numbers(**numbers: int) -> None:
    least = {"block_length": 2, "prompts": 0}
    for name, number in numbers.items():
        if number < least.get(name, 1):
            raise ValueError(f"`{name}` is {number}; expected at least {least.get(name, 1)}.")


def _check_vocabularies(*sizes: tuple[str | Path, int]) -> None:
    if len({size for _, size in sizes}) > 1:
        found = ", ".join(f"{size} ids in {model}" for model, size in sizes)
        raise ValueError(f"The vocabularies differ: {found}. Compare models of one checkpoint.")


def _blocks(
    model: OVChatGLMForCausalLM, text: str | Path | Iterable[Any], length: int, max_tokens: int
) -> tuple[Any, list[list[int]]]:
    """Loads the tokenizer, and splits a text into blocks of `length` ids, without those that every prompt has."""
    tokenizer = load_tokenizer(model.model_save_dir)
    context = model.config.max_position_embeddings - len(texts.generated([], tokenizer)[0])
    if length > context:
        raise ValueError(
            f"`block_length` is {length}; the context of {model.config.name_or_path} holds at most {context}."
        )
    blocks = list(_measured(texts.blocks(texts.read_texts(text), tokenizer, length), max_tokens))
    if not blocks:
        raise ValueError("The text has less than two tokens; give a longer one.")
    return tokenizer, blocks


def _comparison(
    sums: np.ndarray, tokens: int, expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]
) -> Comparison:
    """Makes the result of the `_sums` of all tokens and of the continuations by reference and candidate."""
    reference_loss, candidate_loss, divergence, agreement = sums / tokens
    return Comparison(
        tokens=tokens,
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
    """Yields blocks until they have `tokens` tokens besides the first of each; the last one is cut."""
    for block in blocks:
        block = block[: tokens + 1]
        if len(block) > 1:
            yield block
        tokens -= len(block) - 1
        if tokens == 0:
            return


def _reserved(shape: tuple[int, int]) -> torch.Tensor:
    """Makes an f32 tensor in a temporary file, whose room on the disk is taken at once."""
    folder = tempfile.gettempdir()
    try:
        return Scratch(folder).empty(shape, torch.float32)
    except OSError as error:
        raise OSError(
            f"{folder}: no room for the log-probabilities of {shape[0]} tokens, {4 * math.prod(shape) / 1e6:.1f} MB "
            f"({error.strerror}). Give a smaller `max_tokens`, or another folder in the variable TMPDIR."
        ) from error


def _ids_and_targets(tokenizer: Any, blocks: list[list[int]]) -> tuple[list[tuple[list[int], int]], torch.Tensor]:
    """Makes the prompt of each block, with the number of ids before it, and joins all tokens that have a context."""
    ids = [texts.generated(block, tokenizer) for block in blocks]
    return ids, torch.cat([torch.tensor(block[1:]) for block in blocks])


def _log_probabilities(
    model: OVChatGLMForCausalLM, ids: Sequence[tuple[list[int], int]]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Computes the distributions of all tokens of each block but the first.

    Yields:
        Their places among those of all blocks, and f32 `[tokens - 1, vocab]`.
    """
    position = 0
    for block, special in ids:
        log_probabilities = model(torch.tensor([block])).logits[0, special:-1].log_softmax(-1)
        yield slice(position, position + len(log_probabilities)), log_probabilities
        position += len(log_probabilities)


def _kept_log_probabilities(
    model: OVChatGLMForCausalLM, ids: Sequence[tuple[list[int], int]], tokens: int
) -> torch.Tensor:
    """Computes the distributions of all tokens, f32 `[tokens, vocab]` in a temporary file."""
    kept = _reserved((tokens, model.config.vocab_size))
    for rows, log_probabilities in _log_probabilities(model, ids):
        kept[rows] = log_probabilities
    return kept


def _all_sums(
    model: OVChatGLMForCausalLM, ids: Sequence[tuple[list[int], int]], kept: torch.Tensor, targets: torch.Tensor
) -> np.ndarray:
    """Adds up the `_sums` of all blocks, of the reference's distributions and those of `model`."""
    sums = np.zeros(4)
    for rows, log_probabilities in _log_probabilities(model, ids):
        sums += _sums(kept[rows], log_probabilities, targets[rows])
    return sums


def _sums(reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """Sums both losses, divergence and agreement over rows `[tokens, vocab]`."""
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
