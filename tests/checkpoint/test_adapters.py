# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters merged at the export against the sum computed in torch, and against PEFT itself."""

import json
import math
import os
import shutil

import numpy as np
import openvino as ov
import peft
import pytest
import torch
from conftest import DATA, EXACT, Golden
from reference import TinyChatGLM, read_state_dict
from safetensors.torch import load_file, save_file

from optimum_chatglm_ov import ChatGLMConfig, CheckpointError, OVChatGLMForCausalLM, export_model
from optimum_chatglm_ov.architectures.registry import architecture_of
from optimum_chatglm_ov.checkpoint.adapters import adapter_targets, merge_adapters
from optimum_chatglm_ov.checkpoint.checkpoint import Checkpoint


MODEL = DATA / "models" / "chatglm3-6b"
EMBEDDING, OUTPUT = "transformer.embedding.word_embeddings", "transformer.output_layer"
LAYER = "transformer.encoder.layers.{i}."
SHAPES = {
    "self_attention.query_key_value": (128, 64),
    "self_attention.dense": (64, 64),
    "mlp.dense_h_to_4h": (352, 64),
    "mlp.dense_4h_to_h": (64, 176),
}
CANONICAL = {
    "self_attention.query_key_value": "layers.{i}.self_attn.qkv_proj.weight",
    "self_attention.dense": "layers.{i}.self_attn.o_proj.weight",
    "mlp.dense_h_to_4h": "layers.{i}.mlp.gate_up_proj.weight",
    "mlp.dense_4h_to_h": "layers.{i}.mlp.down_proj.weight",
}


def write_adapter(folder, seed=0, rank=4, targets=tuple(SHAPES), layers=(0, 1, 2), pickled=False, **settings):
    """A folder as PEFT's `save_pretrained` writes it; returns A and B by name of the module."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for i in layers:
        for target in targets:
            rows, columns = SHAPES[target]
            ranks = settings.get("rank_pattern", {})
            own = ranks.get(target.rpartition(".")[2], rank)
            a, b = (torch.randn(shape, generator=generator) * 0.3 for shape in ((own, columns), (rows, own)))
            pairs[LAYER.format(i=i) + target] = a, b
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": tensor
        for module, pair in pairs.items()
        for side, tensor in zip("AB", pair)
    }
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": sorted({target.rpartition(".")[2] for target in targets}),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return pairs


def base_weights():
    tensors = {}
    for file in MODEL.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def merged(adapters, dtype=torch.float32):
    config = ChatGLMConfig.from_pretrained(MODEL)
    tensors = architecture_of(config).tensors()
    return merge_adapters(Checkpoint(MODEL, config, tensors), adapters, config, tensors, dtype)


def check(weights, expected_change):
    """`expected_change(module)` is what must have been added to the linear `module` of the checkpoint."""
    base = base_weights()
    for i in range(3):
        for target in SHAPES:
            module = LAYER.format(i=i) + target
            expected = base[f"{module}.weight"].float() + expected_change(module)
            found = weights[CANONICAL[target].format(i=i)].data
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pickled", [False, True])
def test_one(pickled, tmp_path):
    pairs = write_adapter(tmp_path / "lora", pickled=pickled)
    check(merged([tmp_path / "lora"]), lambda module: 8 / 4 * pairs[module][1] @ pairs[module][0])


def test_several_with_weights(tmp_path):
    first = write_adapter(tmp_path / "first", seed=1)
    second = write_adapter(tmp_path / "second", seed=2, rank=2, targets=["mlp.dense_4h_to_h"], layers=[1])

    def change(module):
        total = 0.7 * 8 / 4 * first[module][1] @ first[module][0]
        if module in second:
            total = total - 1.5 * 8 / 2 * second[module][1] @ second[module][0]
        return total

    check(merged([(tmp_path / "first", 0.7), (tmp_path / "second", -1.5)]), change)


def test_rank_stabilised_scale_and_patterns(tmp_path):
    pairs = write_adapter(
        tmp_path / "lora",
        use_rslora=True,
        rank_pattern={"dense_4h_to_h": 2},
        alpha_pattern={r"layers\.1\.self_attention\.dense": 32},
    )

    def change(module):
        rank = 2 if module.endswith("dense_4h_to_h") else 4
        alpha = 32 if module.endswith("layers.1.self_attention.dense") else 8
        return alpha / math.sqrt(rank) * pairs[module][1] @ pairs[module][0]

    check(merged([tmp_path / "lora"]), change)


def test_rounded_once_to_the_stored_precision(tmp_path):
    write_adapter(tmp_path / "lora")
    exact, rounded = merged([tmp_path / "lora"]), merged([tmp_path / "lora"], dtype=None)
    for name in ("layers.0.self_attn.qkv_proj.weight", "layers.2.mlp.down_proj.weight"):
        assert rounded[name].data.dtype == torch.float16
        torch.testing.assert_close(rounded[name].data, exact[name].data.half(), rtol=0, atol=0)
    assert rounded["norm.weight"].data.dtype == torch.float16


def test_export_holds_the_sum(tmp_path):
    pairs = write_adapter(tmp_path / "lora")
    folder = export_model(MODEL, tmp_path / "ir", weight_format="fp32", adapters=[(tmp_path / "lora", 0.5)])
    constants = {
        node.get_friendly_name(): node.data
        for node in ov.Core().read_model(folder / "openvino_model.xml").get_ops()
        if node.get_type_name() == "Constant"
    }
    module = LAYER.format(i=1) + "mlp.dense_4h_to_h"
    a, b = pairs[module]
    expected = base_weights()[f"{module}.weight"].float() + 0.5 * 8 / 4 * b @ a
    found = constants["layers.1.mlp.down_proj.weight"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6, atol=1e-6)


def test_equal_to_peft(tmp_path):
    """The folder that PEFT writes, and the weights that its own `merge_and_unload` computes."""
    base = base_weights()
    module = torch.nn.Module()
    module.transformer = torch.nn.Module()
    module.transformer.encoder = torch.nn.Module()
    module.transformer.encoder.layers = torch.nn.ModuleList([torch.nn.Module() for _ in range(3)])
    for i, layer in enumerate(module.transformer.encoder.layers):
        for target, (rows, columns) in SHAPES.items():
            parent, name = target.split(".")
            if not hasattr(layer, parent):
                layer.add_module(parent, torch.nn.Module())
            linear = torch.nn.Linear(columns, rows, bias=False)
            linear.weight.data = base[LAYER.format(i=i) + target + ".weight"].float()
            getattr(layer, parent).add_module(name, linear)
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["query_key_value", "dense_4h_to_h"], init_lora_weights=False
    )
    model = peft.get_peft_model(module, settings)
    model.save_pretrained(tmp_path / "lora")
    reference = model.merge_and_unload().transformer.encoder.layers
    weights = merged([tmp_path / "lora"])
    for i, layer in enumerate(reference):
        for target, name in CANONICAL.items():
            expected = layer.get_submodule(target).weight.data
            torch.testing.assert_close(weights[name.format(i=i)].data.float(), expected, rtol=1e-6, atol=1e-6)


def adapted(name, folder):
    """An adapter of all four linears of the second layer of `name`; what it adds to each, by name of the weight."""
    generator = torch.Generator().manual_seed(3)
    tensors, changes = {}, {}
    config = ChatGLMConfig.from_pretrained(DATA / "models" / name)
    targets = adapter_targets(architecture_of(config).tensors())
    for key, weight in read_state_dict(DATA / "models" / name).items():
        module = key.removesuffix(".weight")
        if ".layers.1." in key and module.rpartition(".")[2] in targets and weight.ndim == 2:
            rows, columns = weight.shape
            a, b = (torch.randn(shape, generator=generator) * 0.1 for shape in ((2, columns), (rows, 2)))
            tensors |= {f"base_model.model.{module}.lora_{side}.weight": part for side, part in zip("AB", (a, b))}
            changes[key] = 8 / 2 * b @ a
    assert len(changes) == len(targets)
    write_adapter(folder, rank=2)
    save_file(tensors, folder / "adapter_model.safetensors")
    return changes


def logits(folder, ids):
    return OVChatGLMForCausalLM.from_pretrained(folder, ov_config=EXACT)(ids).logits


@pytest.mark.parametrize("name", ["chatglm2-6b", "chatglm2-flags-mha-layernorm", "chatglm3-6b", "glm-4-9b-chat"])
def test_exported_model_equals_torch(name, tmp_path):
    """From input ids to logits, with the fused query, key and value changed, against the plain definition in torch."""
    changes = adapted(name, tmp_path / "lora")
    reference = TinyChatGLM.from_folder(DATA / "models" / name)
    ids = torch.from_numpy(Golden(name)["single_input_ids"])
    with torch.no_grad():
        plain = reference(ids)
        for key, change in changes.items():
            reference.get_parameter(key).add_(change)
        expected = reference(ids)
    found = logits(
        export_model(DATA / "models" / name, tmp_path / "ir", weight_format="fp32", adapters=[tmp_path / "lora"]), ids
    )
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert (expected - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["query_key_value", "output_layer", "word_embeddings"]},
        {"target_modules": ["dense"], "modules_to_save": ["output_layer", "word_embeddings", "final_layernorm"]},
        {"target_modules": ["word_embeddings"], "modules_to_save": ["query_key_value"]},
        {"target_modules": ["output_layer"], "use_rslora": True, "rank_pattern": {"output_layer": 5}},
    ],
    ids=str,
)
def test_exported_model_equals_peft(settings, tmp_path):
    """Adapters of the embedding and the output layer, and modules trained as a whole, written and computed by PEFT."""
    name = "chatglm2-6b"
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=7, init_lora_weights=False, **settings)
    model = peft.PeftModel(TinyChatGLM.from_folder(DATA / "models" / name), config)
    for key, parameter in model.named_parameters():
        if "modules_to_save" in key:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "lora")
    ids = torch.from_numpy(Golden(name)["single_input_ids"])
    with torch.no_grad():
        expected = model.eval()(ids)
        with model.disable_adapter():
            plain = model(ids)
    folder = export_model(DATA / "models" / name, tmp_path / "ir", weight_format="fp32", adapters=[tmp_path / "lora"])
    torch.testing.assert_close(logits(folder, ids), expected, atol=1e-3, rtol=0)
    assert (expected - plain).abs().max() > 0.1


def test_whole_tensors_with_weights(tmp_path):
    """What is saved as a whole replaces the base's, with a weight in part; the changes of several add up."""
    stored, wholes = f"base_model.model.{OUTPUT}.weight", []
    for seed, folder in enumerate(("first", "second")):
        write_adapter(tmp_path / folder, seed=seed, modules_to_save=["output_layer"])
        file = tmp_path / folder / "adapter_model.safetensors"
        wholes.append(torch.randn(768, 64, generator=torch.Generator().manual_seed(seed)))
        save_file(load_file(file) | {stored: wholes[-1]}, file)
    found = merged([tmp_path / "first"])["lm_head.weight"].data
    assert torch.equal(found, wholes[0])
    found = merged([(tmp_path / "first", 0.25), (tmp_path / "second", 0.5)])["lm_head.weight"].data
    base = base_weights()[f"{OUTPUT}.weight"].float()
    torch.testing.assert_close(found, 0.25 * wholes[0] + 0.5 * wholes[1] + 0.25 * base, rtol=1e-5, atol=1e-5)


def test_a_tied_embedding_is_not_changed_alone(tmp_path):
    write_adapter(tmp_path / "lora")
    tensors = {
        f"base_model.model.transformer.word_embeddings.lora_embedding_{side}": torch.ones(2, 2) for side in "AB"
    }
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="cannot merge transformer.word_embeddings.*its output layer, too"):
        export_model(DATA / "models" / "chatglm-6b", tmp_path / "ir", adapters=[tmp_path / "lora"])


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm-6b-3layer-untied"])
def test_exported_model_equals_a_checkpoint_of_the_sums(name, tmp_path):
    """chatglm-6b: the export of the base and an adapter is that of the sums, computed in torch and saved."""
    source, changes = DATA / "models" / name, adapted(name, tmp_path / "lora")
    (tmp_path / "sums").mkdir()
    for file in source.iterdir():
        if file.suffix not in (".bin", ".safetensors") and "index" not in file.name:
            shutil.copy(file, tmp_path / "sums")
    base = read_state_dict(source)
    torch.save(base | {key: base[key].float() + changes[key] for key in changes}, tmp_path / "sums/pytorch_model.bin")
    ids = torch.from_numpy(Golden(name)["single_input_ids"])
    found = logits(export_model(source, tmp_path / "ir", weight_format="fp32", adapters=[tmp_path / "lora"]), ids)
    expected = logits(export_model(tmp_path / "sums", tmp_path / "sums-ir", weight_format="fp32"), ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (expected - logits(export_model(source, tmp_path / "plain-ir"), ids)).abs().max() > 0.1


@pytest.mark.parametrize("weight_format", ["original", "int8"])
def test_merged_model_runs(weight_format, tmp_path):
    write_adapter(tmp_path / "lora")
    folder = export_model(MODEL, tmp_path / "ir", weight_format=weight_format, adapters=[tmp_path / "lora"])
    ids = torch.arange(1, 9)[None]
    changed = OVChatGLMForCausalLM.from_pretrained(folder, ov_config=EXACT)(ids).logits
    plain = OVChatGLMForCausalLM.from_pretrained(
        export_model(MODEL, tmp_path / "plain", weight_format=weight_format), ov_config=EXACT
    )(ids).logits
    assert torch.isfinite(changed).all()
    assert (changed - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected 'LORA'"),
        ({"r": 0}, "r is 0; expected the rank"),
        ({"r": 5}, r"lora_A \[4, \d+\].*expected \[5, \d+\]"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"modules_to_save": ["output_layer"]}, "modules_to_save in adapter_config.json names 'output_layer'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is true"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens=\[1, 2\] is not supported"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication=.*not supported"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config=.*not supported"),
        ({"r": math.inf}, "r is inf; expected the rank"),
        ({"r": math.nan}, "r is nan; expected the rank"),
        ({"r": 2.5}, "r is 2.5; expected the rank"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan; expected a finite number"),
        ({"alpha_pattern": {"dense": None}}, "alpha_pattern has None for 'dense'; expected a finite number"),
        ({"alpha_pattern": {"dense": math.nan}}, "alpha_pattern has nan for 'dense'; expected a finite number"),
        ({"rank_pattern": {"den(se": 4}}, r"rank_pattern has 'den\(se', which is no regular expression"),
        ({"rank_pattern": ["dense"]}, r"rank_pattern is \['dense'\]; expected an object"),
        ({"rank_pattern": {"dense": 0}}, "rank_pattern has 0 for 'dense'; expected a positive whole number"),
    ],
)
def test_unusable_settings(settings, message, tmp_path):
    write_adapter(tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(CheckpointError, match=message):
        merged([tmp_path / "lora"])


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, "no lora_A and lora_B tensors found"),
        ({"base_model.model.transformer.encoder.layers.3.self_attention.dense.lora_A.weight": (4, 64)}, "layers.3"),
        ({"base_model.model.lm_head.lora_A.weight": (4, 64)}, "cannot merge lm_head.*query_key_value"),
        ({"base_model.model.embedding.lora_embedding_A": (4, 64)}, "cannot merge embedding"),
        ({f"base_model.model.{EMBEDDING}.lora_embedding_A": (4, 768)}, "has only lora_embedding_A"),
        ({f"base_model.model.{EMBEDDING}.lora_A.weight": (4, 768)}, "has only lora_A"),
        (
            {f"base_model.model.{EMBEDDING}.weight": (770, 64)},
            r"\[770, 64\]; expected floating-point numbers \[768, 64\]",
        ),
        ({f"base_model.model.{LAYER.format(i=0)}mlp.dense_4h_to_h.lora_A.weight": (4, 176)}, "has only lora_A"),
    ],
)
def test_unusable_tensors(tensors, message, tmp_path):
    write_adapter(tmp_path / "lora")
    save_file(
        {name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "lora" / "adapter_model.safetensors"
    )
    with pytest.raises(CheckpointError, match=message):
        merged([tmp_path / "lora"])


def test_integers_are_no_adapter(tmp_path):
    write_adapter(tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.int32) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match="layers.0.* has an adapter of torch.int32; expected float32"):
        merged([tmp_path / "lora"])


@pytest.mark.parametrize("pickled", [False, True])
def test_a_file_cut_short(pickled, tmp_path):
    write_adapter(tmp_path / "lora", pickled=pickled)
    file = next((tmp_path / "lora").glob("adapter_model.*"))
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=f"{file.name}: not a readable weight file .*truncated"):
        export_model(MODEL, tmp_path / "ir", adapters=[tmp_path / "lora"])
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


@pytest.mark.parametrize(
    "weight_format, weight, advice",
    [("fp16", 1e6, ", or export with `weight_format` bf16 or fp32."), ("bf16", 1e39, "."), ("fp32", 1e39, ".")],
)
def test_sums_beyond_the_range(weight_format, weight, advice, tmp_path):
    write_adapter(tmp_path / "lora")
    with pytest.raises(CheckpointError, match="add up to values beyond the range") as refused:
        export_model(MODEL, tmp_path / "ir", weight_format=weight_format, adapters=[(tmp_path / "lora", weight)])
    assert str(refused.value).endswith(f"Give the adapters smaller weights{advice}")


def test_not_an_adapter_folder(tmp_path):
    with pytest.raises(CheckpointError, match="adapter_config.json: not found"):
        merged([tmp_path])
    write_adapter(tmp_path / "lora")
    with pytest.raises(CheckpointError, match="adapter_model.safetensors/adapter_config.json: not found"):
        export_model(MODEL, tmp_path / "ir", adapters=[tmp_path / "lora" / "adapter_model.safetensors"])
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no adapter weights found"):
        merged([tmp_path / "lora"])
    (tmp_path / "lora" / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        merged([tmp_path / "lora"])


def test_wrong_arguments(tmp_path):
    write_adapter(tmp_path / "lora")
    with pytest.raises(ValueError, match="expected a list"):
        merged(str(tmp_path / "lora"))
    for weight in (math.nan, "0.5", True, None):
        with pytest.raises(ValueError, match=f"lora: the adapter's weight is {weight!r}; expected a finite number"):
            merged([(tmp_path / "lora", weight)])
    for adapter in ([tmp_path / "lora", 0.5], (tmp_path / "lora",), 0.5, None):
        with pytest.raises(ValueError, match="`adapters` has .*; expected a folder, or a tuple .folder, weight."):
            merged([adapter])


def test_quantised_base_is_refused_and_nothing_written(tmp_path):
    write_adapter(tmp_path / "lora")
    with pytest.raises(CheckpointError, match="quantised.*16-bit checkpoint"):
        export_model(DATA / "models" / "chatglm2-6b-int4", tmp_path / "ir", adapters=[tmp_path / "lora"])
    assert not (tmp_path / "ir").exists()
