# SPDX-License-Identifier: Apache-2.0
"""The examples run as they are, on the embedded model."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hub_server import HubServer


pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
TOPICS = json.loads((EXAMPLES / "training" / "tiny_chatglm_qa.json").read_text(encoding="utf-8"))["topics"]
ANSWERS = {
    question: topic[language]["answer"]
    for topic in TOPICS.values()
    for language in topic
    if language in ("zh", "en")
    for question in topic[language]["questions"]
}
HELLO = f"你好\n  {ANSWERS['你好']}\n"
OPENVINO = f"What is OpenVINO?\n  {ANSWERS['What is OpenVINO?']}\n"
TOKEN = "hf_aTokenThatMustNotBeSeen"


@cache
def run(example, *arguments, **changes):
    """Runs an example in another process, where nothing but what it prints goes to stdout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", **changes}
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300)


@pytest.mark.parametrize(
    "example, expected",
    [
        ("quickstart.py", [HELLO, OPENVINO]),
        (
            "streaming_chat.py",
            [HELLO, f"谢谢\n  {ANSWERS['谢谢']}\n", "What is OpenVINO?\n", ANSWERS["What is OpenVINO?"]],
        ),
        (
            "batch_and_beams.py",
            [HELLO, OPENVINO, f"谢谢你！\n  {ANSWERS['谢谢你！']}\n", "(the two best of four beams)\n"],
        ),
        ("text_generation_pipeline.py", [HELLO, OPENVINO]),
    ],
)
def test_example(example, expected):
    done = run(example)
    assert done.returncode == 0, done.stderr
    for text in expected:
        assert text in done.stdout


def test_the_best_beam_is_the_answer():
    done = run("batch_and_beams.py")
    best, second = done.stdout.split("(the two best of four beams)\n")[1].splitlines()
    assert best.strip() == ANSWERS["What is OpenVINO?"]
    assert second != best


def test_push_to_hub(tmp_path):
    with HubServer() as hub:
        hub.users[TOKEN] = "user"
        arguments = ("user/tiny-chatglm3-ov", "--private", "--endpoint", hub.endpoint)
        done = run(
            "push_to_hub.py",
            *arguments,
            HF_HOME=str(tmp_path),
            HF_TOKEN=TOKEN,
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
        )
        assert done.returncode == 0, done.stderr
        assert hub.repositories["user/tiny-chatglm3-ov"].private
        assert "openvino_model.bin" in hub.repositories["user/tiny-chatglm3-ov"].find("main").files
    assert done.stdout.startswith("Uploaded: ")
    assert done.stdout.endswith(HELLO)
    assert TOKEN not in done.stdout + done.stderr


def test_push_to_hub_without_a_token(tmp_path):
    changes = {"HF_HOME": str(tmp_path), "HF_TOKEN": "", "HF_TOKEN_PATH": str(tmp_path / "no_token")}
    done = run("push_to_hub.py", "user/name", **changes)
    assert done.returncode == 1
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr
