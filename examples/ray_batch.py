# SPDX-License-Identifier: Apache-2.0
"""Answers a file of prompts on many cores or machines with Ray Data; started again, it does only what is missing.

    pip install "optimum-chatglm-ov[ray]"
    python examples/ray_batch.py prompts.jsonl answers/ --model /models/chatglm3-6b-ov --workers 4 --cores 16

Each line (or row of a Parquet file) has an `id`, and a `prompt` or OpenAI's `messages`. The folder gets files of lines
with `id`, `answer` and `finish_reason` (or `error`). A file is written by one worker for one batch, appears complete
or not at all, and is named by what is in it: whatever a killed worker had done is done again under the same names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from optimum_chatglm_ov.serving.extras import require


require("ray")
import ray  # noqa: E402


class Worker:
    """Answers batches with a model of its own."""

    def __init__(self, folder: str | None, output: str, cores: int, settings: dict[str, Any]):
        from optimum_chatglm_ov.serving.numa import take_cores
        from optimum_chatglm_ov.serving.offline import OfflineModel

        take_cores(cores)
        self._output, self._settings = Path(output), settings
        self._model = OfflineModel(folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = [json.loads(row) for row in batch["row"]]
        answers = self._model.answer([_messages(row) for row in rows], **self._settings)
        lines = [json.dumps({"id": row["id"], **answer}, ensure_ascii=False) for row, answer in zip(rows, answers)]
        name = hashlib.sha256("\n".join(str(row["id"]) for row in rows).encode()).hexdigest()[:24]
        partial = self._output / f".{name}.{os.getpid()}.partial"
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(partial, self._output / f"{name}.jsonl")
        return {"count": [len(rows)]}


def _messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    return row["messages"] if row.get("messages") is not None else [{"role": "user", "content": row["prompt"]}]


def answered(output: Path) -> set[str]:
    """The ids, as JSON, that `output` has answers for."""
    return {
        json.dumps(json.loads(line)["id"])
        for file in output.glob("*.jsonl")
        for line in file.read_text(encoding="utf-8").splitlines()
    }


def run(source: str, output: str, folder: str | None, workers: int, cores: int, batch: int, **settings: Any) -> int:
    """Answers what `output` has no answer for; returns how many prompts those were."""
    Path(output).mkdir(parents=True, exist_ok=True)
    done = answered(Path(output))
    rows = ray.data.read_parquet(source) if source.endswith(".parquet") else ray.data.read_json(source, lines=True)
    rows = rows.map(lambda row: {"id": json.dumps(row["id"]), "row": json.dumps(row)})
    missing = rows.filter(lambda row: row["id"] not in done)
    counts = missing.repartition(target_num_rows_per_block=batch).map_batches(
        Worker,
        fn_constructor_kwargs={"folder": folder, "output": output, "cores": cores, "settings": settings},
        batch_size=batch,
        num_cpus=cores,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    return int(counts.sum("count") or 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help=".jsonl or .parquet")
    parser.add_argument("output", help="folder for the answers")
    parser.add_argument("--model", help="exported folder (default: the tiny model of the package)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cores", type=int, default=1, help="of a worker")
    parser.add_argument("--batch", type=int, default=64, help="prompts that a worker answers at once")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    output = os.path.abspath(args.output)
    settings = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    count = run(os.path.abspath(args.source), output, args.model, args.workers, args.cores, args.batch, **settings)
    print(f"{count} prompts answered, {len(answered(Path(output)))} in {output}")


if __name__ == "__main__":
    main()
