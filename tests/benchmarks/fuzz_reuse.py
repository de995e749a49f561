# SPDX-License-Identifier: Apache-2.0
"""Random histories on models that keep prompts, compared with computing everything; prints what was done.

    python tests/benchmarks/fuzz_reuse.py [--operations 800] [--seeds 1 2] [--names glm4 ...] [--stores memory ...]
    python tests/benchmarks/fuzz_reuse.py --stores killed

`killed`: another process works on the same folder and is killed with SIGKILL again and again, at random moments.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import logging as transformers_logging

from optimum_chatglm_ov import OVChatGLMForCausalLM, export_model


TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "support")]

from conftest import DATA, EXACT, TORCH_MODELS, save_tokenizer, torch_model  # noqa: E402
from reuse_fuzz import ReuseFuzz  # noqa: E402


NAMES = ("chatglm-6b", "chatglm2-6b-ptuning-v2", "chatglm3-6b", "glm4")
STORES = ("memory", "folder", "small folder", "killed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=100, help="of each history (default: 100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES, help="checkpoints of the tests")
    parser.add_argument("--stores", nargs="+", choices=STORES, default=STORES)
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    if args.child:
        exported, folder = args.child
        histories(exported, folder, None, args.seeds[0], 1 << 30)
        return
    total, asked, computed, kills = Counter(), 0, 0, 0
    with TemporaryDirectory() as temporary:
        for name in args.names:
            checkpoint = DATA / "models" / name
            if name in TORCH_MODELS:
                checkpoint = Path(temporary) / "torch" / name
                torch_model(name).save_pretrained(checkpoint)
                save_tokenizer(checkpoint)
            exported = export_model(checkpoint, Path(temporary) / name)
            for store in args.stores:
                for seed in args.seeds:
                    folder = None if store == "memory" else Path(temporary) / f"{name} {store} {seed}"
                    size = "300KB" if store == "small folder" else None
                    with killer(exported, folder, seed) if store == "killed" else no_killer() as killed:
                        fuzz = histories(exported, folder, size, seed, args.operations)
                        kills += killed[0]
                    total.update(fuzz.counts)
                    asked, computed = asked + fuzz.asked, computed + fuzz.computed
                    print(f"{name}, {store}, seed {seed}: no difference. Until now:", dict(total.most_common()))
                    print(f"{asked} tokens of prompts, {computed} computed; {kills} processes killed", flush=True)


def histories(exported: Path, folder: Path | None, size: str | None, seed: int, operations: int) -> ReuseFuzz:
    """Histories of two models on one store."""

    def load(prefix_cache, size=None):
        return OVChatGLMForCausalLM.from_pretrained(
            exported, attention="native", ov_config=dict(EXACT), prefix_cache=prefix_cache, prefix_cache_size=size
        )

    with TemporaryDirectory() as files:
        fuzz = ReuseFuzz([load(folder or True, size) for _ in range(2)], load(False), folder, Path(files), seed)
        fuzz.run(operations)
    return fuzz


@contextmanager
def no_killer():
    yield [0]


@contextmanager
def killer(exported: Path, folder: Path, seed: int):
    """Processes on `folder` that do what this one does and are killed, one after another; counts them."""
    killed, ends = [0], threading.Event()

    def run():
        while not ends.is_set():
            options = ["--seeds", str(seed), "--child", str(exported), str(folder)]  # the same texts
            child = subprocess.Popen([sys.executable, __file__, *options], stderr=subprocess.DEVNULL)
            until = time.monotonic() + random.uniform(4, 9)
            while child.poll() is None and time.monotonic() < until and not ends.is_set():
                time.sleep(random.random() / 20)
            if child.poll() is None:
                os.kill(child.pid, signal.SIGKILL)
                killed[0] += 1
            elif not ends.is_set():
                raise SystemExit("the other process has ended by itself")
            child.wait()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield killed
    finally:
        ends.set()
        thread.join()


if __name__ == "__main__":
    main()
