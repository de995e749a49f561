# SPDX-License-Identifier: Apache-2.0
"""What an export writes and refuses, and the contract of its graph."""

import json
import os
import shutil

import openvino as ov
import pytest
from conftest import DATA, content
from random_checkpoint import make
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from optimum_chatglm_ov import ChatGLMConfig, CheckpointError, ExportError, OVChatGLMForCausalLM, export_model
from optimum_chatglm_ov.export.saving import check_size


SOURCE = DATA / "models" / "chatglm3-6b"
SCALE_ESTIMATION = {"bits": 4, "group_size": 32, "scale_estimation": True, "num_samples": 2}
TEXTS = ["The quick brown fox jumps over the lazy dog. "] * 20


@pytest.mark.parametrize("name", ["chatglm-6b-3layer-untied", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"])
def test_exported_folder(name, exported):
    folder = exported(name)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "chatglm" and "auto_map" not in config
    assert AutoTokenizer.from_pretrained(folder)("你好").input_ids == (
        AutoTokenizer.from_pretrained(DATA / "models" / name)("你好").input_ids
    )
    assert not [file.name for file in folder.iterdir() if file.suffix == ".py"]
    model = ov.Core().read_model(folder / "openvino_model.xml")
    inputs = {port.any_name: (port.element_type.get_type_name(), len(port.partial_shape)) for port in model.inputs}
    assert inputs == {
        "input_ids": ("i64", 2),
        "attention_mask": ("i64", 2),
        "position_ids": ("i64", 2),
        "beam_idx": ("i32", 1),
    }
    assert [(port.any_name, port.element_type.get_type_name()) for port in model.outputs] == [("logits", "f32")]
    assert model.get_rt_info(["optimum", "transformers_version"]).value


@pytest.mark.parametrize("weight_format", ["original", "fp16", "fp32", "int8", "int4"])
@pytest.mark.parametrize("architecture", ["chatglm", "chatglm2"])
def test_plugin_fusions(architecture, weight_format, tmp_path):
    source = make(tmp_path / "source", architecture)
    folder = export_model(source, tmp_path / "ir", weight_format=weight_format)
    layers = ChatGLMConfig.from_pretrained(source).num_hidden_layers
    compiled = ov.Core().compile_model(folder / "openvino_model.xml", "CPU")
    nodes = compiled.get_runtime_model().get_ops()
    assert sum(kind(node) == "RoPE" for node in nodes) == 2 * layers
    # The plugin shows `ScaledDotProductAttentionWithKVCache` as an attention node that reorders and returns the cache.
    attention = [node for node in nodes if kind(node) == "ScaledDotProductAttention"]
    assert len(attention) == layers
    for node in attention:
        sources = [port.get_source_output().get_node() for port in node.inputs()]
        assert "beam_idx" in [source.get_friendly_name() for source in sources]
        assert [kind(source) for source in sources].count("MemoryInput") == 2
        assert len(node.outputs()) == 3


def kind(node):
    return node.get_rt_info()["layerType"].value


@pytest.mark.parametrize(
    ("weight_format", "element_type"), [("fp32", "f32"), ("fp16", "f16"), ("bf16", "bf16"), ("original", "bf16")]
)
def test_precision_of_constants(weight_format, element_type, tmp_path):
    folder = export_model(DATA / "models" / "glm-4-9b-chat", tmp_path / "ir", weight_format=weight_format)
    model = ov.Core().read_model(folder / "openvino_model.xml")
    types = {
        op.get_element_type().get_type_name()
        for op in model.get_ops()
        if op.get_type_name() == "Constant" and op.get_friendly_name().endswith("proj.weight")
    }
    assert types == {element_type}


def test_values_beyond_fp16_are_refused(tmp_path):
    source = shutil.copytree(DATA / "models" / "glm-4-9b-chat", tmp_path / "source", copy_function=shutil.copyfile)
    shard = next(source.glob("*-00001-*.safetensors"))
    tensors = load_file(shard)
    name = "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight"
    tensors[name][0, 0] = 1e6
    save_file(tensors, shard)
    with pytest.raises(ExportError, match="bf16, fp32 or int8"):
        export_model(source, tmp_path / "ir", weight_format="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_output_is_a_file(tmp_path):
    (tmp_path / "ir").write_text("mine")
    with pytest.raises(ExportError, match="must be a folder"):
        export_model(SOURCE, tmp_path / "ir")
    assert (tmp_path / "ir").read_text() == "mine"


def test_an_input_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "lora" / "adapter_config.json").mkdir(parents=True)
    with pytest.raises((OSError, CheckpointError), match="adapter_config.json"):
        export_model(SOURCE, tmp_path / "ir", adapters=[tmp_path / "lora"])


def test_parent_is_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match="cannot write to this folder"):
        export_model(SOURCE, tmp_path / "file" / "ir")


def test_the_output_is_tried_before_the_checkpoint_is_looked_for(tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "ir"):
        with pytest.raises(ExportError, match=f"{output}: "):
            export_model("user/no-such-model", output)
    with pytest.raises(OSError, match="user/no-such-model"):
        export_model("user/no-such-model", tmp_path / "new" / "ir")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def weights_were_read(*progress):
    pytest.fail("weights were read")


@pytest.mark.parametrize("statistics", ["file", "file/folder", "/proc/folder"])
def test_statistics_that_cannot_be_written_are_refused_before_weights_are_read(statistics, tmp_path):
    (tmp_path / "file").write_text("mine")
    settings = SCALE_ESTIMATION | {"statistics_path": str(tmp_path / statistics)}
    with pytest.raises(ExportError, match=f"{tmp_path / statistics}: "):
        export_model(SOURCE, tmp_path / "ir", quantization_config=settings, dataset=TEXTS, progress=weights_were_read)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_statistics_are_written(tmp_path):
    settings = SCALE_ESTIMATION | {"statistics_path": str(tmp_path / "new" / "statistics")}
    export_model(SOURCE, tmp_path / "ir", quantization_config=settings, dataset=TEXTS)
    assert (tmp_path / "new" / "statistics" / "statistics_metadata.json").is_file()


def test_texts_without_a_tokenizer_are_refused_before_weights_are_read(tmp_path):
    source = shutil.copytree(SOURCE, tmp_path / "source", copy_function=shutil.copyfile)
    for file in source.glob("token*"):
        file.unlink()
    settings = {"quantization_config": SCALE_ESTIMATION, "dataset": TEXTS}
    with pytest.raises(ValueError, match=f"{source}: no tokenizer files"):
        export_model(source, tmp_path / "ir", **settings, progress=weights_were_read)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_exported_model_is_no_checkpoint(tmp_path):
    folder = export_model(SOURCE, tmp_path / "ir")
    with pytest.raises(CheckpointError, match=f"{folder}: a model that was exported already, without its original"):
        export_model(folder, tmp_path / "again")
    (folder / "openvino_model.bin").unlink()
    with pytest.raises(CheckpointError, match=f"{folder}: an exported model without openvino_model.bin. Copy or"):
        export_model(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_weights_cut_short(tmp_path):
    """As after a full disk that OpenVINO did not notice."""
    folder = export_model(SOURCE, tmp_path / "ir")
    check_size(folder / "openvino_model.xml")
    weights = folder / "openvino_model.bin"
    size = weights.stat().st_size
    os.truncate(weights, size - 1)
    with pytest.raises(ExportError, match=f"only {size - 1} of {size} bytes of the weights were written"):
        check_size(folder / "openvino_model.xml")
    weights.unlink()
    with pytest.raises(ExportError, match=f"only 0 of {size} bytes"):
        check_size(folder / "openvino_model.xml")


def test_progress_counts_every_tensor(tmp_path):
    calls = []
    export_model(SOURCE, tmp_path / "ir", progress=lambda *call: calls.append(call))
    counts = [done for _, done, _ in calls]
    assert counts == list(range(1, calls[-1][2] + 1))


@pytest.mark.parametrize("source", ["chatglm2-6b", "glm-4-9b-chat", "chatglm2-6b-int4"])
def test_original_weights_are_not_written_over(source, tmp_path):
    """Neither by name nor through links; their config.json would be another, and no second export possible."""
    folder = shutil.copytree(DATA / "models" / source, tmp_path / "original", copy_function=shutil.copyfile)
    (tmp_path / "link").symlink_to("original")
    model = OVChatGLMForCausalLM.from_pretrained(folder, compile=False)
    before = content(folder)
    for write in (
        lambda: export_model(folder, folder),
        lambda: export_model(folder, tmp_path / "link"),
        lambda: export_model(tmp_path / "link", folder),
        lambda: export_model(SOURCE, folder),
        lambda: model.save_pretrained(folder),
    ):
        with pytest.raises(ExportError, match=f"original weights {folder}/.*Choose another output folder"):
            write()
    assert content(folder) == before
    assert export_model(folder, folder / "ir").joinpath("openvino_model.xml").is_file()
    assert {name: data for name, data in content(folder).items() if not name.startswith("ir/")} == before


def test_original_weights_beside_an_ir(tmp_path, exported):
    """A folder with both: `export=True` takes the original weights, otherwise the IR is loaded."""
    folder = shutil.copytree(SOURCE, tmp_path / "both", copy_function=shutil.copyfile)
    for file in exported(SOURCE.name).glob("openvino_model.*"):
        shutil.copyfile(file, folder / file.name)
    assert OVChatGLMForCausalLM.from_pretrained(folder, compile=False).model_save_dir == folder
    assert OVChatGLMForCausalLM.from_pretrained(folder, export=True, compile=False).model_save_dir != folder
    assert export_model(folder, tmp_path / "again").joinpath("openvino_model.bin").is_file()


def test_an_export_leaves_nothing_of_an_earlier_one(tmp_path):
    output = tmp_path / "ir"
    export_model(DATA / "models" / "chatglm-6b-3layer-untied", output, weight_format="int8")
    assert {"openvino_config.json", "ice_text.model"} <= set(os.listdir(output))
    export_model(SOURCE, output)
    assert not {"openvino_config.json", "ice_text.model"} & set(os.listdir(output))


def test_output_behind_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    export_model(SOURCE, tmp_path / "link")
    assert (tmp_path / "real" / "openvino_model.xml").is_file() and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_sampling_settings_without_sampling(tmp_path):
    source = shutil.copytree(SOURCE, tmp_path / "source", copy_function=shutil.copyfile)
    (source / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.8, "eos_token_id": 2}')
    output = export_model(source, tmp_path / "ir")
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == [2, 706, 708]
