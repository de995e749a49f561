# SPDX-License-Identifier: Apache-2.0
"""An IR that holds the fused attention operation: exported, loaded, saved, and refused where it cannot run."""

import textwrap

import numpy as np
import openvino as ov
import pytest
from conftest import DATA, EXACT, Golden
from optimum.intel import OVModelForCausalLM

from optimum_chatglm_ov import OVChatGLMForCausalLM, export_model
from optimum_chatglm_ov.cli.main import main
from optimum_chatglm_ov.native import is_fused
from optimum_chatglm_ov.native.fuse_attention import cache_layout


NAMES = (
    "chatglm-6b-3layer-untied",
    "chatglm2-6b",
    "chatglm3-6b",
    "glm-4-9b-chat",
    "glm",
    "glm4",
    "chatglm-6b-ptuning-v2",
    "chatglm2-6b-ptuning-v2",
)
# the precision of the caches is the IR's own
SETTINGS = {name: value for name, value in EXACT.items() if name != "KV_CACHE_PRECISION"}


@pytest.fixture(scope="module")
def fused_ir(tmp_path_factory, checkpoint):
    folders = {}

    def export(name, kv_cache_precision="f32"):
        if (name, kv_cache_precision) not in folders:
            output = tmp_path_factory.mktemp("fused") / name
            folders[name, kv_cache_precision] = export_model(
                checkpoint(name), output, attention="fused", kv_cache_precision=kv_cache_precision
            )
        return folders[name, kv_cache_precision]

    return export


def run(python, script, *arguments, **changes):
    """In a process of its own, whose OpenVINO does not know the operation yet."""
    return python.run(["-c", textwrap.dedent(script), *arguments], env=python.environment(**changes))


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, fused_ir, tmp_path):
    golden = Golden(name)
    model = OVChatGLMForCausalLM.from_pretrained(fused_ir(name), ov_config=SETTINGS)
    model.save_pretrained(tmp_path / "saved")
    again = OVChatGLMForCausalLM.from_pretrained(tmp_path / "saved", attention="fused", ov_config=EXACT)
    for case in ("batch", "single"):
        for loaded in (model, again):
            ids = loaded.generate(**golden.inputs(case), max_new_tokens=24, do_sample=False)
            np.testing.assert_array_equal(ids.numpy(), golden[f"greedy_{case}"])
        beams = again.generate(**golden.inputs(case), max_new_tokens=16, num_beams=3, do_sample=False)
        np.testing.assert_array_equal(beams.numpy(), golden[f"beam_{case}"])
    assert is_fused(tmp_path / "saved" / "openvino_model.xml")
    assert "| Attention | native" in (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")


def test_saved_model_stays_portable(exported, tmp_path):
    model = OVChatGLMForCausalLM.from_pretrained(exported("chatglm3-6b"), attention="fused", ov_config=EXACT)
    model.save_pretrained(tmp_path / "saved")
    assert not is_fused(tmp_path / "saved" / "openvino_model.xml")
    assert "| Attention |" not in (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")


def test_loaders_register_the_operation(fused_ir, python):
    script = """
        import sys
        import optimum_chatglm_ov
        from transformers import AutoModelForCausalLM, pipeline
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        print(type(model).__name__, model.engine.state.layout.cache_precision)
        generator = pipeline("text-generation", model=sys.argv[1])
        print(len(generator("你好", max_new_tokens=3, min_new_tokens=3, do_sample=False)))
    """
    done = run(python, script, fused_ir("chatglm3-6b", "u8"))
    assert done.stdout.split() == ["OVChatGLMForCausalLM", "i8", "1"], done.stderr


@pytest.mark.parametrize(
    "weight_format, precision, of_caches",
    [("int8", "u8", "i8"), ("int4", "u8", "i8"), ("int8", "f16", "bf16"), ("int8", "f32", "f32")],
)
def test_command(weight_format, precision, of_caches, tmp_path, capsys):
    output = tmp_path / "ir"
    options = ["--weight-format", weight_format, "--attention", "fused", "--kv-cache-precision", precision]
    assert main(["export", str(DATA / "models" / "chatglm3-6b"), str(output), *options]) == 0
    model = OVChatGLMForCausalLM.load_model(output / "openvino_model.xml")
    assert cache_layout(model).cache_precision == of_caches
    arguments = ["--model", str(output), "--prompt", "x", "--greedy", "--max-new-tokens", "2"]
    assert main(["chat", *arguments]) == 0 and "[2 tokens, " in capsys.readouterr().err
    assert main(["chat", *arguments, "--attention", "sdpa"]) == 1
    assert "`attention='openvino'` is not for this IR" in capsys.readouterr().err


def test_kv_cache_precision_is_of_fused_ir_alone(tmp_path, capsys):
    arguments = ["export", str(DATA / "models" / "chatglm3-6b"), str(tmp_path / "ir"), "--kv-cache-precision", "u8"]
    assert main(arguments) == 2
    assert "--kv-cache-precision: only with --attention native" in capsys.readouterr().err
    for attention, precision, message in (
        ("sdpa", "u8", "for `attention='native'` alone"),
        ("fused", "u4", "is 'u4'; expected one of bf16"),
        ("paged", None, "`attention` is 'paged'; expected"),
    ):
        with pytest.raises(ValueError, match=message):
            export_model(
                DATA / "models" / "chatglm3-6b", tmp_path / "ir", attention=attention, kv_cache_precision=precision
            )
    assert not list(tmp_path.iterdir())


def test_cache_precision(fused_ir):
    for precision, also in (("bf16", "f16"), ("u8", "u8")):
        for ov_config in ({}, {"KV_CACHE_PRECISION": also}):
            model = OVChatGLMForCausalLM.from_pretrained(fused_ir("chatglm3-6b", precision), ov_config=ov_config)
            assert model.engine.state.layout.cache_precision == {"bf16": "bf16", "u8": "i8"}[precision]
    with pytest.raises(ValueError, match="is 'u8', but this IR .* a cache in bf16.*kv_cache_precision='u8'"):
        OVChatGLMForCausalLM.from_pretrained(fused_ir("chatglm3-6b", "bf16"), ov_config={"KV_CACHE_PRECISION": "u8"})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"attention": "sdpa"}, "`attention='openvino'` is not for this IR"),
        ({"compile_only": True}, "`compile_only` is not for this IR"),
        ({"load_in_8bit": True}, "`load_in_8bit` is not for this IR"),
        ({"quantization_config": {"bits": 4}}, "`quantization_config` is not for this IR"),
        ({"device": "auto"}, "run on CPU, not on AUTO. Take a portable IR"),
    ],
)
def test_what_a_fused_ir_is_not_for(arguments, message, fused_ir):
    with pytest.raises(ValueError, match=message):
        OVChatGLMForCausalLM.from_pretrained(fused_ir("chatglm3-6b"), **arguments)


def test_choice_by_environment(fused_ir, monkeypatch):
    monkeypatch.setenv("CHATGLM_OV_ATTENTION", "sdpa")
    with pytest.raises(ValueError, match="`CHATGLM_OV_ATTENTION=openvino` is not for this IR"):
        OVChatGLMForCausalLM.from_pretrained(fused_ir("chatglm3-6b"))


def test_without_a_compiler(fused_ir, tmp_path, python):
    script = """
        import sys
        from optimum_chatglm_ov import OVChatGLMForCausalLM, export_model
        for load in (
            lambda: OVChatGLMForCausalLM.from_pretrained(sys.argv[1]),
            lambda: export_model(sys.argv[2], sys.argv[3], attention="fused"),
        ):
            try:
                load()
            except Exception as error:
                print(type(error).__name__, error)
    """
    changes = {"PATH": "", "CXX": "", "CHATGLM_OV_CACHE": str(tmp_path / "cache")}
    done = run(python, script, fused_ir("chatglm3-6b"), DATA / "models" / "chatglm3-6b", tmp_path / "ir", **changes)
    loading, exporting = done.stdout.splitlines()
    assert "NativeBuildError" in loading and "holds native operations and cannot run without" in loading
    assert exporting.startswith("NativeBuildError no C++ compiler found")
    assert not (tmp_path / "ir").exists()


def test_other_programs_refuse(fused_ir):
    """They do not know the caches, so there is nothing to fall back to."""
    folder = fused_ir("chatglm3-6b")
    with pytest.raises(RuntimeError, match="unsupported opset: optimum_chatglm_ov"):
        ov.Core().read_model(folder / "openvino_model.xml")
    OVChatGLMForCausalLM.load_model(folder / "openvino_model.xml")  # changes nothing for optimum-intel
    with pytest.raises(RuntimeError, match="unsupported opset: optimum_chatglm_ov"):
        OVModelForCausalLM.from_pretrained(folder)
