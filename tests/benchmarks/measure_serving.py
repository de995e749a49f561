# SPDX-License-Identifier: Apache-2.0
"""Times a server under load, compares every answer with the one computed alone, and watches its memory.

    python tests/benchmarks/measure_serving.py load [FOLDER] --clients 1 8 64 --requests 128
    python tests/benchmarks/measure_serving.py soak [FOLDER] --clients 64 --minutes 30
    python tests/benchmarks/measure_serving.py fuzz --examples 500
    python tests/benchmarks/measure_serving.py engine FOLDER --clients 1 8 64

FOLDER is an exported model with a tokenizer; without one, the tiny model of the package. `load` also serves the same
requests one at a time, with the same engine, for comparison. All numbers are the client's. `engine` leaves HTTP
and text out, and compares token ids: for models with random weights, which need no tokenizer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np


sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from serving_support import NAME, Server, options, serving  # noqa: E402

from optimum_chatglm_ov.assets import TINY_CHATGLM3  # noqa: E402
from optimum_chatglm_ov.cli.embedded import embedded_model  # noqa: E402
from optimum_chatglm_ov.ir import load_config  # noqa: E402
from optimum_chatglm_ov.serving.engine import EngineOptions, GenerationRequest  # noqa: E402
from optimum_chatglm_ov.serving.engine_batched import BatchedEngine  # noqa: E402
from optimum_chatglm_ov.tokenization import load_tokenizer  # noqa: E402


WORDS = "你好 你是谁 天气 怎么样 讲个笑话 OpenVINO 模型 北京 hello what is 1+1 再见 为什么 how are you".split()


@dataclass
class Results:
    """What clients saw."""

    answers: dict[int, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def line(self, name: str) -> str:
        """Percentiles for people."""
        parts = [
            f"{name}: {len(self.answers)} answers, {len(self.errors)} errors",
            f"{self.tokens / self.seconds:.0f} tokens/s",
        ]
        for label, values in (("first token", self.first), ("each token", self.between)):
            low, high = np.percentile(values, [50, 99]) * 1e3 if values else (0, 0)
            parts.append(f"{label} p50 {low:.1f} ms, p99 {high:.1f} ms")
        return "; ".join(parts)


def prompt(number: int) -> str:
    """Another question for each number, of one to sixty words."""
    rng = random.Random(number)
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))


async def ask(client: httpx.AsyncClient, number: int, max_tokens: int, results: Results) -> None:
    """One streamed answer, greedy."""
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": prompt(number)}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "logprobs": True,  # so that each token comes at once, whether it has text or not
        "stream_options": {"include_usage": True},
    }
    text, last, is_first = "", time.perf_counter(), True
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk or response.status_code != 200:
                    raise RuntimeError(line)
                if chunk["choices"] and (new := chunk["choices"][0]["delta"].get("content")):
                    now = time.perf_counter()
                    (results.first if is_first else results.between).append(now - last)
                    last, is_first, text = now, False, text + new
                results.tokens += (chunk.get("usage") or {}).get("completion_tokens", 0)
            if response.status_code != 200:
                raise RuntimeError(f"status {response.status_code}")
        results.answers[number] = text
    except (httpx.HTTPError, RuntimeError) as error:
        results.errors.append(f"{type(error).__name__}: {error}")


async def load(server: Server, clients: int, numbers: list[int], max_tokens: int) -> Results:
    """`clients` ask one question after the other, until all `numbers` are answered."""
    results, left = Results(), list(reversed(numbers))
    limits = httpx.Limits(max_connections=clients)
    start = time.perf_counter()
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits, trust_env=False) as client:

        async def one() -> None:
            while left:
                await ask(client, left.pop(), max_tokens, results)

        await asyncio.gather(*(one() for _ in range(clients)))
    results.seconds = time.perf_counter() - start
    return results


def resident(server: Server) -> float:
    """MB that the server and its engine's process hold."""
    total = 0
    for process in ("self", server.engine.process_id):
        with open(f"/proc/{process}/status", encoding="ascii") as file:
            total += next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    return total / 1024


def measure_load(folder: Path, args: argparse.Namespace) -> int:
    numbers = list(range(args.requests))
    engine = EngineOptions(max_running=args.max_running, cache_tokens=args.cache_tokens, ov_config=properties(args))
    alone = EngineOptions(max_running=1, cache_tokens=args.cache_tokens, ov_config=properties(args), queue_seconds=600)
    with serving(folder, options(), alone) as server:
        few = numbers[: args.alone]
        expected = asyncio.run(load(server, 1, few, args.max_tokens)).answers
        for clients in args.clients:
            results = asyncio.run(load(server, clients, few, args.max_tokens))
            print(results.line(f"one at a time, {clients} clients"), flush=True)
    mixed = 0
    with serving(folder, options(), engine) as server:
        asyncio.run(load(server, 1, [10**6], args.max_tokens))
        for clients in args.clients:
            results = asyncio.run(load(server, clients, numbers, args.max_tokens))
            differing = [number for number in few if results.answers.get(number) != expected[number]]
            mixed += len(differing)
            print(results.line(f"batched, {clients} clients") + f"; {len(differing)} of {len(few)} differ from alone")
            for error in results.errors[:3]:
                print("  ", error)
            mixed += len(results.errors)
    return int(mixed > 0)


def measure_soak(folder: Path, args: argparse.Namespace) -> int:
    engine = EngineOptions(max_running=args.max_running, cache_tokens=args.cache_tokens, ov_config=properties(args))
    wrong = 0
    with serving(folder, options(), engine) as server:
        expected = asyncio.run(load(server, 1, list(range(args.requests)), args.max_tokens)).answers
        end, count = time.monotonic() + 60 * args.minutes, 0
        while time.monotonic() < end:
            order = random.sample(range(args.requests), args.requests)
            results = asyncio.run(load(server, args.clients[0], order, args.max_tokens))
            wrong += len(results.errors) + sum(results.answers.get(n) != expected[n] for n in order)
            count += len(results.answers)
            print(f"{count} answers, {wrong} wrong, {resident(server):.0f} MB; {results.line('round')}", flush=True)
    return int(wrong > 0)


async def ask_engine(engine: BatchedEngine, number: int, max_tokens: int, results: Results) -> None:
    """One answer of `engine`, greedy, to a prompt of 16 to 200 random ids."""
    rng = random.Random(number)
    ids = [rng.randrange(3, 60000) for _ in range(rng.randint(16, 200))]
    found, last = [], time.perf_counter()
    async for token in engine.generate(GenerationRequest(ids, max_tokens, stop_ids=(2,))):
        now = time.perf_counter()
        (results.between if found else results.first).append(now - last)
        last = now
        found.append(token.token_id)
    results.tokens += len(found)
    results.answers[number] = str(found)


async def load_engine(engine: BatchedEngine, clients: int, count: int, max_tokens: int) -> Results:
    """As [`load`], without HTTP."""
    results, left, start = Results(), list(range(count)), time.perf_counter()

    async def one() -> None:
        while left:
            await ask_engine(engine, left.pop(), max_tokens, results)

    await asyncio.gather(*(one() for _ in range(clients)))
    results.seconds = time.perf_counter() - start
    return results


async def measure_engine(folder: Path, args: argparse.Namespace) -> int:
    options = EngineOptions(max_running=args.max_running, cache_tokens=args.cache_tokens, ov_config=properties(args))
    engine = BatchedEngine(folder, load_tokenizer(TINY_CHATGLM3), load_config(folder), options)
    await engine.start()
    expected = {}
    for clients in args.clients:
        count = min(args.requests, args.alone) if clients == 1 else args.requests
        results = await load_engine(engine, clients, count, args.max_tokens)
        expected = expected or results.answers
        differing = sum(results.answers[number] != answer for number, answer in expected.items())
        print(results.line(f"{clients} clients"), f"; {differing} of {len(expected)} differ from alone", flush=True)
    await engine.close()
    return 0


def measure_fuzz(args: argparse.Namespace) -> int:
    sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))
    from test_fuzz import fuzz

    with embedded_model() as folder, serving(folder, options(), EngineOptions()) as server:
        print(f"{fuzz(server, args.examples)} requests, none made the server fail")
    return 0


def properties(args: argparse.Namespace) -> dict[str, str]:
    return (
        {}
        if args.precision is None
        else {"INFERENCE_PRECISION_HINT": args.precision, "KV_CACHE_PRECISION": args.precision}
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("load", "soak", "fuzz", "engine"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--alone", type=int, default=32, help="requests that are also served one at a time")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--max-running", type=int, default=64)
    parser.add_argument("--cache-tokens", type=int, default=65536)
    parser.add_argument("--precision", choices=("f32", "bf16"), help="of computation and cache (default: OpenVINO's)")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--examples", type=int, default=500)
    args = parser.parse_args()
    if args.what == "fuzz":
        return measure_fuzz(args)
    if args.what == "engine":
        return asyncio.run(measure_engine(args.folder, args))
    measure = measure_load if args.what == "load" else measure_soak
    if args.folder is not None:
        return measure(args.folder, args)
    with embedded_model() as folder:
        return measure(folder, args)


if __name__ == "__main__":
    sys.exit(main())
