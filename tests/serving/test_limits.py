# SPDX-License-Identifier: Apache-2.0
"""What a server does when too much is asked for, when clients leave, and when it or its engine ends."""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib.util
import os
import re
import runpy
import shutil
import signal
import socket
import time

import httpx
import openai
import pytest
from conftest import COMMAND, DATA, ROOT
from safetensors.torch import load_file, save_file
from serving_support import NAME, engine_options, options, serving

from optimum_chatglm_ov import export_model
from optimum_chatglm_ov.cli.main import main
from optimum_chatglm_ov.serving.admission import Admission, QueueFullError, QueueTimeoutError
from optimum_chatglm_ov.serving.extras import MissingExtraError
from optimum_chatglm_ov.serving.numa import nodes_of_cpus, numa_nodes, warn_of_numa_nodes
from optimum_chatglm_ov.tokenization import load_tokenizer


pytest_plugins = ["serving_support"]

LONG = {"max_tokens": 3000, "temperature": 0}


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """A model with random weights, whose likeliest token never ends a turn."""
    folder = tmp_path_factory.mktemp("random")
    checkpoint = shutil.copytree(DATA / "models" / "chatglm3-6b", folder / "checkpoint")
    ends = list(load_tokenizer(checkpoint).turn_end_ids)
    for shard in checkpoint.glob("*.safetensors"):
        tensors = load_file(shard)
        if "transformer.output_layer.weight" in tensors:
            tensors["transformer.output_layer.weight"][ends] = 0
            save_file(tensors, shard)
    return export_model(checkpoint, folder / "ir")


@pytest.fixture(scope="module", params=["batched", "queue"])
def narrow(request, random_model):
    """A server that computes one answer and lets one wait."""
    limits = {"kind": request.param, "max_running": 1, "max_waiting": 1, "queue_seconds": 0.3}
    with serving(
        random_model, options(max_body=2000, api_key="secret", request_seconds=20), engine_options(**limits)
    ) as running:
        yield running


def wait_for(condition, seconds: float = 10.0) -> None:
    """Waits until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come true"
        time.sleep(0.005)


def generated(server) -> int:
    """Tokens that a server has computed."""
    metrics = httpx.get(f"{server.url}/metrics", headers={"Authorization": "Bearer secret"}).text
    return int(float(re.search(r"^chatglm_generated_tokens_total (\S+)", metrics, re.MULTILINE)[1]))


def test_the_key_is_asked_for(narrow):
    for key in ("wrong", "secret2", "secre", "ключ"):
        response = httpx.get(f"{narrow.url}/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
        assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{narrow.url}/v1/models").status_code == httpx.get(f"{narrow.url}/metrics").status_code == 401
    assert httpx.get(f"{narrow.url}/health").status_code == 200
    assert narrow.client.models.list().data


def test_large_bodies_are_refused(narrow):
    body = b'{"model": "' + b"x" * 3000 + b'"}'
    headers = {"Authorization": "Bearer secret"}
    for content in (body, iter([body])):  # with its length, and in chunks of unknown length
        response = httpx.post(f"{narrow.url}/v1/chat/completions", content=content, headers=headers)
        assert response.status_code == 413 and response.json()["error"]["code"] == "request_too_large"


def test_a_full_queue_and_a_long_wait(narrow):
    stream = narrow.chat("a", stream=True, **LONG)
    next(iter(stream))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(narrow.chat, "b", max_tokens=1)
        wait_for(lambda: narrow.engine.state().waiting == 1)
        with pytest.raises(openai.RateLimitError) as failure:
            narrow.chat("c", max_tokens=1)
        assert failure.value.code == "queue_full" and failure.value.response.headers["retry-after"] == "1"
        with pytest.raises(openai.InternalServerError, match="has waited 0.3 s") as failure:
            waiting.result()
        assert failure.value.status_code == 503
    stream.close()
    wait_for(lambda: narrow.engine.state().running == 0)
    assert narrow.chat("d", max_tokens=2).usage.completion_tokens == 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_computation(narrow, stream):
    before = generated(narrow)
    if stream:
        answer = narrow.chat("a", stream=True, **LONG)
        for _, _ in zip(range(5), answer):
            pass
        answer.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            narrow.client.with_options(timeout=0.2).chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": "a"}], **LONG
            )
    wait_for(lambda: narrow.engine.state().running == 0, 2)
    assert narrow.chat("b", max_tokens=2).choices
    assert generated(narrow) - before < LONG["max_tokens"] / 2


def test_an_answer_that_takes_too_long(random_model):
    with serving(random_model, options(request_seconds=0.2), engine_options()) as running:
        with pytest.raises(openai.InternalServerError, match="longer than 0.2 s") as failure:
            running.chat("a", **LONG)
        assert failure.value.status_code == 504
        with pytest.raises(openai.APIError, match="longer than 0.2 s"):
            list(running.chat("a", stream=True, **LONG))
        wait_for(lambda: running.engine.state().running == 0, 2)
        with socket.create_connection(("127.0.0.1", running.port), timeout=10) as slow:  # whose body never comes
            slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_an_engine_that_is_killed_is_started_again(random_model):
    with serving(random_model, options(), engine_options()) as running:
        alone = running.chat("a", temperature=0, max_tokens=20).choices[0].message.content
        streams = [running.chat(text, stream=True, **LONG) for text in "abc"]
        for stream in streams:
            next(iter(stream))
        os.kill(running.engine.process_id, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(openai.APIError, match="could not be computed: its process ended with -9"):
                list(stream)
        wait_for(lambda: httpx.get(f"{running.url}/health").status_code == 200)
        assert running.chat("a", temperature=0, max_tokens=20).choices[0].message.content == alone
        assert running.engine.state().running == 0


def test_a_cache_that_is_too_small_for_all_at_once(random_model):
    """Answers whose keys and values do not fit together are computed one after the other, and are the same."""
    with serving(random_model, options(), engine_options(cache_tokens=512, max_running=8)) as running:

        def ask(text):
            return running.chat(text, temperature=0, max_tokens=200).choices[0].message.content

        alone = {text: ask(text) for text in "abcdef"}
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            assert dict(zip(alone, pool.map(ask, alone))) == alone
        with pytest.raises(openai.BadRequestError, match="more than the"):
            running.chat("a", max_tokens=600)


def test_a_signal_lets_answers_end(random_model, python):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    arguments = ["serve", "--model", str(random_model), "--port", str(port), "--served-name", NAME]
    reading, writing = os.pipe()
    process = python.start([*COMMAND, *arguments], stderr=writing)
    os.close(writing)
    stderr = open(reading, encoding="utf-8")
    try:
        log = ""
        while "Uvicorn running" not in log:
            line = stderr.readline()
            assert line, log
            log += line
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        messages = [{"role": "user", "content": "私"}]
        assert client.chat.completions.create(model=NAME, messages=messages, max_tokens=3).choices
        settings = {
            "model": NAME,
            "temperature": 0,
            "max_tokens": 1500,
            "messages": [{"role": "user", "content": "a"}],
        }
        alone = client.chat.completions.create(**settings).usage
        stream = client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
        next(iter(stream))
        os.killpg(process.pid, signal.SIGTERM)
        *_, last = stream
        assert last.usage == alone and alone.completion_tokens == 1500
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        log += stderr.read()
        assert process.wait(20) in (0, 143), log
        assert "Uvicorn running on http://127.0.0.1:" in log  # this machine alone
        assert "私" not in log and "Traceback" not in log, log
        assert "engine has stopped" not in log
    finally:
        process.kill()
        stderr.close()


def test_clients_take_turns():
    """One client's first request comes before another's second, whoever came first."""

    async def order() -> list[str]:
        admission, done = Admission(1, 100, 10), []

        async def one(client: str) -> None:
            async with admission.turn(client):
                await asyncio.sleep(0)
                done.append(client)

        await asyncio.gather(*(one(client) for client in "aaaabbc"))
        assert admission.running == admission.waiting == 0
        return done

    assert asyncio.run(order()) == list("aabcaba")


def test_whoever_leaves_the_queue_takes_no_turn():
    async def leave() -> None:
        admission = Admission(1, 2, 0.05)
        async with admission.turn("a"):
            waits = [asyncio.create_task(admission._enter("b")) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError):
                await admission._enter("c")
            waits[0].cancel()
            await asyncio.gather(waits[0], return_exceptions=True)
            assert admission.waiting == 1
            with pytest.raises(QueueTimeoutError):
                await waits[1]
            assert (admission.running, admission.waiting) == (1, 0)
        assert admission.running == 0

    asyncio.run(leave())


def test_threads_on_several_numa_nodes_are_warned_of(tmp_path, caplog):
    for node, cpus in (("node0", "0-3,8"), ("node1", "4-7"), ("node2", "")):
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(cpus + "\n")
    nodes = numa_nodes(tmp_path)
    assert nodes == {0: {0, 1, 2, 3, 8}, 1: {4, 5, 6, 7}}
    assert nodes_of_cpus({1, 2}, nodes) == [0] and nodes_of_cpus({1, 4}, nodes) == [0, 1]
    (tmp_path / "node0" / "cpulist").write_text(f"{min(os.sched_getaffinity(0))}")
    (tmp_path / "node1" / "cpulist").write_text(f"{max(os.sched_getaffinity(0))}")
    warn_of_numa_nodes(tmp_path)
    assert "2 NUMA nodes (0, 1)" in caplog.text


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        (["serve"], "fastapi", "serve"),
        (["serve", "--web"], "gradio", "web"),
        (["chat", "--web"], "gradio", "web"),
    ],
)
def test_a_missing_extra_is_a_line_for_pip(command, package, extra, monkeypatch, capsys):
    _hide(package, monkeypatch)
    assert main(command) == 1
    assert f'{package} not found; install what this needs: pip install "optimum-chatglm-ov[{extra}]"' in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["ray_batch", "ray_serve_app"])
def test_the_examples_need_ray(name, monkeypatch):
    _hide("ray", monkeypatch)
    with pytest.raises(MissingExtraError, match=re.escape('pip install "optimum-chatglm-ov[ray]"')):
        runpy.run_path(ROOT / "examples" / f"{name}.py")


def _hide(package: str, monkeypatch) -> None:
    """Lets `package` not be found."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find_spec(name))


def test_prompts_are_logged_when_asked_for(random_model, caplog):
    caplog.set_level("INFO", "optimum_chatglm_ov.serving.app")
    with serving(random_model, options(log_prompts=True), engine_options(kind="queue")) as running:
        for stream in (False, True):
            caplog.clear()
            answer = running.chat("私", temperature=0, max_tokens=3, stream=stream)
            list(answer)  # to its end
            prompt, answered = (record.getMessage() for record in caplog.records)
            assert prompt.startswith("prompt: ") and "私" in prompt and answered.startswith("answer: ParsedAnswer(")


def test_a_schema_without_grammar_harms_no_other_answer(random_model):
    """openvino-genai learns of it in the midst of a step of all requests."""
    with serving(random_model, options(), engine_options()) as running:

        def ask(seed):
            settings = {"temperature": 1.0, "top_p": 1.0} if seed % 2 else {"temperature": 0}
            return running.chat("a", seed=seed, max_tokens=150, **settings).choices[0].message.content

        alone = [ask(seed) for seed in range(4)]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(ask, seed) for seed in range(4)]
            wait_for(lambda: running.engine.state().running == 4)
            for schema in ({"type": "objekt"}, {"type": "string", "pattern": "(["}, {"enum": []}):
                wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
                with pytest.raises(openai.BadRequestError, match="has no grammar") as failure:
                    running.chat("b", response_format=wanted)
                assert failure.value.param == "response_format"
            assert [answer.result() for answer in answers] == alone
