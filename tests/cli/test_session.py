# SPDX-License-Identifier: Apache-2.0
"""What `chatglm-ov chat` and `serve` do not compute twice: sessions, prefix caches, drafts from the prompt."""

import re
import stat

import pytest
from conftest import DATA

from optimum_chatglm_ov import OVChatGLMForCausalLM
from optimum_chatglm_ov.cli.conversation import Conversation
from optimum_chatglm_ov.cli.embedded import embedded_model
from optimum_chatglm_ov.cli.main import main
from optimum_chatglm_ov.cli.session import Session
from optimum_chatglm_ov.runtime.engine import FusedEngine, StatefulEngine
from optimum_chatglm_ov.runtime.reuse.files import read_file
from optimum_chatglm_ov.tokenization import load_tokenizer


PRECISE = ("--inference-precision", "f32", "--kv-cache-precision", "f32")
QUESTION = "What is OpenVINO?"


@pytest.fixture
def computed(monkeypatch):
    """Tokens of the calls of all engines."""
    lengths = []
    for engine in (FusedEngine, StatefulEngine):
        run = engine.run

        def counted(self, inputs, run=run):
            lengths.append(inputs["input_ids"].shape[1])
            return run(self, inputs)

        monkeypatch.setattr(engine, "run", counted)
    return lengths


def chat(capsys, *arguments):
    """Answers one prompt; returns what was written."""
    assert main(["chat", *PRECISE, *map(str, arguments)]) == 0
    return capsys.readouterr()


@pytest.mark.parametrize("attention", ["native", "openvino"])
def test_a_session_goes_on_where_it_stopped(tmp_path, capsys, computed, attention):
    file, options = tmp_path / "session", ("--attention", attention, "--max-new-tokens", 12)
    first = chat(capsys, *options, "--session", file, "--prompt", QUESTION).out
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and QUESTION in read_file(file)[1]["history"]
    prompt = computed[0]
    computed.clear()
    second = chat(capsys, *options, "--session", file, "--prompt", "Thanks").out
    assert (computed[0] < prompt + 12) == (attention == "native")
    alone = tmp_path / "again"
    assert chat(capsys, *options, "--session", alone, "--prompt", QUESTION).out == first
    computed.clear()
    tensors = read_file(alone)[0]
    assert bool(tensors) == (attention == "native")
    assert chat(capsys, *options, "--session", alone, "--prompt", "Thanks").out == second
    assert read_file(file)[1]["history"].count("Thanks") == 1


def test_a_session_of_another_model_goes_on_from_its_words(tmp_path, capsys, computed):
    file = tmp_path / "session"
    chat(capsys, "--session", file, "--max-new-tokens", 4, "--prompt", QUESTION)
    computed.clear()
    found = chat(capsys, "--session", file, "--max-new-tokens", 4, "--weight-format", "int8", "--prompt", "Thanks")
    assert "computed again" in found.err and computed[0] > 20
    computed.clear()
    assert (
        "computed again"
        not in chat(
            capsys, "--session", file, "--max-new-tokens", 4, "--weight-format", "int8", "--prompt", "Thanks"
        ).err
    )


@pytest.mark.parametrize("content", [b"my thesis", b""])
def test_another_file_is_not_overwritten(tmp_path, capsys, content):
    file = tmp_path / "thesis.txt"
    file.write_bytes(content)
    assert main(["chat", "--session", str(file), "--prompt", QUESTION]) == 1
    assert "thesis.txt: no whole file of keys and values" in capsys.readouterr().err
    assert file.read_bytes() == content
    assert main(["chat", "--session", str(tmp_path / "no" / "folder"), "--prompt", QUESTION]) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_an_answer_whose_session_cannot_be_written_is_shown(tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    with embedded_model() as ir:
        model = OVChatGLMForCausalLM.from_pretrained(ir)
        session = Session(folder / "session", model)
        conversation = Conversation(model, load_tokenizer(ir), {"do_sample": False}, session)
        folder.rmdir()
        with pytest.raises(OSError, match="folder"):
            conversation.answer(QUESTION)
    assert "OpenVINO" in capsys.readouterr().out


def test_a_prefix_cache_serves_the_next_process(tmp_path, capsys, computed):
    question = QUESTION + " " + "请详细说明。" * 40
    options = ("--prefix-cache", tmp_path / "cache", "--prefix-cache-size", "1GB", "--max-new-tokens", 4)
    first = chat(capsys, *options, "--prompt", question).out
    prompt = computed[0]
    computed.clear()
    assert chat(capsys, *options, "--prompt", question).out == first
    assert prompt > 64 > computed[0]


def test_drafts_from_the_prompt(capsys, computed):
    question = "OpenVINO OpenVINO OpenVINO OpenVINO"
    plain = chat(capsys, "--prompt", question, "--max-new-tokens", 12)
    steps = len(computed)
    computed.clear()
    drafted = chat(capsys, "--prompt-lookup", "--prompt", question, "--max-new-tokens", 12)
    assert drafted.out == plain.out and len(computed) <= steps + 1
    assert max(computed[1:]) > 1
    tokens = [re.search(r"\[(\d+) tokens?", found.err)[1] for found in (plain, drafted)]
    assert tokens[0] == tokens[1] == str(steps)  # drafts that were wrong are none


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prefix-cache-size", "1GB"], 2, "name one with --prefix-cache"),
        (["--prefix-cache", "{tmp}/file"], 1, "prefix_cache: .*file cannot be used"),
        (["--prompt-lookup", "--attention", "openvino"], 1, "takes tokens back, and the key/value cache .* cannot"),
        (["--session", "{tmp}/s", "--web"], 2, "--session and --web"),
    ],
)
def test_errors(tmp_path, capsys, arguments, code, message):
    (tmp_path / "file").write_text("")
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    extra = [] if "--web" in arguments else ["--prompt", QUESTION]
    assert main(["chat", *arguments, *extra]) == code
    assert re.search(message, capsys.readouterr().err)


def test_a_size_that_is_none(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--prefix-cache", "x", "--prefix-cache-size", "much", "--model", str(DATA)])
    assert "'much' is no size" in capsys.readouterr().err
