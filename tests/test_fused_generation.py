# SPDX-License-Identifier: Apache-2.0
"""generate() with the package's own attention operation gives the originals' tokens."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EXACT, Golden

from optimum_chatglm_ov import OVChatGLMForCausalLM
from optimum_chatglm_ov.cli.main import main


NAMES = (
    "chatglm-6b-3layer-untied",
    "chatglm2-6b",
    "chatglm2-flags-mha-layernorm",
    "chatglm3-6b-128k",
    "glm-4-9b-chat",
    "chatglm-6b-ptuning-v2",
    "chatglm2-6b-ptuning-v2",
)


@pytest.mark.parametrize("name", NAMES)
def test_generation(name, exported):
    golden = Golden(name)
    model = OVChatGLMForCausalLM.from_pretrained(exported(name), attention="fused", ov_config=EXACT)
    assert model._fused is not None
    for case in ("batch", "single"):
        inputs = golden.inputs(case)
        greedy = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        np.testing.assert_array_equal(greedy.numpy(), golden[f"greedy_{case}"])
        beams = model.generate(**inputs, max_new_tokens=16, do_sample=False, num_beams=3)
        np.testing.assert_array_equal(beams.numpy(), golden[f"beam_{case}"])


@pytest.mark.parametrize("cache_precision", ["bf16", "u8"])
@pytest.mark.parametrize("attention", ["fused", "sdpa"])
@pytest.mark.parametrize("name", ["chatglm-6b-3layer-untied", "chatglm2-6b-32k", "chatglm3-6b-128k", "glm-4-9b-chat"])
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


def test_saved_model_stays_portable(exported, tmp_path):
    model = OVChatGLMForCausalLM.from_pretrained(exported("chatglm3-6b"), attention="fused", ov_config=EXACT)
    model.save_pretrained(tmp_path / "saved")
    assert "ChatGLMAttention" not in (tmp_path / "saved" / "openvino_model.xml").read_text()


def test_choice_of_attention(exported, monkeypatch):
    folder = exported("chatglm3-6b")
    with pytest.raises(ValueError, match="'sdpa', 'fused' or 'auto'"):
        OVChatGLMForCausalLM.from_pretrained(folder, attention="flash")
    monkeypatch.setenv("CHATGLM_OV_ATTENTION", "auto")
    assert OVChatGLMForCausalLM.from_pretrained(folder)._fused is not None
    assert OVChatGLMForCausalLM.from_pretrained(folder, attention="sdpa")._fused is None


def test_without_a_compiler(exported, tmp_path):
    script = textwrap.dedent(
        """
        import sys, torch
        from optimum_chatglm_ov import OVChatGLMForCausalLM
        model = OVChatGLMForCausalLM.from_pretrained(sys.argv[1], attention="auto")
        print("auto:", model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False).shape)
        try:
            OVChatGLMForCausalLM.from_pretrained(sys.argv[1], attention="fused")
        except Exception as error:
            print("fused:", type(error).__name__)
        """
    )
    environment = {**os.environ, "PATH": "", "CHATGLM_OV_CACHE": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("CXX", None)
    command = [sys.executable, "-c", script, str(exported("chatglm3-6b"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert done.stdout.splitlines() == ["auto: torch.Size([1, 5])", "fused: NativeBuildError"], done.stderr
    assert done.stderr.count("OpenVINO's own attention is used") == 1


def test_build_native_command(capsys):
    assert main(["build-native"]) == 0
    path, kernels = capsys.readouterr().out.strip().splitlines()
    assert Path(path).is_file() and "portable" in kernels
