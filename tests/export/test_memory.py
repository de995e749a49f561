# SPDX-License-Identifier: Apache-2.0
"""An export keeps the checkpoint in its mapped files: anonymous memory holds what it has to compute, and no copies."""

import json

import pytest
from conftest import ROOT
from random_checkpoint import make


pytestmark = pytest.mark.slow
TOOL = ROOT / "tests" / "benchmarks" / "measure_export.py"
SIZES = {
    "chatglm": {"hidden_size": 1024, "inner_hidden_size": 4096, "num_attention_heads": 8, "vocab_size": 24000},
    "chatglm2": {"hidden_size": 1024, "ffn_hidden_size": 2816, "num_attention_heads": 8, "padded_vocab_size": 16000},
}
GIGABYTE = 1e9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random checkpoint of about 200 MB in fp16."""
    folders = {}

    def checkpoint_of(architecture):
        if architecture not in folders:
            folder = tmp_path_factory.mktemp("checkpoint") / architecture
            folders[architecture] = make(folder, architecture, num_layers=6, **SIZES[architecture])
        return folders[architecture]

    return checkpoint_of


@pytest.mark.parametrize(
    "architecture, weight_format, outputs, besides",
    [
        ("chatglm", "original", 0, 0.03),
        ("chatglm", "int8", 1, 0.06),
        ("chatglm2", "bf16", 0, 0.03),
        ("chatglm2", "int8", 1, 0.06),
        ("chatglm2", "int4", 1, 0.06),
    ],
)
def test_anonymous_memory_of_an_export(architecture, weight_format, outputs, besides, checkpoint, tmp_path, python):
    """Next to nothing for floating-point weights, about the output for integers, never a copy of the checkpoint."""
    source = checkpoint(architecture)
    done = python.run([TOOL, source, "--one", weight_format, tmp_path / "ir"])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    written = (tmp_path / "ir" / "openvino_model.bin").stat().st_size / GIGABYTE
    stored = (source / "model.safetensors").stat().st_size / GIGABYTE
    assert stored > 0.19
    growth = found["peak"] - found["imports"]
    assert growth < outputs * written + besides < stored, found
