# SPDX-License-Identifier: Apache-2.0
"""Original checkpoints are read lazily, and damaged or hostile ones are refused with one clear error."""

import json
import os
import pickle
import shutil

import pytest
import torch
from conftest import DATA, in_child, let_others_read
from safetensors.torch import load_file, save_file

from optimum_chatglm_ov import ChatGLMConfig, CheckpointError
from optimum_chatglm_ov.architectures.registry import architecture_of
from optimum_chatglm_ov.checkpoint.checkpoint import Checkpoint
from optimum_chatglm_ov.checkpoint.weights import Derived, Scratch, Weight


def copy(name, tmp_path):
    return shutil.copytree(DATA / "models" / name, tmp_path / name, copy_function=shutil.copyfile)


def open_checkpoint(folder, **arguments):
    config = ChatGLMConfig.from_pretrained(folder)
    return Checkpoint(folder, config, architecture_of(config).tensors(), **arguments)


def one_file(name, tmp_path):
    """A copy of checkpoint `name` with all tensors in one safetensors file, and those tensors."""
    folder = copy(name, tmp_path)
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    return folder, tensors


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_single_file_of_each_kind_and_dtype(kind, dtype, tmp_path):
    folder, tensors = one_file("chatglm3-6b", tmp_path)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    weight = open_checkpoint(folder)["layers.1.mlp.down_proj.weight"]
    assert weight.data.dtype == dtype
    torch.testing.assert_close(weight.data, tensors["transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"])


def test_file_of_old_torch(tmp_path):
    folder, tensors = one_file("chatglm3-6b", tmp_path)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(open_checkpoint(folder)["lm_head.weight"].data, tensors["transformer.output_layer.weight"])


@pytest.mark.parametrize("nest", [(), ("module",), ("state_dict",), ("model_state_dict",), ("state_dict", "module")])
@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "_forward_module.",
        "_fsdp_wrapped_module.",
        "module.",
        "_orig_mod.",
        "base_model.model.",
        "model.",
        "_orig_mod.module.",
    ],
)
def test_names_and_nests_of_training_tools(prefix, nest, tmp_path, caplog):
    folder, tensors = one_file("chatglm3-6b", tmp_path)
    saved = {prefix + name: tensor for name, tensor in tensors.items()}
    for name in reversed(nest):
        saved = {name: saved, "epoch": 3, "step": torch.tensor(7)}
    torch.save(saved, folder / "pytorch_model.bin")
    checkpoint = open_checkpoint(folder)
    assert torch.equal(checkpoint["lm_head.weight"].data, tensors["transformer.output_layer.weight"])
    assert torch.equal(
        checkpoint["layers.1.mlp.down_proj.weight"].data,
        tensors["transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"],
    )
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == bool(prefix or nest)
    assert not prefix or repr(prefix) in found[0]
    assert not nest or repr(".".join(nest)) in found[0]


def test_names_of_wrapped_layers(tmp_path):
    folder, tensors = one_file("chatglm3-6b", tmp_path)
    wrapped = {
        f"_fsdp_wrapped_module.{name}".replace(".layers.1.", ".layers.1._checkpoint_wrapped_module."): tensor
        for name, tensor in tensors.items()
    }
    torch.save(wrapped, folder / "pytorch_model.bin")
    assert torch.equal(
        open_checkpoint(folder)["layers.1.mlp.down_proj.weight"].data,
        tensors["transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"],
    )


def test_prefixed_safetensors_of_chatglm(tmp_path, caplog):
    folder, tensors = one_file("chatglm-6b-3layer-untied", tmp_path)
    save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert torch.equal(open_checkpoint(folder)["lm_head.weight"].data, tensors["lm_head.weight"])
    (record,) = caplog.records
    assert "under 'module.', and are read as if not" in record.getMessage()


def test_one_tensor_under_two_names(tmp_path):
    folder, tensors = one_file("chatglm3-6b", tmp_path)
    norm = "transformer.encoder.final_layernorm.weight"
    save_file(tensors | {f"module.{norm}": tensors[norm].clone()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"'(module.)?{norm}' and '(module.)?{norm}' are both '{norm}'"):
        open_checkpoint(folder)


def test_tensors_are_views_of_the_mapped_file(tmp_path):
    weight = open_checkpoint(DATA / "models" / "chatglm3-6b")["layers.0.self_attn.qkv_proj.weight"]
    rows = weight.rows(slice(16, 32))
    assert rows.data.data_ptr() == weight.data.data_ptr() + 16 * 64 * 2
    pages = [line for line in open("/proc/self/maps") if "model-0000" in line]
    start_and_end = [[int(part, 16) for part in line.split()[0].split("-")] for line in pages]
    assert any(start <= weight.data.data_ptr() < end for start, end in start_and_end)


def test_reordered_rows_go_to_scratch(tmp_path):
    checkpoint = open_checkpoint(DATA / "models" / "glm-4-9b-chat", scratch=Scratch(tmp_path))
    weight = checkpoint["layers.0.self_attn.qkv_proj.weight"]
    index = torch.arange(63, -1, -1).numpy()
    rows = weight.rows(index).data
    assert torch.equal(rows, weight.data[:64].flip(0))
    names = [line for line in open("/proc/self/maps") if str(tmp_path) in line]
    assert any(
        int(line.split("-")[0], 16) <= rows.data_ptr() < int(line.split()[0].split("-")[1], 16) for line in names
    )
    assert not list(tmp_path.iterdir())  # the file has no name: nothing to clean up


def test_all_problems_are_listed_at_once(tmp_path):
    folder, tensors = one_file("chatglm3-6b", tmp_path)
    del tensors["transformer.encoder.layers.0.input_layernorm.weight"]
    tensors["transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"] = torch.zeros(3, 5, dtype=torch.float16)
    tensors["transformer.encoder.layers.2.self_attention.dense.weight"] = torch.zeros(64, 64, dtype=torch.int32)
    tensors["transformer.something.else"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as failure:
        open_checkpoint(folder)
    message = str(failure.value)
    assert str(folder) in message and "4 problems" in message
    for problem in (
        "missing: transformer.encoder.layers.0.input_layernorm.weight [64]",
        "wrong shape: transformer.encoder.layers.1.mlp.dense_4h_to_h.weight is [3, 5], expected [64, 176]",
        "unsupported dtype: transformer.encoder.layers.2.self_attention.dense.weight is torch.int32",
        "surplus: transformer.something.else [2]",
    ):
        assert problem in message


def test_many_problems_are_counted(tmp_path):
    folder = copy("chatglm3-6b", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_layers": 99}))
    with pytest.raises(CheckpointError, match=r"\(\d{3} problems\)(?s:.*)  and \d{3} more$") as failure:
        open_checkpoint(folder)
    assert len(str(failure.value).splitlines()) == 12


def test_no_weights(tmp_path):
    folder = copy("chatglm3-6b", tmp_path)
    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no weights found"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["chatglm3-6b", "chatglm2-6b"])
def test_missing_shard(name, tmp_path):
    folder = copy(name, tmp_path)
    shard = sorted(folder.glob("*-00002-*"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"1 of 3 shards .* missing: {shard.name}"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["chatglm3-6b", "chatglm2-6b"])
@pytest.mark.parametrize("size", [0, 7, 1000, -1000])
def test_truncated_shard(name, size, tmp_path):
    folder = copy(name, tmp_path)
    shard = sorted(folder.glob("*-00001-*"))[0]
    os.truncate(shard, size if size >= 0 else shard.stat().st_size + size)
    with pytest.raises(CheckpointError, match="not a readable weight file") as failure:
        open_checkpoint(folder)
    assert str(shard) in str(failure.value)


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, "a\\b.bin", "C:x.bin", "modeling.py"],
)
def test_hostile_shard_name(shard, tmp_path):
    folder = copy("chatglm3-6b", tmp_path)
    save_file({}, tmp_path / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["transformer.output_layer.weight"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as failure:
        open_checkpoint(folder)
    assert str(index) in str(failure.value)


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 3}', "{}", "\x00"])
def test_damaged_index(content, tmp_path):
    folder = copy("chatglm3-6b", tmp_path)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="not a weight index"):
        open_checkpoint(folder)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_pickled_code_is_not_run(tmp_path):
    folder, tensors = one_file("chatglm3-6b", tmp_path)
    for protocol in (True, False):
        torch.save(
            {**tensors, "bomb": Bomb(tmp_path / "run")},
            folder / "pytorch_model.bin",
            pickle_module=pickle,
            _use_new_zipfile_serialization=protocol,
        )
        with pytest.raises(CheckpointError, match="not a readable weight file") as failure:
            open_checkpoint(folder)
        assert "weights_only" not in str(failure.value)  # torch's advice to switch the protection off
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(value, tmp_path):
    folder, tensors = one_file("chatglm3-6b", tmp_path)
    name = "transformer.encoder.layers.1.self_attention.dense.weight"
    tensors[name][3, 4] = value
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=f"{name}.*NaN or infinity"):
        checkpoint["layers.1.self_attn.o_proj.weight"]


def test_a_download_that_ends_in_zeros(tmp_path, caplog):
    """Programs that reserve the space of a file before they fill it leave zeros where they were stopped."""
    folder = copy("chatglm3-6b", tmp_path)
    shard = next(folder.glob("*-00002-*"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    empty = {name for name, tensor in load_file(shard).items() if not tensor.any() and not name.endswith(".bias")}
    checkpoint = open_checkpoint(folder)
    for _ in range(2):
        for name in checkpoint:
            checkpoint[name]
    warnings = [record.getMessage() for record in caplog.records]
    assert empty and len(warnings) == len(empty)
    assert all(any(f"{shard}: tensor {name!r} is all zeros" in warning for warning in warnings) for name in empty)


@pytest.mark.parametrize("folder", sorted((DATA / "models").iterdir()), ids=lambda folder: folder.name)
def test_no_warning_about_complete_checkpoints(folder, caplog):
    config = ChatGLMConfig.from_pretrained(folder)
    architecture = architecture_of(config)
    checkpoint = Checkpoint(folder, config, architecture.tensors() | architecture.prefix_tensors())
    for name in checkpoint:
        checkpoint[name]
    assert not caplog.records


def test_derived_weights_are_made_once_for_the_parts_of_a_projection():
    """A fused projection is asked for three times, its bias in between: the last matrix is kept, not made again."""
    weights = {name: Weight(torch.ones(shape)) for name, shape in {"a": (2, 3), "b": (2, 3), "bias": (2,)}.items()}
    asked = []

    def double(name, weight):
        asked.append(name)
        return Weight(2 * weight.data)

    derived = Derived(weights, double)
    assert list(derived) == list(weights) and len(derived) == 3 and "a" in derived and "c" not in derived
    for name in ("a", "bias", "a", "bias", "b", "a"):
        assert (derived[name].data == 2).all()
    assert asked == ["a", "bias", "bias", "b", "a"]


def test_no_permission_to_read(tmp_path):
    folder = copy("chatglm3-6b", tmp_path)
    let_others_read(folder)
    shard = sorted(folder.glob("*-00001-*"))[0]
    shard.chmod(0)
    error = in_child(lambda: open_checkpoint(folder), as_nobody=True)
    assert error == f"CheckpointError: {shard}: no permission to read it."
