# SPDX-License-Identifier: Apache-2.0
"""Precision of the weights in the IR: NNCF's formats, and checkpoints that are already quantised."""

import shutil
from collections import Counter

import datasets
import numpy as np
import openvino as ov
import pytest
import torch
from conftest import DATA, EXACT, Golden
from optimum.intel.openvino import OVQuantizer
from optimum.intel.openvino.configuration import OVConfig, OVWeightQuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from optimum_chatglm_ov import ChatGLMConfig, OVChatGLMForCausalLM, export_model
from optimum_chatglm_ov.architectures.registry import architecture_of
from optimum_chatglm_ov.assets import TINY_CHATGLM3
from optimum_chatglm_ov.checkpoint.checkpoint import Checkpoint
from optimum_chatglm_ov.checkpoint.weights import Weight
from optimum_chatglm_ov.errors import CheckpointError, ExportError
from optimum_chatglm_ov.export import quantization
from optimum_chatglm_ov.export.int8 import quantize_rows


CHATGLM3 = DATA / "models" / "chatglm3-6b"
QUANTIZED = ("chatglm-6b-int8", "chatglm-6b-int4", "chatglm2-6b-int8", "chatglm2-6b-int4")
LINEARS = 3 * 7  # q, k, v, o, gate, up and down in three layers
TEXTS = ["The quick brown fox jumps over the lazy dog. ", "今天天气很好，我们去公园散步。"] * 20


def constants(folder):
    """Weight constants of an IR by name, with the group axis of group-wise ones folded: (type, shape)."""
    found = {}
    for node in ov.Core().read_model(folder / "openvino_model.xml").get_ops():
        name = node.get_friendly_name()
        if node.get_type_name() == "Constant" and name.endswith(".weight") and len(node.shape) > 1:
            found[name] = node
    return found


def types_of(folder):
    """Number of weight constants of each type in the linears, and the types of embedding and output layer."""
    types = {name: node.get_element_type().get_type_name() for name, node in constants(folder).items()}
    ends = {types.pop("embed_tokens.weight"), types.pop("lm_head.weight")}
    return Counter(types.values()), ends


# Checkpoints that are already quantised ------------------------------------------------------------------------------


def integers_of(node):
    """The integers of an i4 or i8 constant, int8 `[rows, columns]`."""
    if node.get_element_type() == ov.Type.i8:
        return node.data
    packed = node.data.view(np.int8)  # the even column is in the low half of a byte
    return np.stack(((packed << 4) >> 4, packed >> 4), axis=-1).reshape(tuple(node.shape))


def original_integers(weight):
    if weight.bits == 8:
        return weight.data.numpy()
    return torch.stack((weight.data >> 4, (weight.data << 4) >> 4), dim=-1).flatten(-2).numpy()


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_same_integers_and_scales(name, exported):
    """Every integer and scale of the checkpoint, bit for bit, in an i4 or i8 constant of the IR."""
    config = ChatGLMConfig.from_pretrained(DATA / "models" / name)
    weights = Checkpoint(DATA / "models" / name, config, architecture_of(config).tensors())
    nodes = {
        node.get_friendly_name(): node
        for node in ov.Core().read_model(exported(name) / "openvino_model.xml").get_ops()
        if node.get_type_name() == "Constant"
    }
    expected_type = ov.Type.i4 if config.quantization_bit == 4 else ov.Type.i8
    for i in range(config.num_hidden_layers):
        linears = {"self_attn.o_proj": ["self_attn.o_proj"], "mlp.down_proj": ["mlp.down_proj"]}
        linears["self_attn.qkv_proj"] = [f"self_attn.{part}_proj" for part in "qkv"]
        if config.architecture == "chatglm":
            linears["mlp.up_proj"] = ["mlp.up_proj"]
        else:
            linears["mlp.gate_up_proj"] = ["mlp.gate_proj", "mlp.up_proj"]
        for original, parts in linears.items():
            weight = weights[f"layers.{i}.{original}.weight"]
            assert weight.bits == config.quantization_bit
            found = [nodes[f"layers.{i}.{part}.weight"] for part in parts]
            assert {node.get_element_type() for node in found} == {expected_type}
            integers = np.concatenate([integers_of(node) for node in found])
            scales = np.concatenate([nodes[f"layers.{i}.{part}.weight/scale"].data.ravel() for part in parts])
            wanted, scale = original_integers(weight), weight.scale.numpy()
            if len(parts) == 3:  # rows of queries and keys are reordered for the rotary embedding
                key = [tuple(row) + (value,) for row, value in zip(integers, scales)]
                assert sorted(key) == sorted(tuple(row) + (value,) for row, value in zip(wanted, scale))
            else:
                np.testing.assert_array_equal(integers, wanted)
                np.testing.assert_array_equal(scales, scale)


@pytest.mark.parametrize("name", QUANTIZED)
def test_golden_of_quantised_checkpoints(name, exact_model):
    golden, model = Golden(name), exact_model(name)
    logits = model(torch.from_numpy(golden["single_input_ids"])).logits.numpy()
    np.testing.assert_allclose(logits, golden["single_logits_dequant32"], atol=1e-3, rtol=0)
    for case in golden.cases("", prefix="greedy_"):
        ids = model.generate(**golden.inputs(case), max_new_tokens=24, do_sample=False).numpy()
        np.testing.assert_array_equal(ids, golden[f"greedy_{case}"], err_msg=case)


@pytest.mark.parametrize("weight_format, error", [("fp32", 1e-3), ("fp16", 0.03), ("bf16", 0.6)])
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_named_precision_dequantises(name, weight_format, error, tmp_path, caplog):
    """Integers times scales, rounded once, so not at all to fp32; the log says that the integers are gone."""
    source, golden = DATA / "models" / name, Golden(name)
    folder = export_model(source, tmp_path / "ir", weight_format=weight_format)
    nodes = constants(folder)
    assert {node.get_element_type().get_type_name() for node in nodes.values()} == {weight_format.replace("fp", "f")}
    assert f"become {weight_format}, with the same values" in caplog.text
    config = ChatGLMConfig.from_pretrained(source)
    weight = Checkpoint(source, config, architecture_of(config).tensors())["layers.1.mlp.down_proj.weight"]
    exact = original_integers(weight) * weight.scale.numpy()[:, None].astype(np.float32)
    if weight_format != "bf16":  # which numpy does not have
        found = nodes["layers.1.mlp.down_proj.weight"].data
        np.testing.assert_array_equal(found, exact.astype(found.dtype))
    model = OVChatGLMForCausalLM.from_pretrained(folder, ov_config=EXACT)
    logits = model(torch.from_numpy(golden["single_input_ids"])).logits.numpy()
    np.testing.assert_allclose(logits, golden["single_logits_dequant32"], atol=error, rtol=0)


def test_scales_beyond_fp16_are_refused(tmp_path):
    source = shutil.copytree(DATA / "models" / "chatglm2-6b-int8", tmp_path / "source")
    tensors = torch.load(source / "pytorch_model.bin", weights_only=True)
    name = "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight"
    tensors[name][0, 0], tensors[f"{name}_scale"][0] = 127, 60000
    torch.save(tensors, source / "pytorch_model.bin")
    with pytest.raises(ExportError, match="layers.0.mlp.down_proj.weight: values beyond the range"):
        export_model(source, tmp_path / "ir", weight_format="fp16")
    assert export_model(source, tmp_path / "ir", weight_format="bf16").is_dir()


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"dtype": torch.float32}, "fp32"),
        ({"torch_dtype": "bfloat16"}, "bf16"),
        ({"dtype": torch.float32, "load_in_8bit": False}, "fp32"),
        ({"dtype": torch.float32, "load_in_8bit": True}, "int8"),
        ({"dtype": torch.float32, "quantization_config": {"bits": 4}}, "int4"),
        ({"dtype": "auto"}, "int8"),
        ({"dtype": "auto", "load_in_8bit": False}, "fp16"),
        ({}, "int8"),
    ],
)
def test_a_given_dtype_is_the_precision(arguments, expected, monkeypatch):
    """Also of a model so large that it becomes int8 where nothing is said."""
    monkeypatch.setattr(quantization, "_INT8_BY_DEFAULT_ABOVE", 1000)
    model = OVChatGLMForCausalLM.from_pretrained(CHATGLM3, export=True, compile=False, **arguments)
    assert quantization.weight_precision(model.model) == expected


@pytest.mark.parametrize("dtype", [torch.float64, "int8", "float", 16])
def test_a_dtype_that_weights_cannot_have(dtype):
    with pytest.raises(ValueError, match="`dtype` is .*expected torch.float32, torch.float16, torch.bfl"):
        OVChatGLMForCausalLM.from_pretrained(CHATGLM3, export=True, dtype=dtype)


def test_quantising_a_checkpoint_again_is_refused(tmp_path):
    source = DATA / "models" / "chatglm2-6b-int4"
    for settings in ({"weight_format": "int8"}, {"quantization_config": {"bits": 4}}):
        with pytest.raises(ValueError, match="already quantised"):
            export_model(source, tmp_path / "ir", **settings)
    assert not (tmp_path / "ir").exists()


@pytest.mark.parametrize(
    "name, weight_format, precision",
    [
        ("chatglm2-6b-int4", None, "int4"),
        ("chatglm-6b-int8", None, "int8"),
        ("chatglm3-6b", "int8", "int8"),
        ("chatglm3-6b", "int4", "int4"),
        ("chatglm3-6b", "nf4", "nf4"),
    ],
)
def test_quantising_an_ir_again_is_refused(name, weight_format, precision, tmp_path):
    """By this package, and by whatever goes by the mark that NNCF leaves, such as optimum-intel."""
    folder = export_model(DATA / "models" / name, tmp_path / "ir", weight_format=weight_format)
    for settings in ({"quantization_config": {"bits": 4}}, {"load_in_8bit": True}):
        with pytest.raises(ValueError, match=f"ir: the weights are {precision} already.*export the original"):
            OVChatGLMForCausalLM.from_pretrained(folder, **settings)
    model = OVChatGLMForCausalLM.from_pretrained(folder, compile=False, load_in_8bit=False)
    with pytest.raises(RuntimeError, match="already optimized"):
        OVQuantizer(model).quantize(ov_config=OVConfig(quantization_config=OVWeightQuantizationConfig(bits=8)))


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 8},
        {"bits": 8, "sym": False},
        {"bits": 4},
        {"bits": 4, "all_layers": True, "group_size": 32},
        {"bits": 4, "group_size": 32, "scale_estimation": True, "num_samples": 4, "dataset": TEXTS},
    ],
)
@pytest.mark.parametrize("name", ["chatglm3-6b", "chatglm-6b-3layer-untied"])
def test_an_ir_is_quantised_as_at_the_export(name, settings, exported, tmp_path):
    """The same request gives the same integers in the blocks, and the settings are saved with the model."""
    model = OVChatGLMForCausalLM.from_pretrained(exported(name), quantization_config=dict(settings), ov_config=EXACT)
    model.save_pretrained(tmp_path / "later")
    export_model(DATA / "models" / name, tmp_path / "at once", quantization_config=dict(settings))
    assert types_of(tmp_path / "later") == types_of(tmp_path / "at once")
    later, at_once = constants(tmp_path / "later"), constants(tmp_path / "at once")
    for constant in ("layers.0.self_attn.o_proj.weight", "layers.2.mlp.down_proj.weight"):
        found, expected = (nodes[constant].data.astype(np.int64) for nodes in (later, at_once))
        assert (found != expected).mean() < 0.02  # int8 scales are rounded to fp16 before or after the integers
    saved = [OVConfig.from_pretrained(tmp_path / when).quantization_config.to_dict() for when in ("later", "at once")]
    assert saved[0] == saved[1] and saved[0]["bits"] == settings["bits"] and saved[0]["tokenizer"] is None
    ids = torch.from_numpy(Golden(name)["single_input_ids"])
    expected = OVChatGLMForCausalLM.from_pretrained(tmp_path / "at once", ov_config=EXACT)(ids).logits
    assert (model(ids).logits - expected).abs().mean() < 0.05 * expected.std()


def test_what_is_compiled_only_is_not_quantised(exported):
    with pytest.raises(ValueError, match="`compile_only=True` cannot be quantised"):
        OVChatGLMForCausalLM.from_pretrained(exported("chatglm3-6b"), compile_only=True, load_in_8bit=True)


# NNCF ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weight_format, linears, ends",
    [
        ("fp16", {"f16": LINEARS}, {"f16"}),
        ("bf16", {"bf16": LINEARS}, {"bf16"}),
        ("fp32", {"f32": LINEARS}, {"f32"}),
        ("original", {"f16": LINEARS}, {"f16"}),
        ("int8", {"i8": LINEARS}, {"i8"}),
        # 176 columns: no group of 32 or more divides them, so down_proj gets the backup precision
        ("int4", {"u4": LINEARS - 3, "i8": 3}, {"i8"}),
        ("nf4", {"nf4": LINEARS - 3, "i8": 3}, {"i8"}),
        ("mxfp4", {"f4e2m1": LINEARS - 3, "f16": 3}, {"i8"}),
    ],
)
def test_formats(weight_format, linears, ends, tmp_path):
    """Each weight format gives the linears, the embedding and the output layer the precision it states."""
    folder = export_model(CHATGLM3, tmp_path / "ir", weight_format=weight_format)
    assert types_of(folder) == (linears, ends)


def test_int8_is_symmetric_per_output_channel(tmp_path):
    folder = export_model(CHATGLM3, tmp_path / "ir", weight_format="int8")
    nodes = {node.get_friendly_name(): node for node in ov.Core().read_model(folder / "openvino_model.xml").get_ops()}
    assert not [name for name in nodes if "zero_point" in name]
    weight = Checkpoint(CHATGLM3, ChatGLMConfig.from_pretrained(CHATGLM3), _tensors())["layers.0.mlp.down_proj.weight"]
    integers, scale = (nodes[f"layers.0.mlp.down_proj.weight{end}"].data for end in ("", "/scale"))
    assert scale.shape == (64, 1)
    scale = scale.astype(np.float32)  # negative where the largest weight of the row is positive
    error = np.abs(integers * scale - weight.data.float().numpy())
    assert (error <= 0.51 * np.abs(scale)).all()


def test_int8_rows_are_what_nncf_makes(tmp_path):
    """The same integers but where the scale rounded to fp16 moves a number over the middle of two."""
    settings = {"bits": 8, "sym": True, "ignored_scope": {"names": ["no such node"], "validate": False}}
    reference = constants(export_model(CHATGLM3, tmp_path / "nncf", quantization_config=settings))
    found = constants(export_model(CHATGLM3, tmp_path / "ir", weight_format="int8"))
    assert found.keys() == reference.keys()
    for name, node in found.items():
        difference = node.data.astype(int) - reference[name].data.astype(int)
        assert abs(difference).max() <= 1 and (difference != 0).mean() < 0.02, name


def test_int8_of_unusual_rows():
    """Rows of zeros, of one sign, with tiny and with huge numbers, in any stored precision."""
    rows = torch.zeros(6, 64)
    rows[1], rows[2], rows[3] = 1.0, -3.0, 1e-6
    rows[4, :2], rows[5] = torch.tensor([60000.0, -2.0]), torch.linspace(-1, 2, 64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        weight = Weight(rows.to(dtype))
        found = quantize_rows("rows", weight)
        assert found.bits == 8 and found.data.dtype == torch.int8 and found.scale.dtype == torch.float16
        error = (found.data.float() * found.scale.float()[:, None] - weight.data.float()).abs()
        assert (error <= 0.56 * found.scale.float().abs()[:, None]).all()
    with pytest.raises(CheckpointError, match="lm_head.weight: numbers up to 1e\\+30, too large for int8"):
        quantize_rows("lm_head.weight", Weight(torch.full((2, 64), 1e30)))


def _tensors():
    return architecture_of(ChatGLMConfig.from_pretrained(CHATGLM3)).tensors()


def test_tied_output_layer_shares_its_int8_table(tmp_path):
    folder = export_model(DATA / "models" / "chatglm-6b", tmp_path / "ir", weight_format="int8")
    tables = [node for node in constants(folder).values() if node.shape[0] == 800]
    assert [node.get_element_type() for node in tables] == [ov.Type.i8]


@pytest.mark.parametrize("name", ["chatglm3-6b", "chatglm-6b-3layer-untied"])
def test_int8_stays_close(name, tmp_path, exact_model):
    """int8 rounds each weight by at most 1/254 of its row's largest: the distributions stay nearly the same."""
    golden = Golden(name)
    folder = export_model(DATA / "models" / name, tmp_path / "ir", weight_format="int8")
    ids = torch.from_numpy(golden["single_input_ids"])
    candidate = OVChatGLMForCausalLM.from_pretrained(folder, ov_config=EXACT)(ids).logits.log_softmax(-1)
    reference = exact_model(name)(ids).logits.log_softmax(-1)
    assert (reference.exp() * (reference - candidate)).sum(-1).mean() < 5e-3


def changed(folder, other):
    """Names of the weights that are not the same in two exports of one checkpoint."""
    first, second = constants(folder), constants(other)
    assert first.keys() == second.keys()
    return {
        name
        for name, node in first.items()
        if node.get_element_type() != second[name].get_element_type() or (node.data != second[name].data).any()
    }


PLAIN = {"bits": 4, "group_size": 32}


def calibrated(source, output, settings, dataset):
    return export_model(source, output, quantization_config=PLAIN | {"num_samples": 4} | settings, dataset=dataset)


@pytest.mark.parametrize("method", ["scale_estimation", "gptq"])
@pytest.mark.parametrize("name", ["chatglm3-6b", "chatglm-6b-3layer-untied"])
def test_methods_that_look_at_activations(name, method, tmp_path):
    """They run the stateful graph on texts, offline: other integers than rounding alone, others for other texts."""
    source = DATA / "models" / name
    plain = export_model(source, tmp_path / "plain", quantization_config=dict(PLAIN))
    folder = calibrated(source, tmp_path / "ir", {method: True}, TEXTS)
    linears = {name for name, node in constants(plain).items() if node.get_element_type() == ov.Type.u4}
    assert changed(folder, plain) == linears and linears
    other_texts = ["1234567890 !?"] * 20
    assert changed(folder, calibrated(source, tmp_path / "other", {method: True}, other_texts))
    model = OVChatGLMForCausalLM.from_pretrained(folder, ov_config=EXACT)
    assert torch.isfinite(model(torch.from_numpy(Golden(name)["single_input_ids"])).logits).all()


@pytest.mark.parametrize("name", ["chatglm3-6b", "chatglm-6b-3layer-untied"])
def test_mixed_precision_chosen_by_activations(name, tmp_path):
    """Part of the linears stays 8-bit, and not the part that is chosen by weights alone."""
    source, metric = DATA / "models" / name, "mean_activation_magnitude"
    plain = export_model(source, tmp_path / "plain", quantization_config=dict(PLAIN))
    by_texts = calibrated(source, tmp_path / "texts", {"ratio": 0.6, "sensitivity_metric": metric}, TEXTS)
    by_weights = export_model(source, tmp_path / "weights", quantization_config=PLAIN | {"ratio": 0.6})
    counts = [types_of(folder)[0] for folder in (plain, by_texts, by_weights)]
    assert all(0 < count["u4"] < counts[0]["u4"] and count["i8"] > counts[0]["i8"] for count in counts[1:])
    assert changed(by_texts, by_weights)


def test_awq(tmp_path, caplog):
    """Columns of the linear behind the gate are scaled: on texts, or by the weights alone."""
    plain = export_model(TINY_CHATGLM3, tmp_path / "plain", quantization_config=dict(PLAIN))
    by_texts = calibrated(TINY_CHATGLM3, tmp_path / "texts", {"quant_method": "awq"}, TEXTS)
    by_weights = export_model(TINY_CHATGLM3, tmp_path / "weights", quantization_config=PLAIN | {"quant_method": "awq"})
    scaled = {f"layers.{i}.mlp.{part}_proj.weight" for i in range(4) for part in ("up", "down")}
    assert changed(by_texts, plain) == changed(by_weights, plain) == changed(by_texts, by_weights) == scaled
    assert caplog.text == ""
    source = DATA / "models" / "chatglm-6b-3layer-untied"
    calibrated(source, tmp_path / "ir", {"quant_method": "awq"}, TEXTS)
    assert "AWQ changes nothing in this model" in caplog.text


def test_low_rank_correction_adds_matrices(tmp_path):
    folder = calibrated(CHATGLM3, tmp_path / "ir", {"lora_correction": True}, TEXTS)
    graphs = [folder, export_model(CHATGLM3, tmp_path / "plain", quantization_config=dict(PLAIN))]
    products = [
        sum(node.get_type_name() == "MatMul" for node in ov.Core().read_model(graph / "openvino_model.xml").get_ops())
        for graph in graphs
    ]
    assert products[0] > products[1]
    ids = torch.from_numpy(Golden("chatglm3-6b")["single_input_ids"])
    assert torch.isfinite(OVChatGLMForCausalLM.from_pretrained(folder, ov_config=EXACT)(ids).logits).all()


def test_dataset_as_file_strings_and_rows(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(CHATGLM3)
    config = OVWeightQuantizationConfig(bits=4, num_samples=3)
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(TEXTS), encoding="utf-8")
    found = [
        quantization.calibration_inputs(config, tokenizer, dataset)
        for dataset in (file, TEXTS, [{"text": text} for text in TEXTS])
    ]
    assert len(found[0]) == 3
    for samples in found:
        for sample, first in zip(samples, found[0]):
            assert set(sample) == {"input_ids", "attention_mask", "position_ids", "beam_idx"}
            assert sample["input_ids"].shape == (1, 130)  # 128 tokens behind [gMASK] and sop
            np.testing.assert_array_equal(sample["input_ids"], first["input_ids"])


def test_rows_of_the_datasets_package(tmp_path):
    """A `Dataset`, also as a stream, is read as its texts are; a `DatasetDict` of them is refused."""
    rows = datasets.Dataset.from_dict({"id": range(len(TEXTS)), "text": TEXTS})
    settings = {"bits": 4, "group_size": 32, "scale_estimation": True, "num_samples": 4}
    folders = [
        export_model(CHATGLM3, tmp_path / name, quantization_config=dict(settings), dataset=dataset)
        for name, dataset in (("texts", TEXTS), ("rows", rows), ("stream", rows.to_iterable_dataset()))
    ]
    in_settings = dict(settings) | {"dataset": rows}
    folders.append(export_model(CHATGLM3, tmp_path / "in settings", quantization_config=in_settings))
    contents = [(folder / "openvino_model.bin").read_bytes() for folder in folders]
    assert len(set(contents)) == 1
    with pytest.raises(ValueError, match="DatasetDict with the keys 'train', 'test'. Pass one split"):
        export_model(
            CHATGLM3,
            tmp_path / "ir",
            quantization_config=dict(settings),
            dataset=datasets.DatasetDict(train=rows, test=rows),
        )


@pytest.mark.parametrize("name", ["chatglm3-6b", "chatglm-6b-3layer-untied"])
def test_texts_of_the_model_itself(name, exported, exact_model, tmp_path):
    """`auto`: any first token, then what the model itself finds likely, one token after the other."""
    source = DATA / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = OVWeightQuantizationConfig(bits=4, num_samples=32)
    model = ov.Core().read_model(exported(name) / "openvino_model.xml")
    samples = quantization.calibration_inputs(config, tokenizer, "auto:seq_len=24", model)
    assert len(samples) == 32 and {sample["input_ids"].shape for sample in samples} == {(1, 26)}
    ids = torch.from_numpy(np.concatenate([sample["input_ids"] for sample in samples]))
    assert (ids[:, :2] == torch.tensor(tokenizer.build_inputs_with_special_tokens([]))).all()
    assert len(set(ids[:, 2].tolist())) > 16 and ids.max() < len(tokenizer)
    logits = exact_model(name)(ids).logits[:, 2:-1, : len(tokenizer)]
    likely = logits.log_softmax(-1).gather(2, ids[:, 3:, None]).mean()
    by_chance = logits.log_softmax(-1).gather(2, ids.roll(1, 0)[:, 3:, None]).mean()
    assert likely > by_chance + 0.1
    settings = {"bits": 4, "group_size": 32, "scale_estimation": True, "num_samples": 4}
    estimated = export_model(source, tmp_path / "ir", quantization_config=settings, dataset="auto")
    assert types_of(estimated)[0]["u4"] > 0


def test_text_file_in_quantization_config(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(TEXTS), encoding="utf-8")
    settings = {"bits": 4, "group_size": 32, "scale_estimation": True, "dataset": str(file), "num_samples": 2}
    folder = export_model(CHATGLM3, tmp_path / "ir", quantization_config=settings)
    assert "quick brown fox" not in (folder / "openvino_config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "settings, dataset, message",
    [
        ({"bits": 4, "gptq": True}, None, "gptq looks at activations and needs texts"),
        ({"bits": 4, "scale_estimation": True}, ["", " "], "No text found"),
        ({"bits": 4, "scale_estimation": True}, "no/such/file.txt", "no/such/file.txt: cannot read"),
        ({"bits": 4, "scale_estimation": True}, [{"content": "x"}], "'text' column"),
        ({"bits": 3}, None, "3"),
        ({"bits": 4, "nonsense": 1}, None, "nonsense"),
        ({"bits": 8}, TEXTS, "`dataset` would have no effect: texts are for 4-bit weights with awq"),
        ({"bits": 8, "dataset": TEXTS}, None, "`dataset` would have no effect"),
        ({"bits": 4}, TEXTS, "`dataset` would have no effect"),
        ({"bits": 4, "ratio": 0.5, "sensitivity_metric": "weight_quantization_error"}, TEXTS, "would have no effect"),
        ({"bits": 4, "ratio": 0.5, "sensitivity_metric": "max_activation_variance"}, None, "needs texts"),
        ({"bits": 4, "sensitivity_metric": "max_activation_variance"}, TEXTS, "give a ratio below 1"),
        ({"bits": 4, "ratio": 0.0}, None, "`ratio` is 0, so no layer would become 4-bit"),
        ({"bits": 4, "ratio": 0.5, "sensitivity_metric": "nonsense"}, None, "'nonsense'; expected one of weight_q"),
        ({"bits": 4, "scale_estimation": True}, {"train": TEXTS, "test": TEXTS}, "keys 'train', 'test'. Pass one"),
        ({"bits": 4, "scale_estimation": True, "dataset": {"train": TEXTS}}, None, "dict with the keys 'train'"),
        ({"bits": 4, "scale_estimation": True}, 3, "The texts are 3; expected a UTF-8 text file"),
        ({"bits": 4, "scale_estimation": True}, ["half \ud800"], "character 5 is half of a character"),
        ({"bits": 4, "scale_estimation": True}, "wikitext3", "wikitext3: cannot read.*wikitext2, c4, c4-new, gsm8k"),
        ({"bits": 4, "scale_estimation": True}, "c4:length=3", "the only option of a data set is `seq_len`"),
        ({"bits": 4, "scale_estimation": True}, "c4:seq_len=0", "the only option of a data set is `seq_len`"),
        ({"bits": 4, "scale_estimation": True}, "gsm8k:seq_len=64", "data set 'gsm8k' could not be loaded"),
        ({"bits": 4, "scale_estimation": True, "dataset": "wikitext2:seq_len=64"}, None, "'wikitext2' could not be"),
        ({"bits": 8, "ratio": 0.5}, None, "ratio"),
        ({"bits": 8, "group_size": 64}, None, "group_size"),
        ({"bits": 8, "quant_method": "awq"}, None, "awq|AWQ"),
        ({"bits": 4, "group_size": 48, "group_size_fallback": "error"}, None, "48"),
        ({"bits": 4, "ratio": 1.5}, None, "ratio"),
    ],
)
def test_wrong_settings(settings, dataset, message, tmp_path):
    read = []
    with pytest.raises(ValueError, match=message):
        export_model(
            CHATGLM3,
            tmp_path / "ir",
            quantization_config=settings,
            dataset=dataset,
            progress=lambda *call: read.append(call),
        )
    if "group_size" not in settings:  # NNCF alone knows what fits the matrices
        assert read == []
    assert list(tmp_path.iterdir()) == []


def test_both_arguments_and_unknown_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not both"):
        export_model(CHATGLM3, tmp_path / "ir", weight_format="int8", quantization_config={"bits": 8})
    with pytest.raises(ValueError, match="'int5'; expected one of"):
        export_model(CHATGLM3, tmp_path / "ir", weight_format="int5")


def test_settings_load_back(tmp_path):
    settings = OVWeightQuantizationConfig(bits=4, sym=True, group_size=32, ratio=0.8)
    folder = export_model(CHATGLM3, tmp_path / "ir", quantization_config=settings)
    loaded = OVConfig.from_pretrained(folder).quantization_config
    assert isinstance(loaded, OVWeightQuantizationConfig)
    assert (loaded.bits, loaded.sym, loaded.group_size, loaded.ratio) == (4, True, 32, 0.8)
    assert loaded.group_size_fallback == "adjust"
    assert OVChatGLMForCausalLM.from_pretrained(folder, compile=False) is not None


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_group_size_of_activations_reaches_the_plugin(weight_format, tmp_path):
    settings = {"dtype": weight_format, "dq_group_size": 64}
    model = OVChatGLMForCausalLM.from_pretrained(
        export_model(CHATGLM3, tmp_path / "ir", quantization_config=settings), attention="sdpa"
    )
    assert model.request.get_compiled_model().get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 64


def test_one_request_has_one_meaning(tmp_path):
    """A format by name, and a dictionary: what it names over the defaults of that format."""
    expected = quantization.refined("int4").to_dict()
    assert (expected["group_size"], expected["sym"], expected["backup_precision"]) == (64, False, "int8_sym")

    def resolved(weight_format=None, quantization_config=None):
        config = ChatGLMConfig.from_pretrained(CHATGLM3)
        return quantization.resolve_config(config, weight_format, quantization_config, 0).to_dict()

    fallback = {"group_size_fallback": "adjust"}
    assert resolved("int4") == resolved(None, {"bits": 4}) == resolved(None, {"dtype": "int4"}) == expected | fallback
    assert resolved(None, {"bits": 4, "num_samples": 4}) == expected | fallback | {"num_samples": 4}
    assert resolved(None, {"bits": 4, "ratio": 0.8, "sym": True}) == expected | fallback | {"ratio": 0.8, "sym": True}
    assert resolved("int8") == resolved(None, {}) == resolved(None, {"bits": 8})
    assert resolved("nf4") == resolved(None, {"bits": 4, "dtype": "nf4"})
    saved = resolved(None, {"bits": 4, "group_size": 32})
    assert resolved(None, saved) == saved


def test_a_config_object_is_taken_as_written(tmp_path):
    """With optimum-intel's defaults: groups of 128, here as large as the columns allow, and int8 with zero points."""
    settings = OVWeightQuantizationConfig(bits=4)
    folder = export_model(CHATGLM3, tmp_path / "ir", quantization_config=settings)
    assert types_of(folder) == ({"u4": LINEARS - 3, "u8": 3}, {"u8"})
    assert settings.to_dict() == OVWeightQuantizationConfig(bits=4).to_dict()
    saved = OVConfig.from_pretrained(folder).quantization_config
    assert (saved.group_size, saved.backup_precision) == (None, None)


@pytest.mark.parametrize(
    "precision, element_type, least, most",
    [
        ("u8", ov.Type.u8, 0.01, 0.1),
        ("f16", ov.Type.f16, 1e-4, 0.01),
        ("f32", ov.Type.f32, 0, 1e-4),
        # OpenVINO takes the request and keeps f32 where it computes in f32
        ("bf16", ov.Type.bf16, 0, 1e-4),
    ],
)
def test_cache_precision_is_an_option(precision, element_type, least, most, exported, exact_model):
    """The plugin has the precision that was asked for, and a token that reads the cache differs by what it costs."""
    ids = torch.from_numpy(Golden("chatglm3-6b")["single_input_ids"])
    settings = EXACT | {"KV_CACHE_PRECISION": precision}
    model = OVChatGLMForCausalLM.from_pretrained(exported("chatglm3-6b"), ov_config=settings, attention="sdpa")
    assert model.request.get_compiled_model().get_property("KV_CACHE_PRECISION") == element_type
    first = model(ids[:, :-1])
    mask = torch.ones_like(ids)
    found = model(ids[:, -1:], attention_mask=mask, past_key_values=first.past_key_values).logits[:, -1]
    expected = exact_model("chatglm3-6b")(ids).logits[:, -1]
    assert least <= (found - expected).abs().max() < most


@pytest.mark.parametrize("weight_format", ["original", "fp32", "bf16", "int8", "int4", "nf4", "cb4"])
def test_nan_in_a_weight_is_named_in_every_format(weight_format, tmp_path):
    source = shutil.copytree(CHATGLM3, tmp_path / "source", copy_function=shutil.copyfile)
    shard = next(source.glob("*-00002-*.safetensors"))
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("dense_h_to_4h.weight"))
    tensors[name][-1, -1] = torch.nan
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=f"{shard.name}: tensor '{name}' holds NaN or infinity"):
        export_model(source, tmp_path / "ir", weight_format=weight_format)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_default_follows_the_size():
    config = ChatGLMConfig.from_pretrained(CHATGLM3)
    assert quantization.resolve_config(config, None, None, 10**6) is None
    chosen = quantization.resolve_config(config, None, None, 6 * 10**9)
    assert (chosen.bits, chosen.sym) == (8, True)
