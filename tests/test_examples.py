# SPDX-License-Identifier: Apache-2.0
"""The examples run as they are, on the embedded model."""

import functools
import json

import pytest
from conftest import ROOT
from hub_server import HubServer


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


@pytest.fixture(scope="module")
def run(python):
    """Runs an example in another process, where nothing but what it prints goes to stdout."""

    @functools.cache
    def run(example, *arguments, fresh=False, **changes):
        environment = python.environment(**changes, **({"PYTHONUTF8": "1"} if fresh else {}))
        return python.run([EXAMPLES / example, *arguments], env=environment, fresh=fresh)

    return run


@pytest.mark.parametrize(
    "example, expected, fresh",
    [
        ("quickstart.py", [HELLO, OPENVINO], False),
        (
            "streaming_chat.py",
            [HELLO, f"谢谢\n  {ANSWERS['谢谢']}\n", "What is OpenVINO?\n", ANSWERS["What is OpenVINO?"]],
            False,
        ),
        (
            "batch_and_beams.py",
            [HELLO, OPENVINO, f"谢谢你！\n  {ANSWERS['谢谢你！']}\n", "(the two best of four beams)\n"],
            False,
        ),
        pytest.param("text_generation_pipeline.py", [HELLO, OPENVINO], True, marks=pytest.mark.slow),
    ],
)
def test_example(example, expected, fresh, run):
    done = run(example, fresh=fresh)
    assert done.returncode == 0, done.stderr
    for text in expected:
        assert text in done.stdout


def test_the_best_beam_is_the_answer(run):
    done = run("batch_and_beams.py", fresh=False)
    best, second = done.stdout.split("(the two best of four beams)\n")[1].splitlines()
    assert best.strip() == ANSWERS["What is OpenVINO?"]
    assert second != best


@pytest.mark.slow
def test_push_to_hub(tmp_path, run):
    with HubServer() as hub:
        hub.users[TOKEN] = "user"
        arguments = ("user/tiny-chatglm3-ov", "--private", "--endpoint", hub.endpoint)
        done = run(
            "push_to_hub.py",
            *arguments,
            fresh=True,
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


def test_push_to_hub_without_a_token(run):
    done = run("push_to_hub.py", "user/name", HF_TOKEN="")
    assert done.returncode == 1
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr
