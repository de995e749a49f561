# SPDX-License-Identifier: Apache-2.0
"""generate() with the package's own attention operation gives the originals' tokens."""

from pathlib import Path

import numpy as np
import pytest
from conftest import EXACT, Golden

from optimum_chatglm_ov import OVChatGLMForCausalLM
from optimum_chatglm_ov.cli.main import main


NAMES = ("chatglm-6b-3layer-untied", "chatglm2-6b", "chatglm2-flags-mha-layernorm", "chatglm3-6b-128k", "glm-4-9b-chat")


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


def test_prefix_models_fall_back(exported, caplog):
    golden = Golden("chatglm2-6b-ptuning-v2")
    model = OVChatGLMForCausalLM.from_pretrained(exported(golden.name), attention="auto", ov_config=EXACT)
    assert model._fused is None and "own attention is used" in caplog.text
    ids = model.generate(**golden.inputs("single"), max_new_tokens=24, do_sample=False)
    np.testing.assert_array_equal(ids.numpy(), golden["greedy_single"])


def test_build_native_command(capsys):
    assert main(["build-native"]) == 0
    path, kernels = capsys.readouterr().out.strip().splitlines()
    assert Path(path).is_file() and "portable" in kernels
