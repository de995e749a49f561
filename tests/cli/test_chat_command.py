# SPDX-License-Identifier: Apache-2.0
"""The command `chatglm-ov chat`, without a terminal."""

import argparse
import os
import re

import openvino as ov
import pytest
from conftest import COMMAND, DATA
from transformers import AutoTokenizer

from optimum_chatglm_ov import OVChatGLMForCausalLM
from optimum_chatglm_ov.cli import conversation
from optimum_chatglm_ov.cli.arguments import add_runtime_options, runtime_options
from optimum_chatglm_ov.cli.main import main
from optimum_chatglm_ov.tokenization.chat_rules import settled


pytestmark = pytest.mark.usefixtures("unchanged_libraries")
CHATGLM3 = str(DATA / "models" / "chatglm3-6b")


@pytest.mark.slow
def test_one_prompt_through_a_pipe_in_the_c_locale(exported, python):
    folder = exported("chatglm3-6b")
    model, tokenizer = OVChatGLMForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    *_, (expected, _) = model.stream_chat(tokenizer, "你好", max_new_tokens=24, do_sample=False)
    arguments = [*COMMAND, "chat", "--model", folder, "--prompt", "你好", "--greedy", "--max-new-tokens", "24"]
    environment = python.environment(LC_ALL="C", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    environment.pop("PYTHONIOENCODING", None)
    done = python.run(arguments, env=environment, fresh=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected + "\n"
    assert re.fullmatch(r"\[24 tokens, first after [\d.]+ s, then [\d.]+ tokens/s\]\n", done.stderr)


def test_a_conversation_has_history_until_it_is_cleared(exported, python):
    folder = exported("chatglm2-6b")
    model, tokenizer = OVChatGLMForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def answer(query, history):
        *_, last = model.stream_chat(tokenizer, query, history=history, max_new_tokens=8, do_sample=False)
        return last

    first, history = answer("你好", [])
    second, _ = answer("Hello", history)
    third, _ = answer("Hello", [])
    assert second != third
    arguments = [*COMMAND, "chat", "--model", folder, "--greedy", "--max-new-tokens", "8"]
    done = python.run(arguments, "你好\n\nHello\n/clear\n/what\nHello\n/exit\nnever\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{first}\n{second}\n{third}\n"
    assert "/what: unknown" in done.stderr


def test_a_query_in_a_pipe_that_fails(exported, python):
    folder = exported("chatglm3-6b")
    limit = OVChatGLMForCausalLM.from_pretrained(folder, compile=False).config.max_position_embeddings
    arguments = [*COMMAND, "chat", "--model", folder, "--greedy", "--max-new-tokens", "4"]
    done = python.run(arguments, f"{'a b ' * limit}\n你好\n")
    assert done.returncode == 1 and "context length" in done.stderr and done.stdout


def test_an_original_checkpoint_is_exported_first(capsys):
    arguments = ["--prompt", "你好", "--greedy", "--max-new-tokens", "4", "--weight-format", "int8"]
    assert main(["chat", "--model", CHATGLM3, *arguments]) == 0
    printed = capsys.readouterr()
    assert f"chatglm-ov export {CHATGLM3}" in printed.err
    assert "[4 tokens" in printed.err


def test_a_weight_format_for_an_exported_model_is_refused(exported, capsys):
    assert main(["chat", "--model", str(exported("chatglm3-6b")), "--weight-format", "int8", "--prompt", "x"]) == 2
    assert "--weight-format: " in capsys.readouterr().err


@pytest.mark.parametrize("at_terminal", [True, False])
def test_a_prompt_that_is_too_long_does_not_end_the_session(exported, capsys, monkeypatch, at_terminal):
    folder = exported("chatglm3-6b")
    limit = OVChatGLMForCausalLM.from_pretrained(folder, compile=False).config.max_position_embeddings
    queries = iter(["a b " * limit, "你好", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(queries))
    monkeypatch.setattr("sys.stdin.isatty", lambda: at_terminal)
    code = main(["chat", "--model", str(folder), "--greedy", "--max-new-tokens", "4"])
    assert code == (0 if at_terminal else 1)
    printed = capsys.readouterr().err
    assert f"the context length of this model is {limit}" in printed
    assert "[4 tokens" in printed


def test_openvino_options_reach_the_compiled_model(exported):
    parser = argparse.ArgumentParser()
    add_runtime_options(parser)
    options = [
        "--kv-cache-precision",
        "f32",
        "--inference-precision",
        "f32",
        "--dynamic-quantization-group-size",
        "32",
    ]
    loaded = OVChatGLMForCausalLM.from_pretrained(
        exported("chatglm3-6b"), **runtime_options(parser.parse_args(options))
    )
    compiled = loaded.request.get_compiled_model()
    assert compiled.get_property("KV_CACHE_PRECISION") == ov.Type.f32
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == ov.Type.f32
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 32
    fused = runtime_options(parser.parse_args(["--attention", "native", "--linear", "openvino"]))
    model = OVChatGLMForCausalLM.from_pretrained(exported("chatglm3-6b"), **fused)
    assert model.engine.can_crop and model.linear == "openvino"


def test_a_conversation_with_openvino_options(exported, capsys):
    arguments = ["chat", "--model", str(exported("chatglm3-6b")), "--prompt", "x", "--max-new-tokens", "2"]
    assert main([*arguments, "--inference-precision", "f32", "--attention", "native"]) == 0
    assert capsys.readouterr().out
    assert main([*arguments, "--linear", "native"]) == 1
    assert "no int8 or int4 linear layers" in capsys.readouterr().err
    assert main([*arguments, "--device", "NO_SUCH_DEVICE"]) == 1
    message = capsys.readouterr().err
    assert message.startswith('chatglm-ov chat: error: OpenVINO: Device with "NO_SUCH_DEVICE" name is not registered')


def test_a_reader_that_leaves_is_no_error(exported, python):
    arguments = ["chat", "--model", str(exported("chatglm3-6b")), "--greedy", "--max-new-tokens", "4"]
    reading, writing = os.pipe()
    os.close(reading)
    done = python.run([*COMMAND, *arguments, "--prompt", "x"], stdout=writing)
    os.close(writing)
    assert done.returncode == 1
    assert "Error" not in done.stderr


@pytest.mark.parametrize(
    "response, expected",
    [
        ("你好", "你好"),
        ("你好,", "你好"),
        ("one, two ", "one, two"),
        ("half \ufffd", "half"),
        ("训练于[[训练", "训练于"),
        ("a[0] = [1", "a[0] = [1"),
    ],
)
def test_what_may_still_change_is_not_shown(response, expected):
    assert settled(response) == expected


def test_a_message_that_replaces_another_gets_its_own_line(capsys):
    shown = conversation._show("one", "")
    shown = conversation._show("one two", shown)
    assert conversation._show("three", shown) == "three"
    assert capsys.readouterr().out == "one two\nthree"
