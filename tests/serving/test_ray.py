# SPDX-License-Identifier: Apache-2.0
"""The Ray examples on a local Ray: they answer, and survive the death of a replica or a worker."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
import ray
from conftest import ROOT

from optimum_chatglm_ov import OVChatGLMForCausalLM
from optimum_chatglm_ov.tokenization import load_tokenizer


pytest_plugins = ["serving_support"]


def example(name: str):
    """A module of examples/, whose functions travel to Ray's processes by value."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    ray.cloudpickle.register_pickle_by_value(module)
    return module


@pytest.fixture(scope="module")
def local_ray():
    """A Ray of this machine alone."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    ray.init(num_cpus=4, include_dashboard=False, logging_level="error", object_store_memory=100 << 20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def answer(tiny):
    """What the model says."""
    model = OVChatGLMForCausalLM.from_pretrained(tiny, attention="sdpa", ov_config={"INFERENCE_PRECISION_HINT": "f32"})
    tokenizer = load_tokenizer(tiny)
    return lambda text: model.chat(tokenizer, text, do_sample=False)[0]


def children(name: str) -> list[int]:
    """Ids of processes whose command line has `name`, of this user's Ray alone."""
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if name in line and "ps -eo" not in line]


def test_replicas_are_replaced(local_ray, answer, tiny):
    from ray import serve

    arguments = {"model": str(tiny), "name": "tiny", "cores": "1", "min_replicas": "2", "max_replicas": "2"}
    serve.start(http_options={"host": "127.0.0.1", "port": 8123})
    serve.run(example("ray_serve_app").app(arguments), name="chat")
    try:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "你好"}], "temperature": 0}
        url = "http://127.0.0.1:8123/v1/chat/completions"

        def ask() -> str:
            return httpx.post(url, json=body, timeout=60).raise_for_status().json()["choices"][0]["message"]["content"]

        assert {ask() for _ in range(8)} == {answer("你好")}
        replicas = children("ServeReplica:chat:chatglm")
        assert len(replicas) == 2
        os.kill(replicas[0], signal.SIGKILL)
        failed = 0
        for _ in range(40):  # clients try again, and get the same answer
            try:
                assert ask() == answer("你好")
            except httpx.HTTPError:
                failed += 1
            time.sleep(0.1)
        assert failed <= 10
        end = time.monotonic() + 60
        while len(set(children("ServeReplica:chat:chatglm")) - {replicas[0]}) < 2:
            assert time.monotonic() < end, "the replica was not replaced"
            time.sleep(0.2)
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as response:
            lines = [line for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]" and len(lines) > 4
    finally:
        serve.shutdown()


def test_batches_lose_and_double_nothing(local_ray, answer, tiny, tmp_path):
    batch = example("ray_batch")
    prompts = {number: f"你好 {number}" if number % 2 else "你好" for number in range(60)}
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers"
    source.write_text("".join(json.dumps({"id": number, "prompt": text}) + "\n" for number, text in prompts.items()))
    arguments = {"source": str(source), "output": str(output), "folder": str(tiny), "cores": 1, "batch": 8}
    settings = {"max_tokens": 32, "temperature": 0}

    def kill_one() -> None:
        while len(list(output.glob("*.jsonl"))) < 2:
            time.sleep(0.01)
        os.kill(children("MapWorker")[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    batch.run(**arguments, workers=2, **settings)
    killer.join(5)
    lines = [json.loads(line) for file in output.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == list(prompts)
    assert {line["answer"] for line in lines if not line["id"] % 2} == {answer("你好")}

    for file in list(output.glob("*.jsonl"))[:3]:
        file.unlink()
    kept = {file.name: file.stat().st_mtime_ns for file in output.glob("*.jsonl")}
    missing = 60 - sum(len(file.read_text().splitlines()) for file in output.glob("*.jsonl"))
    parquet = tmp_path / "prompts.parquet"  # the same prompts, as rows of a table
    ray.data.read_json(str(source), lines=True).to_pandas().to_parquet(parquet)
    assert batch.run(**{**arguments, "source": str(parquet)}, workers=1, **settings) == missing > 0
    assert all((output / name).stat().st_mtime_ns == time_ for name, time_ in kept.items())
    again = [json.loads(line) for file in output.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert sorted(again, key=lambda line: line["id"]) == sorted(lines, key=lambda line: line["id"])
