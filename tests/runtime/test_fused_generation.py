# SPDX-License-Identifier: Apache-2.0
"""Which attention a model is compiled with, and what happens where the package's own cannot be."""

import logging
import shutil
import textwrap
from pathlib import Path

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from conftest import EXACT, Golden

from optimum_chatglm_ov import OVChatGLMForCausalLM
from optimum_chatglm_ov.cli.main import main
from optimum_chatglm_ov.runtime.engine import FusedEngine, StatefulEngine


def greedy(model, name):
    return model.generate(**Golden(name).inputs("single"), max_new_tokens=24, do_sample=False).numpy()


@pytest.mark.parametrize("cache_precision", ["bf16", "u8"])
@pytest.mark.parametrize("attention", ["fused", "sdpa"])
@pytest.mark.parametrize("name", ["chatglm-6b-ptuning-v2", "chatglm2-6b-32k", "chatglm3-6b-128k", "glm-4-9b-chat"])
def test_long_prompts_in_bf16(name, attention, cache_precision, exported, exact_model):
    # bf16 has no odd numbers beyond 256: positions must not pass through it
    exact = exact_model(name)
    properties = {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": cache_precision}
    model = OVChatGLMForCausalLM.from_pretrained(exported(name), attention=attention, ov_config=properties)
    for length in (40, 600, 1500):
        prompt = torch.randint(5, 500, (1, length), generator=torch.Generator().manual_seed(length))
        if model.config.architecture == "chatglm":
            prompt[0, -20:-18] = torch.tensor([model.config.gmask_token_id, model.config.bos_token_id])
        expected, found = (m(prompt).logits[0, -16:] for m in (exact, model))
        assert (found - expected).norm() / expected.norm() < 0.05, length


def test_choice_of_attention(exported, monkeypatch, caplog):
    folder = exported("chatglm3-6b")
    with pytest.raises(ValueError, match="'openvino', 'native' or 'auto'"):
        OVChatGLMForCausalLM.from_pretrained(folder, attention="flash")
    monkeypatch.delenv("CHATGLM_OV_ATTENTION", raising=False)
    with caplog.at_level(logging.INFO, logger="optimum_chatglm_ov"):
        for attention, is_fused in ((None, True), ("auto", True), ("fused", True), ("sdpa", False)):
            model = OVChatGLMForCausalLM.from_pretrained(folder, attention=attention)
            assert isinstance(model.engine, FusedEngine) == is_fused
    monkeypatch.setenv("CHATGLM_OV_ATTENTION", "sdpa")
    assert isinstance(OVChatGLMForCausalLM.from_pretrained(folder).engine, StatefulEngine)
    assert isinstance(OVChatGLMForCausalLM.from_pretrained(folder, attention="fused").engine, FusedEngine)
    assert not caplog.records


def test_an_ir_compiled_as_it_is(exported, caplog):
    folder = exported("chatglm3-6b")
    model = OVChatGLMForCausalLM.from_pretrained(folder, compile_only=True, ov_config=EXACT)
    assert isinstance(model.engine, StatefulEngine) and not caplog.records
    np.testing.assert_array_equal(greedy(model, "chatglm3-6b"), Golden("chatglm3-6b")["greedy_single"])
    with pytest.raises(ValueError, match="Leave one out"):
        OVChatGLMForCausalLM.from_pretrained(folder, compile_only=True, attention="fused")


def test_another_device(exported, caplog):
    folder = exported("chatglm3-6b")
    model = OVChatGLMForCausalLM.from_pretrained(folder, device="auto:cpu", ov_config=EXACT)
    assert isinstance(model.engine, StatefulEngine)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    np.testing.assert_array_equal(greedy(model, "chatglm3-6b"), Golden("chatglm3-6b")["greedy_single"])
    model.to("cpu")
    model.compile()
    assert isinstance(model.engine, FusedEngine)
    with pytest.raises(ValueError, match="run on CPU, not on AUTO"):
        OVChatGLMForCausalLM.from_pretrained(folder, device="auto", attention="fused")


def test_what_fused_attention_does_not_know(exported, tmp_path, caplog):
    """By default OpenVINO's own and one warning, by choice an error."""
    other = ov.Core().read_model(exported("chatglm3-6b") / "openvino_model.xml")
    attention = next(op for op in other.get_ops() if op.get_type_name() == "ScaledDotProductAttention")
    attention.input(3).replace_source_output(ops.multiply(attention.input_value(3), np.float32(1)).output(0))
    shutil.copytree(exported("chatglm3-6b"), tmp_path / "other", ignore=shutil.ignore_patterns("*.xml", "*.bin"))
    ov.save_model(other, tmp_path / "other" / "openvino_model.xml", compress_to_fp16=False)
    for folder, changes, message in (
        (tmp_path / "other", {}, "different attention masks"),
        (exported("chatglm3-6b"), {"KV_CACHE_PRECISION": "u4"}, "KV_CACHE_PRECISION is 'u4'; fused attention has"),
    ):
        caplog.clear()
        model = OVChatGLMForCausalLM.from_pretrained(folder, ov_config=EXACT | changes)
        (record,) = caplog.records
        assert isinstance(model.engine, StatefulEngine) and message in record.getMessage()
        assert greedy(model, "chatglm3-6b").shape == Golden("chatglm3-6b")["greedy_single"].shape
        with pytest.raises(ValueError, match=message):
            OVChatGLMForCausalLM.from_pretrained(folder, attention="fused", ov_config=EXACT | changes)


@pytest.mark.parametrize("precision, of_caches", [("u8", "i8"), (ov.Type.u8, "i8"), ("f16", "bf16"), ("f32", "f32")])
def test_cache_precision(precision, of_caches, exported):
    model = OVChatGLMForCausalLM.from_pretrained(exported("chatglm3-6b"), ov_config={"KV_CACHE_PRECISION": precision})
    assert model.engine.state.layout.cache_precision == of_caches


def test_without_a_compiler(exported, tmp_path, python):
    script = textwrap.dedent(
        """
        import sys, torch
        from optimum_chatglm_ov import OVChatGLMForCausalLM
        model = OVChatGLMForCausalLM.from_pretrained(sys.argv[1])
        print("auto:", model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False).shape)
        try:
            OVChatGLMForCausalLM.from_pretrained(sys.argv[1], attention="fused")
        except Exception as error:
            print("fused:", type(error).__name__)
        """
    )
    environment = python.environment(PATH="", CHATGLM_OV_CACHE=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    for name in ("CXX", "CHATGLM_OV_ATTENTION"):
        environment.pop(name, None)
    done = python.run(["-c", script, exported("chatglm3-6b")], env=environment)
    assert done.stdout.splitlines() == ["auto: torch.Size([1, 5])", "fused: NativeBuildError"], done.stderr
    assert done.stderr.count("OpenVINO's own attention and linear layers are used") == 1


def test_build_native_command(capsys):
    assert main(["build-native"]) == 0
    path, *kernels = capsys.readouterr().out.strip().splitlines()
    assert Path(path).is_file() and len(kernels) == 2 and all("portable" in line for line in kernels)
