# SPDX-License-Identifier: Apache-2.0
"""An export is complete or leaves nothing, and the graph keeps its contract."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import openvino as ov
import pytest
from conftest import DATA, in_child, let_others_read
from random_checkpoint import make
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from optimum_chatglm_ov import ChatGLMConfig, CheckpointError, ExportError, OVChatGLMForCausalLM, export_model
from optimum_chatglm_ov.export.saving import check_size


SOURCE = DATA / "models" / "chatglm3-6b"
SCALE_ESTIMATION = {"bits": 4, "group_size": 32, "scale_estimation": True, "num_samples": 2}
TEXTS = ["The quick brown fox jumps over the lazy dog. "] * 20


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


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


def test_failed_export_leaves_the_earlier_one(tmp_path):
    output = export_model(SOURCE, tmp_path / "ir")
    (output / "notes.txt").write_text("mine")
    before = content(output)
    source = shutil.copytree(SOURCE, tmp_path / "source", copy_function=shutil.copyfile)
    os.truncate(next(source.glob("*-00002-*")), 100)
    with pytest.raises(CheckpointError):
        export_model(source, output)
    assert content(output) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ir", "source"]

    export_model(SOURCE, output, weight_format="int8")
    after = content(output)
    assert after["openvino_model.bin"] != before["openvino_model.bin"]
    assert after["notes.txt"] == b"mine"


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


def test_no_write_permission(tmp_path):
    let_others_read(tmp_path)
    (tmp_path / "closed").mkdir(mode=0o555)
    error = in_child(lambda: export_model(SOURCE, tmp_path / "closed" / "ir"), as_nobody=True)
    assert error.startswith(f"ExportError: {tmp_path}/closed/ir: cannot write to this folder")
    assert not list((tmp_path / "closed").iterdir())


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


def _size_limited(limit, arguments):
    """Runs an export in a process whose files cannot grow beyond `limit` bytes, as on a full disk."""
    script = textwrap.dedent(
        """
        import resource, signal, sys
        from optimum_chatglm_ov import ChatGLMError, export_model
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
        try:
            export_model(sys.argv[2], sys.argv[3])
        except ChatGLMError as error:
            print("refused:", error)
        """
    )
    command = [sys.executable, "-c", script, str(limit), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("limit", [1000, 20_000, 200_000])
@pytest.mark.slow
def test_full_disk(limit, tmp_path):
    output = tmp_path / "ir"
    output.mkdir()
    (output / "earlier").write_text("kept")
    done = _size_limited(limit, (SOURCE, output))
    assert "refused:" in done.stdout, done.stdout + done.stderr
    assert content(output) == {"earlier": b"kept"}
    assert [path.name for path in tmp_path.iterdir()] == ["ir"]


@pytest.mark.usefixtures("may_mount")
@pytest.mark.parametrize("kilobytes, weight_format", [(40, "original"), (200, "int8"), (400, "fp32")])
@pytest.mark.slow
def test_full_tmpfs(kilobytes, weight_format, tmp_path):
    """On a real file system without room: the error comes from wherever the space ends, and what was there stays."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = textwrap.dedent(
        f"""
        import os, sys
        from optimum_chatglm_ov import ChatGLMError, export_model
        os.makedirs("{disk}/ir")
        open("{disk}/ir/earlier", "w").write("kept")
        try:
            export_model("{SOURCE}", "{disk}/ir", weight_format=sys.argv[1])
        except ChatGLMError as error:
            print("refused:", error)
        print([(folder, sorted(files)) for folder, _, files in os.walk("{disk}")], open("{disk}/ir/earlier").read())
        """
    )
    mount = f'mount -t tmpfs -o size={kilobytes}k tmpfs {disk} && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, "-c", script, weight_format]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines and lines[0].startswith(f"refused: {disk}"), done.stdout + done.stderr
    assert lines[-1] == f"{[(str(disk), []), (str(disk / 'ir'), ['earlier'])]} kept"


@pytest.mark.usefixtures("may_mount")
@pytest.mark.slow
def test_mount_point_in_a_read_only_folder(tmp_path):
    """As a container has it: nothing can be made beside the output, nor can the output itself be renamed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = (
        f"mount -t tmpfs tmpfs {disk} && mkdir {disk}/ir && mount -t tmpfs tmpfs {disk}/ir"
        f" && mount -o remount,ro {disk} && echo mine >{disk}/ir/notes"
        ' && for format in original int8; do "$@" --weight-format $format; done'
        f" && ls -A {disk}/ir && cp {disk}/ir/openvino_model.bin {tmp_path}"
    )
    export = [sys.executable, "-m", "optimum_chatglm_ov.cli.main", "export", str(SOURCE), f"{disk}/ir"]
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mount, "sh", *export], capture_output=True, text=True)
    output = export_model(SOURCE, tmp_path / "ir", weight_format="int8")
    assert sorted(done.stdout.splitlines()[2:]) == sorted([*os.listdir(output), "notes"]), done.stderr
    assert (tmp_path / "openvino_model.bin").read_bytes() == (output / "openvino_model.bin").read_bytes()


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


@pytest.mark.slow
def test_interrupted_export(tmp_path):
    script = textwrap.dedent(
        """
        import os, signal, sys
        from optimum_chatglm_ov import export_model
        def progress(description, done, total):
            if done == total:
                os.kill(os.getpid(), signal.SIGINT)
        export_model(sys.argv[1], sys.argv[2], progress=progress)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(SOURCE), str(tmp_path / "ir")], capture_output=True, text=True
    )
    assert done.returncode in (-signal.SIGINT, 1) and "KeyboardInterrupt" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_interrupted_compression(tmp_path):
    folder = export_model(SOURCE, tmp_path / "ir")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    script = textwrap.dedent(
        """
        import signal, sys
        import nncf
        from optimum_chatglm_ov import export_model
        compress = nncf.compress_weights
        def interrupted(*args, **kwargs):
            print("compressing")
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            return compress(*args, **kwargs)
        nncf.compress_weights = interrupted
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        export_model(sys.argv[1], sys.argv[2], weight_format="int4")
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(SOURCE), str(folder)], capture_output=True, text=True)
    assert done.returncode in (-signal.SIGINT, 1) and done.stdout == "compressing\n", done.stdout + done.stderr
    assert "KeyboardInterrupt" in done.stderr
    assert list(tmp_path.iterdir()) == [folder]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("when", ["during", "after"])
@pytest.mark.slow
def test_interrupts_and_calibration(when, tmp_path):
    """What NNCF ran to see activations is gone by then, with the stack for signals that OpenVINO had made."""
    script = textwrap.dedent(
        """
        import os, signal, sys, time
        import nncf
        from optimum_chatglm_ov import export_model
        def interrupt():
            os.kill(os.getpid(), signal.SIGINT)
            end = time.monotonic() + 60
            while time.monotonic() < end:
                pass
        compress = nncf.compress_weights
        def interrupted(*args, **kwargs):
            compress(*args, **kwargs)
            interrupt()
        if sys.argv[3] == "during":
            nncf.compress_weights = interrupted
        settings = {"bits": 4, "group_size": 32, "scale_estimation": True, "num_samples": 2}
        export_model(sys.argv[1], sys.argv[2], quantization_config=settings, dataset=["The quick brown fox. "] * 20)
        interrupt()
        """
    )
    command = [sys.executable, "-c", script, str(SOURCE), str(tmp_path / "ir"), when]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (-signal.SIGINT, 1) and "KeyboardInterrupt" in done.stderr, done.stderr
    assert os.listdir(tmp_path) == ([] if when == "during" else ["ir"])


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
