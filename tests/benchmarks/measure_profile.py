# SPDX-License-Identifier: Apache-2.0
"""Measures which kinds of operations the time of a prompt, and of a token after it, goes to.

    python tests/benchmarks/measure_profile.py FOLDER [--prompt-tokens N]

OpenVINO times each operation; the sums of one kind are the medians of the repetitions. Native operations have the
names of what they replace, without the numbers of layers. The environment variable CHATGLM_OV_ISA names their kernels,
as always.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections import Counter
from pathlib import Path

import torch

from optimum_chatglm_ov import OVChatGLMForCausalLM
from optimum_chatglm_ov.cli.arguments import add_runtime_options, positive_integer, runtime_options
from optimum_chatglm_ov.measure.speed import cpu_description


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of an exported model")
    parser.add_argument("--prompt-tokens", type=positive_integer, default=1024, metavar="N")
    parser.add_argument("--repetitions", type=positive_integer, default=3, metavar="N")
    add_runtime_options(parser)
    args = parser.parse_args()

    options = runtime_options(args)
    options["ov_config"]["PERF_COUNT"] = "YES"
    model = OVChatGLMForCausalLM.from_pretrained(args.model, **options)
    prompt = torch.randint(5, 1000, (1, args.prompt_tokens), generator=torch.Generator().manual_seed(0))
    profile = Profile(model)
    prompts, tokens = [], []
    for _ in range(args.repetitions + 1):
        output = model(prompt, logits_to_keep=1)
        prompts.append(profile.last())
        inputs = model.prepare_inputs_for_generation(
            torch.cat([prompt, prompt[:, :1]], dim=1),
            attention_mask=torch.ones(1, args.prompt_tokens + 1, dtype=torch.long),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        model(**inputs)
        tokens.append(profile.last())
    print(f"{cpu_description()}\n\n| operations | {args.prompt_tokens} tokens (ms) | share | one more (ms) | share |")
    print("|---|---|---|---|---|")
    first, next_one = medians(prompts[1:]), medians(tokens[1:])  # the very first ones take memory
    for kind in sorted({*first, *next_one}, key=lambda kind: -first[kind]):
        cells = [f"{sums[kind]:.3f} | {100 * sums[kind] / sums.total():.1f} %" for sums in (first, next_one)]
        print(f"| {kind} | {' | '.join(cells)} |")
    print(f"| all | {first.total():.3f} | | {next_one.total():.3f} | |")


class Profile:
    """Milliseconds of each inference of a model, by kind of operation. `last` is called after every one."""

    def __init__(self, model: OVChatGLMForCausalLM):
        self._model = model
        self._inferences = 0
        self._totals: Counter[str] = Counter()

    def last(self) -> Counter[str]:
        # OpenVINO gives the means of all inferences so far
        self._inferences += 1
        totals: Counter[str] = Counter()
        for node in self._model.request.get_profiling_info():
            kind = re.sub("[0-9]+", "N", node.node_name) if node.node_type == "Reference" else node.node_type
            totals[kind] += node.real_time.total_seconds() * 1e3 * self._inferences
        times = Counter({kind: total - self._totals[kind] for kind, total in totals.items()})
        self._totals = totals
        return times


def medians(runs: list[Counter[str]]) -> Counter[str]:
    kinds = {kind for run in runs for kind in run}
    return Counter({kind: statistics.median(run[kind] for run in runs) for kind in kinds})


if __name__ == "__main__":
    main()
