# SPDX-License-Identifier: Apache-2.0
"""Times a server under load, compares every answer with the one computed alone, and watches its memory.

    python tests/benchmarks/measure_serving.py load [FOLDER] --clients 1 8 64 --requests 32 64 128
    python tests/benchmarks/measure_serving.py soak [FOLDER] --clients 64 --requests 128 --minutes 30
    python tests/benchmarks/measure_serving.py fuzz [FOLDER] --examples 500

FOLDER is an exported model; without one, the tiny model of the package. A folder without a tokenizer, as models with
random weights have none, gets the package's, with as many more pieces as the model has ids. The server is
`chatglm-ov serve` in a process of its own, and all numbers are the clients', in this one. `load` serves the same
requests by the same engine one at a time, too: what that answers is what is expected of the other.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil
from sentencepiece import sentencepiece_model_pb2


ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "tests" / "serving")]  # of the checkout

from optimum_chatglm_ov.assets import TINY_CHATGLM3  # noqa: E402
from optimum_chatglm_ov.cli.embedded import embedded_model  # noqa: E402
from optimum_chatglm_ov.ir import load_config  # noqa: E402


NAME = "tiny"
WORDS = "你好 你是谁 天气 怎么样 讲个笑话 OpenVINO 模型 北京 hello what is 1+1 再见 为什么 how are you".split()
CONTROL_TOKENS = 16  # ids that a tokenizer adds after its pieces, at most


@dataclass
class Results:
    """What clients saw: of each answer its tokens, with the logarithm of their probability."""

    answers: dict[int, list[tuple[str, float]]] = field(default_factory=dict)
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
    return f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))


async def ask(client: httpx.AsyncClient, number: int, max_tokens: int, results: Results) -> None:
    """One streamed answer, greedy."""
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": prompt(number)}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "logprobs": True,
        "stream_options": {"include_usage": True},
    }
    tokens: list[tuple[str, float]] = []
    last, is_first, usage = time.perf_counter(), True, None
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk or response.status_code != 200:
                    raise RuntimeError(line)
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    entries = (choice.get("logprobs") or {}).get("content", [])
                    if entries:
                        now = time.perf_counter()
                        (results.first if is_first else results.between).append(now - last)
                        last, is_first = now, False
                    tokens += [(entry["token"], entry["logprob"]) for entry in entries]
            if response.status_code != 200 or usage is None:
                raise RuntimeError(f"status {response.status_code}, no usage: the answer was cut off")
        results.tokens += usage["completion_tokens"]
        results.answers[number] = tokens
    except (httpx.HTTPError, RuntimeError) as error:
        results.errors.append(f"{type(error).__name__}: {error}")


async def load(url: str, clients: int, numbers: list[int], max_tokens: int) -> Results:
    """`clients` ask one question after the other, until all `numbers` are answered."""
    results, left = Results(), list(reversed(numbers))
    limits = httpx.Limits(max_connections=clients)
    start = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as client:

        async def one() -> None:
            while left:
                await ask(client, left.pop(), max_tokens, results)

        await asyncio.gather(*(one() for _ in range(clients)))
    results.seconds = time.perf_counter() - start
    return results


def differences(expected: Results, found: Results) -> list[str]:
    """Of each answer that is not the expected one, where and how it departs from it."""
    lines = []
    for number, tokens in expected.answers.items():
        others = found.answers.get(number)
        if others is None:
            lines.append(f"request {number} has no answer")
        elif [token for token, _ in others] != [token for token, _ in tokens]:
            place, pair = next(
                ((i, pair) for i, pair in enumerate(zip(tokens, others)) if pair[0][0] != pair[1][0]),
                (min(len(tokens), len(others)), "one ends"),
            )
            lines.append(f"request {number}, token {place}, alone and with others (log-probability): {pair}")
    return lines


@contextlib.contextmanager
def served(folder: Path, args: argparse.Namespace, max_running: int) -> Iterator[tuple[str, psutil.Process]]:
    """Address and process of a server of the model in `folder`."""
    precision = []
    if args.precision is not None:
        precision = ["--inference-precision", args.precision, "--kv-cache-precision", args.precision]
    if args.precision == "f32":
        precision += ["--dynamic-quantization-group-size", "0"]
    command = [sys.executable, "-m", "optimum_chatglm_ov.cli.main", "serve", "--model", str(folder), "--port", "0"]
    limits = ["--max-running", str(max_running), "--cache-tokens", str(args.cache_tokens), "--queue-seconds", "600"]
    process = subprocess.Popen(
        [*command, "--served-name", NAME, *limits, *precision], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        log = ""
        while not (address := re.search(r"running on (http://\S+)", log)):
            line = process.stderr.readline()
            if not line:
                raise RuntimeError(f"the server did not start:\n{log}")
            log += line
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield address[1], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def resident(process: psutil.Process) -> float:
    """MB that the server and its engine's process hold."""
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True))) / 2**20


@contextlib.contextmanager
def model_folder(folder: Path | None) -> Iterator[Path]:
    """The folder to serve."""
    if folder is None:
        with embedded_model() as embedded:
            yield embedded
    elif (folder / "tokenizer_config.json").exists():
        yield folder
    else:
        with tempfile.TemporaryDirectory() as temporary:
            for file in folder.iterdir():
                (Path(temporary) / file.name).symlink_to(file.resolve())
            _add_tokenizer(Path(temporary))
            yield Path(temporary)


def _add_tokenizer(folder: Path) -> None:
    """Gives the model in `folder` the package's tokenizer, with a piece for each id."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((TINY_CHATGLM3 / "tokenizer.model").read_bytes())
    for number in range(len(model.pieces), load_config(folder).vocab_size - CONTROL_TOKENS):
        model.pieces.add(piece=f"\u2581w{number}", score=-1e5)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    shutil.copy(TINY_CHATGLM3 / "tokenizer_config.json", folder)


def measure_load(folder: Path, args: argparse.Namespace) -> int:
    """Each number of clients has questions of its own, so that no cache knows their beginnings."""
    counts = args.requests if len(args.requests) > 1 else args.requests * len(args.clients)
    ends = np.cumsum(counts)
    levels = {
        clients: list(range(end - count, end)) for clients, count, end in zip(args.clients, counts, ends.tolist())
    }
    expected, wrong = {}, 0
    for name, max_running in (("one at a time", 1), ("batched", args.max_running)):
        with served(folder, args, max_running) as (url, _):
            asyncio.run(load(url, 1, [10**6, 10**6 + 1], args.max_tokens))
            for clients, numbers in levels.items():
                results = asyncio.run(load(url, clients, numbers, args.max_tokens))
                found = differences(expected.setdefault(clients, results), results)
                print(results.line(f"{name}, {clients} clients") + f"; {len(found)} differ from alone", flush=True)
                print("".join(f"   {line}\n" for line in [*found, *results.errors][:8]), end="", flush=True)
                wrong += len(found) + len(results.errors)
    return int(wrong > 0)


def measure_soak(folder: Path, args: argparse.Namespace) -> int:
    numbers, wrong, count = list(range(args.requests[0])), 0, 0
    memory: list[float] = []
    with served(folder, args, args.max_running) as (url, process):
        expected = asyncio.run(load(url, 1, numbers, args.max_tokens))
        end = time.monotonic() + 60 * args.minutes
        while time.monotonic() < end:
            order = random.sample(numbers, len(numbers))
            results = asyncio.run(load(url, args.clients[0], order, args.max_tokens))
            wrong += len(results.errors) + len(differences(expected, results))
            count += len(results.answers)
            memory.append(resident(process))
            print(f"{count} answers, {wrong} wrong, {memory[-1]:.0f} MB; {results.line('round')}", flush=True)
            print("".join(f"   {error}\n" for error in results.errors[:8]), end="", flush=True)
    tenth = len(memory) // 10
    print(f"memory: {memory[tenth]:.0f} MB after a tenth of the time, {memory[-1]:.0f} MB at the end")
    return int(wrong > 0)


def measure_fuzz(folder: Path, args: argparse.Namespace) -> int:
    from test_fuzz import fuzz

    with served(folder, args, args.max_running) as (url, _):
        statuses = fuzz(url, args.examples)
    print("".join(f"{path}: {count} times {status}\n" for (path, status), count in sorted(statuses.items())), end="")
    print(f"{statuses.total()} requests, none made the server fail")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("load", "soak", "fuzz"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument(
        "--requests", type=int, nargs="+", default=[128], help="for each number of clients, or for all"
    )
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--max-running", type=int, default=64)
    parser.add_argument("--cache-tokens", type=int, default=65536)
    parser.add_argument("--precision", choices=("f32", "bf16"), help="of computation and cache (default: OpenVINO's)")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--examples", type=int, default=500)
    args = parser.parse_args()
    measure = {"load": measure_load, "soak": measure_soak, "fuzz": measure_fuzz}[args.what]
    with model_folder(args.folder) as folder:
        return measure(folder, args)


if __name__ == "__main__":
    sys.exit(main())
