# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests: the golden checkpoints and models exported from them."""

from __future__ import annotations

import functools
import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a network by accident
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from optimum_chatglm_ov import OVChatGLMForCausalLM, export_model  # noqa: E402


DATA = Path(__file__).parent / "data"
# Every number as the weights say it: no reduced precision of activations, cache or dynamic quantisation.
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}
FLOATING = (
    "chatglm-6b",
    "chatglm-6b-3layer-untied",
    "chatglm2-6b",
    "chatglm2-6b-32k",
    "chatglm2-flags-mha-layernorm",
    "codegeex2-6b",
    "chatglm3-6b",
    "chatglm3-6b-32k",
    "chatglm3-6b-128k",
    "glm-4-9b-chat",
)


class Golden:
    """What the original implementation computed from one checkpoint."""

    def __init__(self, name: str):
        self.name = name
        self.arrays = np.load(DATA / "model_io" / f"{name}.npz")

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def cases(self, suffix: str, prefix: str = "") -> list[str]:
        """Cases that have both inputs and an array `prefix + case + suffix`."""
        names = [key.removesuffix("_input_ids") for key in self.arrays if key.endswith("_input_ids")]
        return [name for name in names if f"{prefix}{name}{suffix}" in self.arrays]

    def inputs(self, case: str) -> dict[str, torch.Tensor]:
        keys = ("input_ids", "attention_mask", "position_ids")
        return {key: torch.from_numpy(self[f"{case}_{key}"]) for key in keys if f"{case}_{key}" in self}


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Folder of a golden checkpoint exported with its weights as stored."""
    folders: dict[str, Path] = {}

    def export(name: str) -> Path:
        if name not in folders:
            output = tmp_path_factory.mktemp("exported") / name
            folders[name] = export_model(DATA / "models" / name, output)
        return folders[name]

    return export


@pytest.fixture(scope="session")
def exact_model(exported):
    """A golden checkpoint, compiled without any reduced precision, by default with OpenVINO's own attention."""
    models: dict[tuple[str, str], OVChatGLMForCausalLM] = {}

    def load(name: str, attention: str = "sdpa") -> OVChatGLMForCausalLM:
        if (name, attention) not in models:
            model = OVChatGLMForCausalLM.from_pretrained(exported(name), attention=attention, ov_config=EXACT)
            model.generation_config.do_sample = False
            models[name, attention] = model
        return models[name, attention]

    return load


@pytest.fixture(params=["sdpa", "fused"])
def either_model(request, exact_model):
    """`exact_model` with either attention."""
    return functools.partial(exact_model, attention=request.param)
