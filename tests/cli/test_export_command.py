# SPDX-License-Identifier: Apache-2.0
"""The commands `chatglm-ov export` and `optimum-cli export chatglm-ov`."""

import argparse
import json
import os
import signal
import time

import openvino as ov
import pytest
from conftest import COMMAND, DATA, python_path
from transformers import AutoTokenizer

import optimum_chatglm_ov
from optimum_chatglm_ov import OVChatGLMForCausalLM
from optimum_chatglm_ov.cli.export import adapter, add_options, weight_arguments
from optimum_chatglm_ov.cli.main import main
from optimum_chatglm_ov.integrations.recognition import warn_once
from optimum_chatglm_ov.native import is_fused


pytestmark = pytest.mark.usefixtures("unchanged_libraries")
CHATGLM3 = str(DATA / "models" / "chatglm3-6b")


def test_export(tmp_path, capsys):
    output = tmp_path / "output"
    assert main(["export", CHATGLM3, str(output), "--weight-format", "int8"]) == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert capsys.readouterr().out.startswith(f"{output}: ")
    original = json.loads((DATA / "models" / "chatglm3-6b" / "config.json").read_text())
    exported = OVChatGLMForCausalLM.from_pretrained(output, compile=False)
    assert exported.config.num_layers == original["num_layers"]
    assert AutoTokenizer.from_pretrained(output).chatglm_generation == "chatglm3"
    assert json.loads((output / "openvino_config.json").read_text())["quantization_config"]["bits"] == 8


def test_a_terminated_export_leaves_nothing(tmp_path, python):
    output = tmp_path / "new" / "output"
    with open(tmp_path / "printed", "w+b") as printed:
        process = python.start([*COMMAND, "export", CHATGLM3, output], stderr=printed)
        deadline = time.monotonic() + 120
        while not list(output.glob(".*")) and process.poll() is None and time.monotonic() < deadline:
            pass  # `poll` waits for a thousandth of a second
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143, (tmp_path / "printed").read_text()
    (tmp_path / "printed").unlink()
    assert not list(tmp_path.iterdir())


def test_details_of_quantisation_reach_the_model(tmp_path):
    output = tmp_path / "output"
    details = ["--weight-format", "int4", "--group-size", "32", "--sym", "--all-layers"]
    assert main(["export", CHATGLM3, str(output), *details]) == 0
    saved = json.loads((output / "openvino_config.json").read_text())["quantization_config"]
    assert (saved["bits"], saved["group_size"], saved["sym"], saved["all_layers"]) == (4, 32, True, True)


def test_constants_have_the_form_that_was_asked_for(tmp_path):
    """Symmetric integers are signed; the embedding and the output layer are 4-bit when all layers are to be."""
    found = {}
    for name, details in {"default": (), "sym": ("--sym",), "all": ("--all-layers",)}.items():
        output = tmp_path / name
        assert main(["export", CHATGLM3, str(output), "--weight-format", "int4", "--group-size", "32", *details]) == 0
        found[name] = {
            node.get_friendly_name(): (node.get_element_type().get_type_name(), list(node.shape))
            for node in ov.Core().read_model(output / "openvino_model.xml").get_ops()
            if node.get_type_name() == "Constant" and "weight" in node.get_friendly_name()
        }
    linear, ends = "layers.0.mlp.up_proj.weight", ("embed_tokens.weight", "lm_head.weight")
    assert found["default"][linear] == ("u4", [176, 2, 32]) and f"{linear}/zero_point" in found["default"]
    assert found["sym"][linear] == ("i4", [176, 2, 32]) and f"{linear}/zero_point" not in found["sym"]
    assert [found["default"][end] for end in ends] == [("i8", [768, 64])] * 2
    assert [found["all"][end] for end in ends] == [("u4", [768, 2, 32])] * 2


def test_texts_of_the_model_itself_from_the_command_line(tmp_path):
    arguments = ["export", CHATGLM3, str(tmp_path / "output"), "--weight-format", "int4"]
    arguments += ["--scale-estimation", "--group-size", "32"]
    assert main([*arguments, "--dataset", "auto:seq_len=16", "--num-samples", "2"]) == 0
    assert (tmp_path / "output" / "openvino_model.xml").is_file()


def test_trusting_remote_code_has_no_effect(tmp_path, caplog):
    warn_once.cache_clear()
    assert main(["export", CHATGLM3, str(tmp_path / "output"), "--trust-remote-code"]) == 0
    assert f"`trust_remote_code=True` has no effect for {CHATGLM3}" in caplog.text


def parse(*options):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(options)


def test_a_format_alone_is_given_by_name():
    assert weight_arguments(parse()) == {"weight_format": None}
    assert weight_arguments(parse("--weight-format", "int4")) == {"weight_format": "int4"}
    assert weight_arguments(parse("--weight-format", "fp16")) == {"weight_format": "fp16"}


def test_details_refine_the_default_of_the_format():
    of_texts = ("--dataset", "text.txt", "--num-samples", "7", "--quantization-statistics-path", "statistics")
    arguments = parse("--weight-format", "int4", "--ratio", "0.8", "--awq", "--scale-estimation", *of_texts)
    assert weight_arguments(arguments)["dataset"] == "text.txt"
    config = weight_arguments(arguments)["quantization_config"]
    assert config.statistics_path == "statistics"
    assert (config.bits, config.dtype, config.ratio) == (4, "int4", 0.8)
    assert (config.quant_method.value, config.scale_estimation, config.num_samples) == ("awq", True, 7)
    assert config.group_size == optimum_chatglm_ov.export.quantization.refined("int4").group_size
    config = weight_arguments(parse("--weight-format", "int8", "--no-sym"))["quantization_config"]
    assert (config.bits, config.sym) == (8, False)
    config = weight_arguments(parse("--weight-format", "nf4", "--backup-precision", "none"))["quantization_config"]
    assert (config.dtype, config.backup_precision) == ("nf4", "none")


def test_adapters_with_weights(tmp_path):
    (tmp_path / "rank=8").mkdir()
    assert adapter("folder") == "folder"
    assert adapter("folder=0.5") == ("folder", 0.5)
    assert adapter(f"{tmp_path}/rank=8") == f"{tmp_path}/rank=8"
    assert adapter(f"{tmp_path}/rank=8=0.5") == (f"{tmp_path}/rank=8", 0.5)
    assert parse("--adapter", "one", "--adapter", "two=2").adapter == ["one", ("two", 2.0)]


@pytest.mark.slow
def test_optimum_cli_finds_the_command(tmp_path, python):
    paths = python_path(tmp_path / "packages")
    output = tmp_path / "output"
    optimum_cli = ["-c", "from optimum.commands.optimum_cli import main; main()"]
    arguments = ["export", "chatglm-ov", "--model", CHATGLM3, str(output), "--weight-format", "fp16"]
    arguments += ["--attention", "native"]
    environment = python.environment(PYTHONPATH=os.pathsep.join(paths))
    done = python.run([*optimum_cli, *arguments], env=environment, fresh=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{output}: ")
    assert is_fused(output / "openvino_model.xml")
