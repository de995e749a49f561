# SPDX-License-Identifier: Apache-2.0
"""Measures memory and time of the exports of a checkpoint, beside the size of the output and the time of `cp`.

    python tests/benchmarks/measure_export.py /data/random-chatglm3-6b --formats fp16 int8 int4

Prints a markdown table. Every export runs in a process of its own. Memory is the peak of the process's anonymous
memory (`RssAnon` in /proc/self/status, sampled every 20 ms); pages of mapped files are not in it, because the kernel
can drop them. Before `cp` and before every export the checkpoint is dropped from the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--formats", nargs="+", default=["fp16", "int8", "int4"])
    parser.add_argument("--output", type=Path, help="folder to write the exports in (default: beside the checkpoint)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # format and folder, in the measured process
    args = parser.parse_args()
    if args.one:
        print(json.dumps(export(args.checkpoint, *args.one)))
        return

    with tempfile.TemporaryDirectory(dir=args.output or args.checkpoint.resolve().parent) as folder:
        drop_from_page_cache(args.checkpoint)
        start = time.perf_counter()
        subprocess.run(["cp", "-rL", args.checkpoint, f"{folder}/copy"], check=True)
        copy_time = time.perf_counter() - start
        shutil.rmtree(f"{folder}/copy")
        print(f"Checkpoint: {size(args.checkpoint):.2f} GB; `cp`: {copy_time:.1f} s.\n")
        print("| format | output (GB) | peak anonymous memory (GB) | of it imports (GB) | time (s) | times `cp` |")
        print("|---|---|---|---|---|---|", flush=True)
        for weight_format in args.formats:
            drop_from_page_cache(args.checkpoint)
            command = [sys.executable, __file__, str(args.checkpoint), "--one", weight_format, f"{folder}/export"]
            process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(process.stdout.splitlines()[-1])
            seconds, written = found["seconds"], size(Path(folder) / "export")
            memory = f"{found['peak']:.2f} | {found['imports']:.2f}"
            print(
                f"| {weight_format} | {written:.2f} | {memory} | {seconds:.1f} | {seconds / copy_time:.1f} |",
                flush=True,
            )
            shutil.rmtree(f"{folder}/export")


def export(checkpoint: Path, weight_format: str, output: str) -> dict[str, float]:
    """Exports; peak and initial anonymous memory in GB, and seconds without the imports."""
    from optimum_chatglm_ov import export_model

    imports = peak = anonymous_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        export_model(checkpoint, output, weight_format=weight_format)
    finally:
        done.set()
        watcher.join()
    return {"peak": peak, "imports": imports, "seconds": time.perf_counter() - start}


def anonymous_memory() -> float:
    """Anonymous memory of this process in GB."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / 1e9


def drop_from_page_cache(folder: Path) -> None:
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def size(folder: Path) -> float:
    """Size of the files in `folder`, in GB."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9


if __name__ == "__main__":
    main()
