# SPDX-License-Identifier: Apache-2.0
"""Measures the first token of a prompt whose keys and values are known: by the engine, in memory, on disk.

    python tests/benchmarks/measure_prefix_cache.py FOLDER [--prompt-tokens 1024 8192]

Another prompt comes between two runs of one, so that the engine holds nothing of it; a cold disk is one whose pages
the system was told to forget. What is compared takes turns, and the median of the repetitions counts. All but what
ends a prompt is known: at most 64 tokens are computed. Logits must be bit for bit those of the run in memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import logging as transformers_logging

from optimum_chatglm_ov import OVChatGLMForCausalLM
from optimum_chatglm_ov.architectures.registry import architecture_of
from optimum_chatglm_ov.cli.arguments import add_computation_options, computation_options, positive_integer
from optimum_chatglm_ov.measure.speed import cpu_description


WAYS = ("computed", "held by the engine", "memory", "warm disk", "cold disk")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of an exported model")
    parser.add_argument("--prompt-tokens", type=positive_integer, nargs="+", default=[1024, 8192], metavar="N")
    parser.add_argument("--repetitions", type=positive_integer, default=3, metavar="N")
    parser.add_argument("--cache", type=Path, help="folder of the prefix cache (default: a temporary one)")
    add_computation_options(parser)
    args = parser.parse_args()

    transformers_logging.set_verbosity_error()
    with TemporaryDirectory(dir=args.cache) as folder:
        model = OVChatGLMForCausalLM.from_pretrained(args.model, ov_config=computation_options(args), compile=False)
        print(cpu_description() + "\n")
        print("| prompt | keys and values | first token (ms) | against computed | file (MB) |")
        print("|---|---|---|---|---|")
        for tokens in args.prompt_tokens:
            measure(model, tokens, Path(folder), args.repetitions)


def measure(model: OVChatGLMForCausalLM, tokens: int, folder: Path, repetitions: int) -> None:
    """Prints the rows of one length."""
    prompt, between = (architecture_of(model.config).example_prompt(tokens, seed) for seed in (tokens, 1))
    between = between[:, :64]
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    logits: dict[str, torch.Tensor] = {}
    for _ in range(repetitions):
        with_cache(model, False)
        first_token(model, between)
        times["computed"].append(first_token(model, prompt)[0])
        with_cache(model, True)
        first_token(model, prompt)
        times["held by the engine"].append(first_token(model, prompt)[0])
        first_token(model, between)
        seconds, logits["memory"] = first_token(model, prompt)
        times["memory"].append(seconds)
        for way in ("warm disk", "cold disk"):
            with_cache(model, folder)
            first_token(model, prompt)
            model._prefixes.store.wait()
            first_token(model, between)
            if way == "cold disk":
                forget(folder)
            seconds, logits[way] = first_token(model, prompt)
            times[way].append(seconds)
        for way, found in logits.items():
            if not torch.equal(found, logits["memory"]):
                raise SystemExit(f"{way}: other logits than from memory")
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    computed = statistics.median(times["computed"])
    for way, taken in times.items():
        median = statistics.median(taken)
        on_disk = f"{size:.0f}" if "disk" in way else ""
        print(f"| {tokens} | {way} | {1e3 * median:.1f} | {median / computed:.4f} | {on_disk} |", flush=True)


def with_cache(model: OVChatGLMForCausalLM, prefix_cache: Any) -> None:
    """Lets the compiled model keep prompts elsewhere, and nothing of what it holds."""
    model.compile()
    model.engine.reset()
    model.reuse = type(model.reuse).of(prefix_cache, "8GB")
    model._prefixes = model.reuse.prefixes(model.engine, architecture_of(model.config), model._identity)


def first_token(model: OVChatGLMForCausalLM, prompt: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Seconds, and the logits."""
    start = time.perf_counter()
    logits = model(prompt, logits_to_keep=1).logits
    return time.perf_counter() - start, logits


def forget(folder: Path) -> None:
    """Lets the system forget the pages of the files that it holds in memory."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    main()
