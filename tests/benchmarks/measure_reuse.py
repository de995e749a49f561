# SPDX-License-Identifier: Apache-2.0
"""Measures what caches that take tokens back save: drafts from the prompt or a smaller model, and kept conversations.

    python tests/benchmarks/measure_reuse.py FOLDER [--assistant FOLDER]

A model with a tokenizer answers a question; the repetitive prompt has asked and answered it before. One without (and
with random weights, so) is made to write random tokens, or one passage again and again; an assistant's drafts are then
all right, the best case. Each output must be that of plain greedy decoding. What is compared takes turns, and the
median of the repetitions counts.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LogitsProcessor
from transformers import logging as transformers_logging

from optimum_chatglm_ov import OVChatGLMForCausalLM
from optimum_chatglm_ov.architectures.registry import architecture_of
from optimum_chatglm_ov.cli.arguments import add_computation_options, computation_options, positive_integer
from optimum_chatglm_ov.measure.speed import cpu_description


QUESTION = "What is OpenVINO?"
PASSAGE_TOKENS = 24
LOOKUP_TOKENS = 10
SECOND_TURN_TOKENS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of an exported model")
    parser.add_argument("--assistant", type=Path, help="folder of one that drafts, for example the same in int4")
    parser.add_argument(
        "--prompt-tokens", type=positive_integer, default=512, metavar="N", help="of prompts that are not questions"
    )
    parser.add_argument("--new-tokens", type=positive_integer, default=64, metavar="N", help="at most")
    parser.add_argument("--repetitions", type=positive_integer, default=3, metavar="N")
    add_computation_options(parser)
    args = parser.parse_args()

    transformers_logging.set_verbosity_error()
    properties = computation_options(args)
    load = functools.partial(OVChatGLMForCausalLM.from_pretrained, attention="fused", ov_config=properties)
    model, assistant = load(args.model), args.assistant and load(args.assistant)
    print(", ".join([cpu_description(), *(f"{name}={value}" for name, value in properties.items())]) + "\n")
    calls = Calls(model)
    measure_drafts(model, assistant, calls, args)
    print()
    measure_conversation(model, calls, args)


class Calls:
    """The calls of a model since the last `clear`, and the tokens that they computed."""

    def __init__(self, model: OVChatGLMForCausalLM):
        forward = model.forward

        @functools.wraps(forward)
        def counted(input_ids: torch.Tensor, **arguments: Any) -> Any:
            self.count += 1
            self.tokens += input_ids.shape[1]
            return forward(input_ids, **arguments)

        model.forward = counted
        self.clear()

    def clear(self) -> None:
        self.count = self.tokens = 0


class Dictate(LogitsProcessor):
    """Makes a model write `ids`, the prompt included, whatever its weights say."""

    def __init__(self, ids: list[int]):
        self.ids = ids

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        dictated = torch.zeros_like(scores)
        dictated[:, self.ids[min(input_ids.shape[1], len(self.ids) - 1)]] = 1e4  # other drafts stay possible
        return dictated


def texts(model: OVChatGLMForCausalLM, args: argparse.Namespace) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
    """Name, prompt int64 `[1, L]` and arguments of `generate`."""
    if any((args.model / name).is_file() for name in ("tokenizer.model", "ice_text.model")):
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        _, history = model.chat(tokenizer, QUESTION, do_sample=False, max_new_tokens=args.new_tokens)
        for name, earlier in (("repetitive", history), ("plain", [])):
            yield name, tokenizer.build_chat_input(QUESTION, history=earlier)["input_ids"], {}
        return
    ids = random_tokens(model.config, args.prompt_tokens + args.new_tokens)
    repeated = (ids[:PASSAGE_TOKENS] * len(ids))[: len(ids)]
    for name, text in (("repetitive", repeated), ("plain", ids)):
        prompt = as_prompt(model.config, text[: args.prompt_tokens])
        written = prompt[0].tolist() + text[args.prompt_tokens :]
        yield name, prompt, {"logits_processor": [Dictate(written)]}


def random_tokens(config: Any, length: int) -> list[int]:
    return architecture_of(config).example_prompt(length + 2)[0, :length].tolist()


def as_prompt(config: Any, ids: list[int]) -> torch.Tensor:
    ends = [config.gmask_token_id, config.bos_token_id] if config.architecture == "chatglm" else []
    return torch.tensor([ids + ends])


def greedy(model: OVChatGLMForCausalLM, ids: torch.Tensor, new_tokens: int, **settings: Any) -> Any:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        **settings,
    )


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def check_same(way: str, found: torch.Tensor, expected: torch.Tensor, prompt: int) -> None:
    if not torch.equal(found, expected):
        same = (found == expected).int().cumprod(1).sum().item() if found.shape == expected.shape else prompt
        raise SystemExit(
            f"{way}: after {same - prompt} equal tokens, another one than in plain greedy decoding. In bf16 two "
            "tokens can be equally likely; try --inference-precision f32."
        )


def measure_drafts(model: Any, assistant: Any, calls: Calls, args: argparse.Namespace) -> None:
    """Tokens of a call and time of whole generations, with and without drafts."""
    ways = {"none": {}, f"{LOOKUP_TOKENS} from the prompt": {"prompt_lookup_num_tokens": LOOKUP_TOKENS}}
    if assistant is not None:
        ways[f"from {args.assistant.name}"] = {"assistant_model": assistant}
    print("| text | drafts | prompt | new tokens | tokens a call | time (s) | against none |")
    print("|---|---|---|---|---|---|---|")
    for text, prompt, settings in texts(model, args):
        run = functools.partial(greedy, model, prompt, args.new_tokens, **settings)
        expected, per_call = run().sequences, {}
        new_tokens = expected.shape[1] - prompt.shape[1]
        for way, drafts in ways.items():
            calls.clear()
            check_same(f"{text} text, drafts {way}", run(**drafts).sequences, expected, prompt.shape[1])
            per_call[way] = new_tokens / calls.count
        runs = [functools.partial(run, **drafts) for drafts in ways.values()]
        rounds = [[seconds(one) for one in runs] for _ in range(args.repetitions)]
        times = dict(zip(ways, map(statistics.median, zip(*rounds))))
        for way, taken in times.items():
            cells = (text, way, prompt.shape[1], new_tokens, f"{per_call[way]:.2f}", f"{taken:.3f}")
            print(f"| {' | '.join(map(str, cells))} | {taken / times['none']:.2f} |", flush=True)


def measure_conversation(model: Any, calls: Calls, args: argparse.Namespace) -> None:
    """The first token of a second turn: with the keys and values of the first, and with all of it computed again."""
    if model.config.architecture == "chatglm":
        print("A second turn of chatglm-6b is computed anew: all tokens of a prompt see each other.")
        return
    ids = random_tokens(model.config, args.prompt_tokens + args.new_tokens + SECOND_TURN_TOKENS + 1)
    first, second = torch.tensor([ids[: args.prompt_tokens]]), torch.tensor([ids[:-1]])
    settings = {"logits_processor": [Dictate(ids)]}
    times, computed = {"kept": [], "computed again": []}, {}
    for _ in range(args.repetitions + 1):  # the first one warms up
        cache = greedy(model, first, args.new_tokens, **settings).past_key_values
        for way, past in (("kept", {"past_key_values": cache}), ("computed again", {})):
            calls.clear()
            times[way].append(seconds(lambda: greedy(model, second, 1, **settings, **past)))  # noqa: B023
            computed[way] = calls.tokens
    print("| keys and values of the first turn | tokens of both turns | computed | first token (ms) | ratio |")
    print("|---|---|---|---|---|")
    medians = {way: statistics.median(taken[1:]) for way, taken in times.items()}
    for way, taken in medians.items():
        ratio = taken / medians["computed again"]
        print(f"| {way} | {second.shape[1]} | {computed[way]} | {1e3 * taken:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
