# SPDX-License-Identifier: Apache-2.0
"""The measurements of attention and of linear layers alone run every way on small shapes (their figures are not
tested), and those of the machine find what its CPU has."""

import numpy as np
import pytest

from optimum_chatglm_ov import native
from optimum_chatglm_ov.measure import linear as bench_linear
from optimum_chatglm_ov.measure import turns
from optimum_chatglm_ov.measure.attention import AttentionShape, _Paged, _Stateful, measure_attention
from optimum_chatglm_ov.measure.speed import machine_peaks
from optimum_chatglm_ov.native import instruction_sets, linear_instruction_sets


SHAPE = AttentionShape(num_attention_heads=4, num_key_value_heads=2, head_dim=64, rotary_dim=32)


@pytest.mark.parametrize(("new_tokens", "past_tokens"), [(40, 0), (1, 70)])
def test_every_way_is_measured(new_tokens, past_tokens):
    results = measure_attention(SHAPE, new_tokens, past_tokens, layers=2, repetitions=1, threads=1)
    ways = ["native", "native-int8", "openvino", "paged", "torch-bf16", "torch-f32"]
    assert [m.way for m in results] == ways
    pairs = sum(past_tokens + i + 1 for i in range(new_tokens))
    for m, bits in zip(results, (16, 8, 8, 8, 16, 32)):
        assert m.seconds > 0
        assert m.gigaflops * m.seconds * 1e9 == pytest.approx(2 * 2 * pairs * 4 * 64)
        assert m.gigabytes * m.seconds * 1e9 == pytest.approx(2 * (past_tokens + new_tokens) * 2 * 64 * bits / 8)


def test_the_ways_compute_the_same():
    def output(way):
        call = way.prepare(40, 0)
        return next(iter(call().values())).reshape(40, -1)

    config = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    expected = output(_Stateful(SHAPE, 2, None, config))
    np.testing.assert_allclose(output(_Stateful(SHAPE, 2, "f32", config)), expected, atol=1e-4)
    np.testing.assert_allclose(output(_Paged(SHAPE, 2, {"INFERENCE_PRECISION_HINT": "f32"})), expected, atol=0.05)


GATED = bench_linear.LinearShape(128, 160, 192, 320)
PLAIN = bench_linear.LinearShape(128, 384, 192, 320, False)


@pytest.mark.parametrize("shape", [GATED, PLAIN])
def test_every_linear_layer_is_measured(shape, monkeypatch):
    monkeypatch.setattr(turns, "PAUSE_SECONDS", 0)
    found = list(bench_linear.measure_linear(shape, (1, 40), copies=2, repetitions=1, threads=1))
    assert [(m.layer, m.weights, m.rows, m.way) for m in found] == [
        (layer, weights, rows, way)
        for layer in ("qkv", "dense", "mlp", "output")
        for weights in ("int8", "int4")
        for rows in (1, 40)
        for way in ("native", "openvino")
    ]
    up_layers = 2 if shape.gated else 1
    numbers = {
        "qkv": shape.qkv_size * 128,
        "dense": 128 * 128,
        "mlp": (up_layers + 1) * 192 * 128,
        "output": 320 * 128,
    }
    rows = {"qkv": shape.qkv_size, "dense": 128, "mlp": up_layers * 192 + 128, "output": 320}
    for m in found:
        assert m.seconds > 0
        assert m.teraflops * m.seconds * 1e12 == pytest.approx(2 * m.rows * numbers[m.layer])
        # int8: a scale of 2 bytes a row; int4: that and half a byte for every 64 numbers
        stored = (numbers[m.layer] + 2 * rows[m.layer], numbers[m.layer] / 2 + numbers[m.layer] / 64 * 2.5)
        assert m.gigabytes * m.seconds * 1e9 == pytest.approx(stored[m.weights == "int4"])


@pytest.mark.parametrize("weights", bench_linear.WEIGHTS)
@pytest.mark.parametrize("layer", bench_linear.LAYERS)
@pytest.mark.parametrize("shape", [GATED, PLAIN])
def test_both_ways_compute_the_same_linear_layers(shape, layer, weights):
    stack = bench_linear._Stack(shape, layer, weights, 3)
    config = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    fused, expected = (bench_linear._Way(stack.model, way, config) for way in bench_linear.WAYS)
    # each copy is an operation of its own, so that none shares with another what it computes of the input
    model = fused.request.get_compiled_model().get_runtime_model()
    kinds = [node.get_rt_info()["layerType"] for node in model.get_ops()]
    assert sum(kind in ("ChatGLMLinear", "ChatGLMMLP", "Reference") for kind in kinds) == 3, kinds
    states = np.random.default_rng(1).standard_normal((1, 5, 128), np.float32)
    outputs = [fused(states), expected(states)]
    assert len(outputs[0]) == len(outputs[1]) == 3
    for found, wanted in zip(*outputs):
        assert found.shape == wanted.shape and wanted.any()
        assert np.linalg.norm(found - wanted) < 0.03 * np.linalg.norm(wanted)
    assert not np.array_equal(outputs[1][0], outputs[1][1])


def test_the_peaks_of_the_machine_are_those_of_its_instructions():
    attention, linear = instruction_sets(), linear_instruction_sets()
    expected = {
        "tile-bf16": "amx" in attention,
        "tile-int8": "amx" in attention,
        "vnni-int8": bool({"avx512-vnni", "avx2-vnni"} & set(linear)),
        "f32": bool({"avx512", "avx2"} & set(attention)),
    }
    assert {kind: native.peak_operations(kind, 1) > 0 for kind in native.PEAKS} == expected
    peaks = machine_peaks(2)
    assert list(peaks) == ["stream", *(kind for kind, has in expected.items() if has)]
    assert all(peak > 0 for peak in peaks.values())


def test_peaks_of_unknown_products_and_of_no_thread():
    with pytest.raises(ValueError, match="`kind` is 'f64'; expected one of tile-bf16, tile-int8, vnni-int8, f32"):
        native.peak_operations("f64", 1)
    with pytest.raises(ValueError, match="`threads` is 0; expected at least 1"):
        native.peak_operations("f32", 0)


def test_without_the_native_library_the_stream_is_the_only_peak(monkeypatch):
    def fail(kind, threads):
        raise native.NativeBuildError("no compiler")

    monkeypatch.setattr(native, "peak_operations", fail)
    assert list(machine_peaks(1)) == ["stream"]
