# SPDX-License-Identifier: Apache-2.0
"""Linear layers with int8 and int4 weights on the native operations, against float64 numpy and OpenVINO's own."""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from conftest import EXACT, Golden, openvino_layers
from random_checkpoint import make

from optimum_chatglm_ov import OVChatGLMForCausalLM, export_model
from optimum_chatglm_ov.native import linear_instruction_sets, linear_is_fast, load
from optimum_chatglm_ov.native.fuse_linear import fuse_linears


SETS = linear_instruction_sets()
RANDOM = np.random.default_rng(0)


@dataclass
class Layer:
    """A linear layer as NNCF or this package stores it."""

    matrix: np.ndarray  # f64 [rows, columns], what the integers mean
    node: ov.Node


def layer(rows: int, columns: int, kind: str, group_size: int = 0, zero_point: str = "none") -> Layer:
    """`kind`: u8, i8, u4 or i4; `group_size`: 0 = one scale a row; `zero_point`: "none", "one" for all, or "each"."""
    bits, low = int(kind[1]), 0 if kind[0] == "u" else -(1 << (int(kind[1]) - 1))
    shape = [rows, columns // group_size, group_size] if group_size else [rows, columns]
    integers = RANDOM.integers(low, low + (1 << bits), shape)
    scales = (RANDOM.uniform(0.5, 1.5, [*shape[:-1], 1]) / (1 << bits)).astype(np.float16)
    element_type = getattr(ov.Type, kind)

    def constant(values: np.ndarray) -> ov.Node:
        stored, values = ov.Tensor(element_type, ov.Shape(values.shape)), values.ravel().astype(np.uint8)
        if bits == 4:
            values = np.resize(values, (len(values) + 1) // 2 * 2).reshape(-1, 2) & 15
            values = values[:, 0] | values[:, 1] << 4
        stored.data.view(np.uint8).ravel()[:] = values
        return ops.convert(ops.constant(stored), "f16")

    node, matrix = constant(integers), integers.astype(np.float64)
    if zero_point != "none":
        zeros = RANDOM.integers(low, low + (1 << bits), scales.shape if zero_point == "each" else [1] * len(shape))
        node, matrix = ops.subtract(node, constant(zeros)), matrix - zeros
    node, matrix = ops.multiply(node, ops.constant(scales)), matrix * scales
    if group_size:
        node = ops.reshape(node, ops.constant(np.array([rows, columns])), False)
    return Layer(matrix.reshape(rows, columns), ops.convert(node, "f32"))


ROUNDING = 1.5e-2
"""More than the error of activations of 8 bits in groups of 32. What each kernel rounds, fuzz_linear.cpp knows."""


def types(model: ov.Model) -> list[str]:
    return [node.get_type_name() for node in model.get_ops()]


def input_node(columns: int) -> ov.Node:
    return ops.parameter([-1, -1, columns], ov.Type.f32, name="hidden_states")


def run(model: ov.Model, *inputs: np.ndarray, **config) -> list[np.ndarray]:
    core = ov.Core()
    load(core)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", **config})
    return [np.array(value) for value in compiled(list(inputs)).values()]


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(params=SETS)
def instruction_set(request, monkeypatch):
    monkeypatch.setenv("CHATGLM_OV_ISA", request.param)
    return request.param


KINDS = [
    ("i8", 0, "none"),
    ("u8", 0, "each"),
    ("u8", 0, "one"),
    ("i8", 64, "none"),
    ("i8", 0, "each"),
    ("i4", 0, "none"),
    ("i4", 32, "none"),
    ("u4", 64, "each"),
    ("u4", 128, "one"),
]


@pytest.mark.parametrize("bias_type", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("kind, group_size, zero_point", KINDS)
def test_a_layer_of_each_kind(kind, group_size, zero_point, bias_type, instruction_set):
    linear, x = layer(96, 256, kind, group_size, zero_point), input_node(256)
    bias = torch.from_numpy(RANDOM.normal(size=96)).bfloat16().float().numpy()  # f16 and f32 hold it too
    stored = ops.constant(bias, getattr(ov.Type, bias_type))
    product = ops.matmul(x, linear.node, False, True)
    model = ov.Model([ops.add(product, ops.convert(stored, "f32"))], [x], "layer")
    assert fuse_linears(model) == 1
    assert not {"MatMul", "Add"} & set(types(model))
    for tokens in (1, 2, 5, 13):
        states = RANDOM.normal(size=(2, tokens, 256)).astype(np.float32)
        assert error(run(model, states)[0], states @ linear.matrix.T + bias) < ROUNDING


def test_packed_weights_begin_with_a_cache_line():
    """Of each tile row, half lay in the next line of the processor's cache where they did not."""
    x = input_node(256)
    model = ov.Model([ops.matmul(x, layer(96, 256, "i8").node, False, True) for _ in range(3)], [x], "layers")
    assert fuse_linears(model) == 3
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    assert {constant.data.ctypes.data % 64 for constant in constants} == {0} and len(constants) == 3


@pytest.mark.parametrize("hint", ["f32", "bf16"])
def test_layers_of_one_input_are_one_operation(hint, instruction_set):
    x = input_node(512)
    layers = [layer(rows, 512, "i8") for rows in (128, 32, 64)] + [layer(32, 512, "u4", 64, "each")]
    products = [ops.matmul(x, linear.node, False, True) for linear in layers]
    products.append(ops.matmul(ops.relu(x), layer(32, 512, "i8").node, False, True))
    model = ov.Model(products, [x], "layers")
    before = model.clone()
    assert fuse_linears(model) == 5
    assert types(model).count("ChatGLMLinear") == 3  # i8 and u4 of x, and that of its positive part
    states = RANDOM.normal(size=(1, 40, 512)).astype(np.float32)
    found = run(model, states, INFERENCE_PRECISION_HINT=hint)
    for output, linear in zip(found, layers):
        assert error(output, states @ linear.matrix.T) < ROUNDING
    for output, expected in zip(found, run(before, states, DYNAMIC_QUANTIZATION_GROUP_SIZE="0")):
        assert error(output, expected) < 0.02


@pytest.mark.parametrize("tokens", [1, 700])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_an_mlp_is_one_operation(activation, tokens, instruction_set):
    x = input_node(128)
    gate, up, down = layer(192, 128, "i8"), layer(192, 128, "i8"), layer(96, 192, "u4", 32, "each")
    bias = RANDOM.normal(size=192).astype(np.float32)
    ups = ops.add(ops.matmul(x, up.node, False, True), ops.constant(bias))
    if activation == "silu":
        hidden = ops.multiply(ops.swish(ops.matmul(x, gate.node, False, True)), ups)
    else:
        hidden = ops.gelu(ups, approximation_mode="tanh")
    model = ov.Model([ops.matmul(hidden, down.node, False, True)], [x], "mlp")
    assert fuse_linears(model) == (3 if activation == "silu" else 2)
    assert set(types(model)) == {"Parameter", "Constant", "ChatGLMMLP", "Result"}
    states = 3 * RANDOM.normal(size=(1, tokens, 128)).astype(np.float32)
    ups = states @ up.matrix.T + bias
    if activation == "silu":
        gates = states @ gate.matrix.T
        hidden = gates / (1 + np.exp(-gates)) * ups
    else:
        hidden = torch.nn.functional.gelu(torch.from_numpy(ups), approximate="tanh").numpy()
    found = run(model, states, INFERENCE_NUM_THREADS="2")[0]  # 700 tokens in two parts
    assert error(found, hidden @ down.matrix.T) < 2 * ROUNDING


def test_groups_of_activations_as_asked_for(instruction_set):
    linear, x = layer(32, 8192 + 256, "i8"), input_node(8192 + 256)
    states = RANDOM.normal(size=(1, 100, 8192 + 256)).astype(np.float32)
    exact, errors = states @ linear.matrix.T, {}
    for group in (32, 64, 256):
        model = ov.Model([ops.matmul(x, linear.node, False, True)], [x], "layer")
        assert fuse_linears(model, group) == 1
        errors[group] = error(run(model, states)[0], exact)
    if instruction_set.startswith("amx"):  # rounds whole tokens, to 16 bits
        assert errors[32] == errors[64] == errors[256] < 1e-3
    else:
        assert 1e-3 < errors[32] < errors[64] < errors[256] < ROUNDING


def test_whole_tokens_of_8_bits(instruction_set):
    """Tiles are twice as fast with them, but not for outliers; other kernels round in groups of 32 all the same."""
    linear, x = layer(32, 1024, "i8"), input_node(1024)
    even = RANDOM.normal(size=(1, 100, 1024)).astype(np.float32)
    loud = even.copy()
    loud[:, :, 7] *= 50
    errors = {}
    for rounds_tokens in (False, True):
        model = ov.Model([ops.matmul(x, linear.node, False, True)], [x], "layer")
        assert fuse_linears(model, rounds_tokens=rounds_tokens) == 1
        for name, states in {"even": even, "loud": loud, "few": even[:, :16]}.items():
            errors[name, rounds_tokens] = error(run(model, states)[0], states @ linear.matrix.T)
    if instruction_set.startswith("amx"):
        assert errors.pop(("even", True)) > 1e-3 > max(errors.values())
    else:
        assert all(errors[name, False] == errors[name, True] for name in ("even", "loud", "few"))


@pytest.mark.parametrize("group", [33, 100, 2**63, 2**64 - 1])
def test_groups_that_do_not_fit_leave_a_layer_to_openvino(group):
    """As OpenVINO leaves its activations unrounded then."""
    linear, x = layer(32, 8192 + 256, "i8"), input_node(8192 + 256)
    model = ov.Model([ops.matmul(x, linear.node, False, True)], [x], "layer")
    assert fuse_linears(model, group) == 0
    states = RANDOM.normal(size=(1, 3, 8192 + 256)).astype(np.float32)
    found = run(model, states, DYNAMIC_QUANTIZATION_GROUP_SIZE=str(group))[0]
    assert error(found, states @ linear.matrix.T) < 1e-5


def test_groups_that_are_larger_than_those_of_the_weights():
    linear, x = layer(32, 256, "u4", 64, "each"), input_node(256)
    model = ov.Model([ops.matmul(x, linear.node, False, True)], [x], "layer")
    assert fuse_linears(model, 128) == 0
    states = RANDOM.normal(size=(1, 3, 256)).astype(np.float32)
    assert error(run(model, states, DYNAMIC_QUANTIZATION_GROUP_SIZE="128")[0], states @ linear.matrix.T) < 1e-5


def test_an_mlp_behind_an_mlp():
    x, layers = input_node(64), [layer(64, 64, "i8") for _ in range(3)]
    hidden, states = x, RANDOM.normal(size=(1, 7, 64)).astype(np.float32)
    expected = states
    for i, linear in enumerate(layers):
        hidden = ops.matmul(hidden, linear.node, False, True)
        expected = expected @ linear.matrix.T
        if i < 2:
            hidden = ops.gelu(hidden, approximation_mode="tanh")
            expected = torch.nn.functional.gelu(torch.from_numpy(expected), approximate="tanh").numpy()
    model = ov.Model([hidden], [x], "chain")
    assert fuse_linears(model) == 3
    assert "MatMul" not in types(model) and types(model).count("ChatGLMMLP") == 1
    assert error(run(model, states)[0], expected) < 2 * ROUNDING


@pytest.mark.parametrize("tokens", [2, 9, 40])
@pytest.mark.parametrize("kind, group_size", [("i8", 0), ("u4", 64)])
def test_nan_or_infinity_makes_its_token_nan(kind, group_size, tokens, instruction_set):
    linear, x = layer(64, 128, kind, group_size, "each"), input_node(128)
    model = ov.Model([ops.matmul(x, linear.node, False, True)], [x], "layer")
    fuse_linears(model)
    states = RANDOM.normal(size=(1, tokens, 128)).astype(np.float32)
    expected = run(model, states)[0]
    for number in (np.nan, np.inf, -np.inf):
        for row in (1, tokens - 1):
            spoiled = states.copy()
            spoiled[0, row, 77] = number
            found = run(model, spoiled)[0]
            assert np.isnan(found[0, row]).all()
            np.testing.assert_array_equal(np.delete(found, row, axis=1), np.delete(expected, row, axis=1))
    zeros = run(model, np.zeros_like(states))[0]
    np.testing.assert_array_equal(zeros, np.zeros_like(zeros))


def other_layers() -> dict[str, tuple[ov.Node, list[ov.Node]]]:
    """Results that the operations do not take, and their inputs, by what is peculiar."""
    x, ids = input_node(64), ops.parameter([-1], ov.Type.i64, name="ids")
    half_x = ops.parameter([-1, -1, 64], ov.Type.f16, name="half")

    def matrix(
        scale: tuple[int, ...],
        zero: tuple[int, ...] | None = None,
        zero_type: str = "i8",
        shape=(64, 64),
        result="f32",
    ) -> ov.Node:
        node = ops.convert(ops.constant(RANDOM.integers(-128, 128, shape).astype(np.int8)), "f16")
        if zero is not None:
            zeros = ops.constant(RANDOM.integers(0, 100, zero).astype(np.uint8), getattr(ov.Type, zero_type))
            node = ops.subtract(node, ops.convert(zeros, "f16"))
        node = ops.multiply(node, ops.constant(RANDOM.uniform(0.01, 0.02, scale).astype(np.float16)))
        node = ops.reshape(node, ops.constant(np.array([shape[0], 64])), False) if len(shape) > 2 else node
        return node if result == "f16" else ops.convert(node, "f32")

    def product(weights: ov.Node, transposed: bool = True) -> tuple[ov.Node, list[ov.Node]]:
        return ops.matmul(x, weights, False, transposed), [x]

    shared = layer(64, 64, "i8")
    looked_up = ops.unsqueeze(ops.gather(shared.node, ids, ops.constant(0)), ops.constant(0))
    half = ops.convert(ops.constant(RANDOM.normal(size=(64, 64)).astype(np.float16)), "f32")
    return {
        "also an embedding": (ops.concat([ops.matmul(x, shared.node, False, True), looked_up], 1), [x, ids]),
        "f16 weights": product(half),
        "not transposed": product(layer(64, 64, "i8").node, False),
        "72 rows": product(layer(72, 64, "i8").node),
        "groups of 16": product(layer(64, 64, "i4", 16).node),
        "a scale for each number": product(matrix((64, 64))),
        "a scale for each column": product(matrix((1, 64))),
        "a scale for each column of groups": product(matrix((1, 2, 32), shape=(64, 2, 32))),
        "a zero point for each column": product(matrix((64, 1), zero=(1, 64))),
        "a zero point for each group of all rows": product(matrix((64, 2, 1), zero=(1, 2, 1), shape=(64, 2, 32))),
        "unsigned zero points": product(matrix((64, 1), zero=(64, 1), zero_type="u8")),
        "f16 zero points": product(matrix((64, 1), zero=(64, 1), zero_type="f16")),
        "one f16 zero point": product(matrix((64, 1), zero=(), zero_type="f16")),
        "f16 activations": (ops.matmul(half_x, matrix((64, 1), result="f16"), False, True), [half_x]),
    }


@pytest.mark.parametrize("is_mlp", [False, True])
def test_more_tokens_than_the_caches_of_the_cpu_hold(is_mlp, instruction_set):
    """They are computed in parts, of which none begins with the first of the 37."""
    x = input_node(4096)
    up, down = layer(32, 4096, "i8"), layer(32, 32, "i8")
    result = ops.matmul(x, up.node, False, True)
    if is_mlp:
        result = ops.matmul(ops.gelu(result, approximation_mode="tanh"), down.node, False, True)
    model = ov.Model([result], [x], "layer")
    assert fuse_linears(model) == 1 + is_mlp
    few = RANDOM.normal(size=(1, 37, 4096)).astype(np.float32)
    (expected,), (found,) = run(model, few), run(model, np.tile(few, (1, 121, 1)))
    np.testing.assert_array_equal(found, np.tile(expected, (1, 121, 1)))


def other_mlps() -> dict[str, tuple[list[ov.Node], list[ov.Node]]]:
    """Results and inputs of graphs that are almost what the operation for MLPs computes."""
    x, y = input_node(64), ops.parameter([-1, -1, 64], ov.Type.f32, name="other")

    def linear(source: ov.Node, kind: str = "i8", group_size: int = 0) -> ov.Node:
        return ops.matmul(source, layer(64, 64, kind, group_size).node, False, True)

    gate, up = linear(x), linear(x)
    activated, swish = ops.gelu(linear(x), approximation_mode="tanh"), ops.swish(gate)
    other_beta = ops.swish(linear(x), ops.constant(np.float32(1.702)))
    return {
        "gelu by erf": ([linear(ops.gelu(linear(x), approximation_mode="erf"))], [x]),
        "another beta": ([linear(ops.multiply(other_beta, linear(x)))], [x]),
        "gate and up of different inputs": ([linear(ops.multiply(ops.swish(linear(x)), linear(y)))], [x, y]),
        "gate and up of different formats": ([linear(ops.multiply(ops.swish(linear(x)), linear(x, "i4", 32)))], [x]),
        "the activation is read twice": ([linear(activated), activated], [x]),
        "the swish is read twice": ([linear(ops.multiply(swish, up)), swish], [x]),
        "the gate is read twice": ([linear(ops.multiply(ops.swish(gate), linear(x))), ops.relu(gate)], [x]),
    }


@pytest.mark.parametrize("peculiarity", other_mlps())
def test_what_is_no_mlp(peculiarity):
    results, inputs = other_mlps()[peculiarity]
    model = ov.Model(results, inputs, "other")
    assert fuse_linears(model) and "ChatGLMMLP" not in types(model)


@pytest.mark.parametrize("peculiarity", other_layers())
def test_what_the_operations_do_not_take_stays(peculiarity):
    result, inputs = other_layers()[peculiarity]
    model = ov.Model([result], inputs, "other")
    before = types(model)
    assert fuse_linears(model) == 0
    assert types(model) == before


@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (1, 2, 64), (64, 1), (1,), (2, 1, 64)])
def test_what_is_no_bias_is_added_all_the_same(shape):
    linear, x = layer(64, 64, "i8"), input_node(64)
    added = RANDOM.normal(size=shape).astype(np.float32)
    total = ops.add(ops.constant(added), ops.matmul(x, linear.node, False, True))
    model = ov.Model([total], [x], "layer")
    assert fuse_linears(model) == 1 and "Add" in types(model)
    states = RANDOM.normal(size=(2, 64 if shape == (64, 1) else 2, 64)).astype(np.float32)
    expected = states @ linear.matrix.T + added
    found = run(model, states)[0]
    assert found.shape == expected.shape and error(found, expected) < ROUNDING


def test_several_models_at_once(instruction_set):
    linear, x = layer(256, 256, "u4", 64, "each"), input_node(256)
    model = ov.Model([ops.matmul(x, linear.node, False, True)], [x], "layer")
    fuse_linears(model)
    core = ov.Core()
    load(core)
    states = [RANDOM.normal(size=(1, 50 + i, 256)).astype(np.float32) for i in range(4)]
    requests = [core.compile_model(model, "CPU").create_infer_request() for _ in states]
    expected = [request.infer([s])[0].copy() for request, s in zip(requests, states)]
    found: list[list[np.ndarray]] = [[] for _ in states]

    def work(i: int) -> None:
        for _ in range(20):
            found[i].append(requests[i].infer([states[i]])[0].copy())

    threads = [threading.Thread(target=work, args=[i]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, wanted in zip(found, expected):
        assert len(outputs) == 20
        for output in outputs:
            np.testing.assert_array_equal(output, wanted)


# In a model ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folders = {}

    def export(architecture: str, weight_format: str, dtype: torch.dtype = torch.float16):
        key = architecture, weight_format, dtype
        if key not in folders:
            folder = tmp_path_factory.mktemp("linear")
            checkpoint = make(folder / "checkpoint", architecture, dtype)
            folders[key] = export_model(checkpoint, folder / "ir", weight_format=weight_format)
        return folders[key]

    return export


def logits_of(model: OVChatGLMForCausalLM, ids: torch.Tensor) -> np.ndarray:
    """Of a prompt and of three tokens after it, one by one."""
    output = model(ids[:, :-3])
    parts = [output.logits]
    for i in range(3):
        length = ids.shape[1] - 2 + i
        output = model(
            ids[:, length - 1 : length],
            attention_mask=torch.ones(len(ids), length, dtype=torch.long),
            past_key_values=output.past_key_values,
            position_ids=torch.full((len(ids), 1), length - 1),
        )
        parts.append(output.logits)
    return torch.cat(parts, dim=1).numpy()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("attention", ["sdpa", "fused"])
@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("architecture", ["chatglm", "chatglm2"])
def test_a_model_says_the_same(architecture, weight_format, attention, dtype, quantized):
    folder = quantized(architecture, weight_format, dtype)
    ids = torch.from_numpy(RANDOM.integers(5, 300, (2, 40)))
    if architecture == "chatglm":
        ids[:, 20:22] = torch.tensor([309, 310])
    exact = OVChatGLMForCausalLM.from_pretrained(folder, attention="sdpa", ov_config=EXACT)
    expected = logits_of(exact, ids)
    config = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    errors = {}
    for linear in ("openvino", "fused"):
        model = OVChatGLMForCausalLM.from_pretrained(folder, attention=attention, linear=linear, ov_config=config)
        errors[linear] = error(logits_of(model, ids), expected)
    assert 0 < errors["fused"] < 1.5 * errors["openvino"], errors
    assert "ChatGLMLinear" not in types(model.model)  # the model that would be saved


@pytest.mark.parametrize("precision", ["f16", ov.Type.f16])
def test_f16_is_computed_as_bf16(precision, quantized):
    """For f16 OpenVINO would hand the operations f16 numbers, on CPUs that compute with them."""
    folder = quantized("chatglm2", "int8")
    ids = torch.from_numpy(RANDOM.integers(5, 300, (2, 40)))
    exact = OVChatGLMForCausalLM.from_pretrained(folder, attention="sdpa", ov_config=EXACT)
    config = {"INFERENCE_PRECISION_HINT": precision}
    model = OVChatGLMForCausalLM.from_pretrained(folder, linear="fused", ov_config=config)
    assert model.request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT") != ov.Type.f16
    assert error(logits_of(model, ids), logits_of(exact, ids)) < 0.05


@pytest.mark.parametrize("name", ["chatglm2-6b-int8", "chatglm2-6b-int4", "chatglm-6b-int8", "chatglm-6b-int4"])
def test_checkpoints_quantised_by_their_authors(name, exported):
    golden = Golden(name)
    config = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    model = OVChatGLMForCausalLM.from_pretrained(exported(name), linear="fused", ov_config=config)
    assert openvino_layers(model) < types(model.model).count("MatMul")  # the width of their MLPs is no multiple of 32
    found = model(torch.from_numpy(golden["single_input_ids"])).logits.numpy()
    assert 0 < error(found, golden["single_logits_dequant32"]) < 0.05


@pytest.mark.parametrize(
    "arguments, config, is_native",
    [
        ({}, {}, "auto"),
        ({"attention": "fused"}, {}, "auto"),
        ({"attention": "sdpa"}, {}, False),
        ({"attention": "sdpa", "linear": "auto"}, {}, "auto"),
        ({"attention": "sdpa", "linear": "fused"}, {}, True),
        ({"linear": "openvino"}, {}, False),
        ({}, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}, False),
        ({}, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 64}, "auto"),
        ({}, {"EXECUTION_MODE_HINT": "ACCURACY"}, False),
        ({"linear": "fused"}, {"EXECUTION_MODE_HINT": "ACCURACY", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"}, True),
    ],
)
def test_who_computes_linear_layers(arguments, config, is_native, quantized):
    folder = quantized("chatglm2", "int8")
    model = OVChatGLMForCausalLM.from_pretrained(folder, ov_config=config, **arguments)
    if linear_is_fast() if is_native == "auto" else is_native:
        assert openvino_layers(model) == 0
    else:
        assert openvino_layers(model) == 2 * 7 + 1


def test_the_variable_chooses_where_no_argument_does(quantized, monkeypatch):
    folder = quantized("chatglm2", "int8")
    monkeypatch.setenv("CHATGLM_OV_LINEAR", "openvino")
    assert openvino_layers(OVChatGLMForCausalLM.from_pretrained(folder)) == 15
    assert openvino_layers(OVChatGLMForCausalLM.from_pretrained(folder, linear="fused")) == 0
    monkeypatch.setenv("CHATGLM_OV_LINEAR", "fast")
    expected = "variable CHATGLM_OV_LINEAR is 'fast'; expected 'openvino', 'native', 'native-int8' or 'auto'"
    with pytest.raises(ValueError, match=expected):
        OVChatGLMForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"compile_only": True}, '`compile_only` compiles the IR as it is; `linear="native"`'),
        ({"device": "auto"}, "run on CPU, not on AUTO"),
        (
            {"ov_config": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "16"}},
            "at least 32; found .* 16. Leave one out",
        ),
        ({"ov_config": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "33"}}, "activations in groups of 33. Leave it out"),
        ({"ov_config": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "many"}}, "GROUP_SIZE 'many'; expected an integer"),
        ({"attention": "sdpa", "device": "auto"}, "Leave out `linear='native'`"),
        ({"ov_config": {"EXECUTION_MODE_HINT": "ACCURACY"}}, "groups of at least 32; found .* 0. Leave one out"),
    ],
)
def test_what_native_linear_layers_are_not_for(arguments, message, quantized):
    with pytest.raises(ValueError, match=message):
        OVChatGLMForCausalLM.from_pretrained(quantized("chatglm2", "int8"), linear="fused", **arguments)


def test_weights_that_are_not_quantised(exported):
    with pytest.raises(ValueError, match="no int8 or int4 linear layers"):
        OVChatGLMForCausalLM.from_pretrained(exported("chatglm3-6b"), linear="fused")
    assert openvino_layers(OVChatGLMForCausalLM.from_pretrained(exported("chatglm3-6b"))) == 3 * 7 + 1


def test_what_is_saved_stays_portable(quantized, tmp_path):
    model = OVChatGLMForCausalLM.from_pretrained(quantized("chatglm2", "int4"), linear="fused")
    model.save_pretrained(tmp_path / "saved")
    saved = ov.Core().read_model(tmp_path / "saved" / "openvino_model.xml")  # knows no operation of this package
    assert types(saved).count("MatMul") == 15


@pytest.mark.parametrize(
    "size, config, is_native",
    [
        ("0", {}, False),
        ("64", {}, True),
        ("64", {"EXECUTION_MODE_HINT": "ACCURACY"}, False),
        ("0", {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"}, True),
    ],
)
def test_the_group_size_that_the_ir_names(size, config, is_native, quantized, tmp_path):
    folder = shutil.copytree(quantized("chatglm2", "int8"), tmp_path / "ir")
    model = ov.Core().read_model(folder / "openvino_model.xml")
    model.set_rt_info(size, ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])  # as optimum-intel writes it
    ov.save_model(model, tmp_path / "openvino_model.xml", compress_to_fp16=False)
    for suffix in ("xml", "bin"):
        (tmp_path / f"openvino_model.{suffix}").replace(folder / f"openvino_model.{suffix}")
    loaded = OVChatGLMForCausalLM.from_pretrained(folder, ov_config=config)
    assert (openvino_layers(loaded) == 0) == (is_native and linear_is_fast())
