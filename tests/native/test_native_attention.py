# SPDX-License-Identifier: Apache-2.0
"""The fused attention operation inside OpenVINO, against float64 numpy, on every instruction set of this CPU."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
from native.attention_reference import (
    INPUTS,
    Sequence,
    Shape,
    attention_model,
    compile_attention,
    compile_model,
    relative_error,
)

from optimum_chatglm_ov.native import instruction_sets, load
from optimum_chatglm_ov.native.library import max_head_dim
from optimum_chatglm_ov.native.operations import chatglm_rotary


SETS = instruction_sets()
TOLERANCE = {"f32": 2e-5, "bf16": 1e-2, "i8": 3e-2}
LAYERS = [
    Shape(32, 2, 128, 64),  # chatglm2, chatglm3, glm-4
    Shape(32, 32, 128, 128),  # chatglm-6b
    Shape(4, 2, 16, 8),
    Shape(8, 8, 64, 32),
]
LAYER_NAMES = ["chatglm3", "chatglm-6b", "tiny", "head_dim-64"]


@pytest.fixture
def use(monkeypatch):
    return lambda name: monkeypatch.setenv("CHATGLM_OV_ISA", name)


def takes(instruction_set: str, shape: Shape) -> bool:
    if instruction_set.startswith("amx"):
        return shape.head_dim % 32 == 0 and shape.cache_precision != "f32"
    if "vnni" in instruction_set:
        return shape.cache_precision == "i8"
    return not ("bf16" in instruction_set and shape.cache_precision == "f32")


def with_precision(shape: Shape, cache_precision: str) -> Shape:
    return Shape(shape.heads, shape.kv_heads, shape.head_dim, shape.rotary_dim, cache_precision)


@pytest.mark.parametrize("layer", LAYERS, ids=LAYER_NAMES)
@pytest.mark.parametrize("cache_precision", ["bf16", "f32", "i8"])
def test_prefill_decode_and_beams(layer, cache_precision, use):
    shape = with_precision(layer, cache_precision)
    request = compile_attention(shape).create_infer_request()
    for name in SETS:
        if not takes(name, shape):
            continue
        use(name)
        rows = 3 if shape.heads < 32 else 2
        sequence = Sequence(shape, rows, capacity=96, seed=len(name))
        mask = np.ones((rows, 96))
        mask[0, :5] = 0  # left padding
        for step, length in enumerate([37, 1, 1, 9, 1]):
            error = relative_error(*sequence.step(request, length, mask[:, : sequence.past + length]))
            assert error <= TOLERANCE[cache_precision], (name, step, error)
            sequence.reorder([rows - 1, *range(rows - 1)] if step % 2 else [0] * rows)
            mask = mask[[rows - 1, *range(rows - 1)] if step % 2 else [0] * rows]


@pytest.mark.parametrize("sink", [4.0, 7.0, 12.0])
@pytest.mark.parametrize("cache_precision", ["bf16", "i8"])
def test_many_small_weights_beside_a_large_one(sink, cache_precision, use):
    shape = Shape(4, 1, 128, 64, cache_precision)
    request = compile_attention(shape).create_infer_request()
    for name in SETS:
        if not takes(name, shape):
            continue
        use(name)
        sequence = Sequence(shape, 1, capacity=600, sink=sink)
        for length in (500, 1):
            error = relative_error(*sequence.step(request, length, np.ones((1, sequence.past + length))))
            assert error <= TOLERANCE[cache_precision], (name, length, error)


@pytest.mark.parametrize("where", ["padding", "future", "sink"])
def test_values_of_other_tokens_do_not_coarsen_the_weights(where, use):
    shape = Shape(16, 1, 128, 64, "i8")
    request = compile_attention(shape).create_infer_request()
    loudness, mask = np.ones(160), np.ones((1, 120))
    if where == "padding":
        loudness[:4], mask[0, :4] = 1000, 0
    elif where == "future":
        loudness[119] = 1000
    else:
        loudness[0] = 0.05
    for name in SETS:
        if not takes(name, shape):
            continue
        use(name)
        sequence = Sequence(shape, 1, capacity=160, sink=7.0 if where == "sink" else 0.0, loudness=loudness)
        output, expected = sequence.step(request, 120, mask)
        first, last = (4 if where == "padding" else 0), (119 if where == "future" else 120)
        assert relative_error(output[:, first:last], expected[:, first:last]) <= 2e-2, name


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("cache_precision", ["bf16", "i8"])
def test_a_number_that_is_none_shows_and_stays_where_it_is(name, cache_precision, use):
    use(name)
    shape = Shape(4, 2, 32, 16, cache_precision)
    if not takes(name, shape):
        assert (name, cache_precision) in {("avx512-vnni", "bf16"), ("avx2-vnni", "bf16")}
        return
    request = compile_attention(shape).create_infer_request()
    poison = {0: [3], 1: range(3, 9), 2: range(3, 9)}  # input -> queries that see its fourth token
    for i, spoiled in poison.items():
        sequence = Sequence(shape, 1, capacity=32)
        sequence.append(request, 9, np.ones((1, 9)), np.zeros(1, np.int32))
        inputs = [request.get_tensor(part).data.copy() for part in ("query", "key", "value")]
        inputs[i][0, 3] = np.nan
        for part, array in zip(("query", "key", "value"), inputs):
            request.set_tensor(part, ov.Tensor(array))
        request.set_tensor("past_length", ov.Tensor(np.zeros(1, np.int32)))
        request.infer()
        rows = np.isnan(request.get_output_tensor(0).data[0]).any(axis=-1)
        assert rows[list(spoiled)].all(), (i, rows)
        if i == 0:
            assert rows.sum() == 1


@pytest.mark.parametrize("name", SETS)
def test_a_query_of_zeros_gives_the_mean_of_the_values(name, use):
    use(name)
    shape = Shape(4, 2, 32, 0, "i8")
    if not takes(name, shape):
        assert name == "avx512-bf16"
        return
    request = compile_attention(shape).create_infer_request()
    sequence = Sequence(shape, 1, capacity=64)
    sequence.append(request, 50, np.ones((1, 50)), np.zeros(1, np.int32))
    values = request.get_tensor("value").data.reshape(50, 2, 32)
    request.set_tensor("query", ov.Tensor(np.zeros((1, 50, 128), np.float32)))
    request.infer()
    found = request.get_output_tensor(0).data[0, -1].reshape(2, 2, 32)
    np.testing.assert_allclose(found, np.repeat(values.mean(axis=0)[:, None], 2, axis=1), atol=5e-3)


@pytest.mark.parametrize("name", SETS)
def test_bidirectional_prefix(name, use):
    use(name)
    shape = Shape(4, 4, 32, 32, "i8" if "vnni" in name else "bf16")
    request = compile_attention(shape).create_infer_request()
    sequence = Sequence(shape, 2, capacity=128)
    context = np.array([50, 7])
    for length in (70, 1, 12):
        mask = np.ones((2, sequence.past + length))
        assert relative_error(*sequence.step(request, length, mask, context)) <= TOLERANCE[shape.cache_precision]


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_inference_precisions_of_the_plugin(precision):
    shape = Shape(32, 2, 128, 64)
    request = compile_attention(shape, precision).create_infer_request()
    sequence = Sequence(shape, 1, capacity=64)
    for length in (20, 1):
        mask = np.ones((1, sequence.past + length))
        assert relative_error(*sequence.step(request, length, mask)) <= 1e-2


@pytest.mark.parametrize("cache_precision", ["f32", "bf16", "i8"])
def test_long_past_and_split_keys(cache_precision):
    shape = Shape(32, 2, 128, 64, cache_precision)
    sequence = Sequence(shape, 1, capacity=4200)
    request = compile_attention(shape, threads=2).create_infer_request()
    sequence.append(request, 4090, np.ones((1, 4090)), np.zeros(1))
    for length in (1, 5):
        error = relative_error(*sequence.step(request, length, np.ones((1, sequence.past + length))))
        assert error <= TOLERANCE[cache_precision]


def test_queries_that_see_nothing_give_zeros():
    shape = Shape()
    request = compile_attention(shape).create_infer_request()
    sequence = Sequence(shape, 2, capacity=32)
    mask = np.ones((2, 10))
    mask[0, :4] = 0
    output, expected = sequence.step(request, 10, mask)
    assert not output[0, :4].any() and output[1].any()
    assert relative_error(output, expected) <= 1e-2


def test_several_requests_and_threads_share_nothing():
    shape = Shape(32, 2, 128, 64)
    compiled = compile_attention(shape)
    errors = []

    def generate(seed: int) -> None:
        request = compiled.create_infer_request()
        sequence = Sequence(shape, 1, capacity=160, seed=seed)
        for length in (100, 1, 1, 20, 1):
            errors.append(relative_error(*sequence.step(request, length, np.ones((1, sequence.past + length)))))

    threads = [threading.Thread(target=generate, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 30 and max(errors) <= 1e-2


@pytest.mark.parametrize("kinds", [1, 2])
def test_angles_are_exact_in_every_precision_and_after_saving(kinds, tmp_path):
    inv_freq = 10000.0 ** -(np.arange(8) / 8.3)
    positions = ops.parameter([kinds, -1, -1], ov.Type.i32, name="positions")
    cos, sin = chatglm_rotary(positions.output(0), inv_freq).outputs()
    core = ov.Core()
    load(core)
    model = ov.Model([ops.result(cos), ops.result(sin)], [positions], "rotary")
    given = np.random.default_rng(0).integers(0, 1 << 20, (kinds, 3, 50)).astype(np.int32)
    pairs = 8 // kinds
    frequencies = inv_freq.astype(np.float32).reshape(kinds, 1, 1, pairs)
    angles = np.concatenate(given[..., None].astype(np.float32) * frequencies, axis=-1)
    angles = np.concatenate([angles, angles], axis=-1).astype(np.float64)
    ov.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    for read, precision in itertools.product((model, tmp_path / "model.xml"), ("f32", "bf16")):
        found = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": precision})(given)
        np.testing.assert_allclose(found[0], np.cos(angles), atol=1e-6)
        np.testing.assert_allclose(found[1], np.sin(angles), atol=1e-6)


def test_positions_that_do_not_fit_the_frequencies():
    for shape in ([3, -1, -1], [0, -1, -1], [-1, -1, -1], [-1, -1]):
        with pytest.raises(RuntimeError, match="positions"):
            chatglm_rotary(ops.parameter(shape, ov.Type.i32).output(0), [1.0, 0.1])
    with pytest.raises(RuntimeError, match="positions"):
        chatglm_rotary(ops.parameter([1, -1, -1], ov.Type.f32).output(0), [1.0, 0.1])


def test_model_with_the_operation_survives_saving(tmp_path):
    shape = Shape()
    ov.save_model(attention_model(shape), tmp_path / "model.xml")
    core = ov.Core()
    load(core)
    request = core.compile_model(core.read_model(tmp_path / "model.xml"), "CPU").create_infer_request()
    sequence = Sequence(shape, 2, capacity=32)
    assert relative_error(*sequence.step(request, 8, np.ones((2, 8)))) <= 1e-2


def test_what_does_not_fit_is_refused(use):
    shape = Shape()
    request = compile_attention(shape).create_infer_request()
    with pytest.raises(RuntimeError, match="the cache holds 32 tokens, 40 are needed"):
        Sequence(shape, 1, capacity=32).step(request, 40, np.ones((1, 40)))
    with pytest.raises(RuntimeError, match="attention_mask must be"):
        Sequence(shape, 1, capacity=32).step(request, 8, np.ones((1, 9)))
    sequence = Sequence(shape, 1, capacity=32)
    sequence.step(request, 8, np.ones((1, 8)))
    sequence.beam_table[0, 3] = 7
    with pytest.raises(RuntimeError, match=r"beam_table\[0, 3\] is 7, the cache has rows 0 to 0"):
        sequence.step(request, 1, np.ones((1, 9)))
    for name, value in (
        ("cos", np.float32(1)),
        ("cos", np.ones(8, np.float32)),
        ("past_length", np.zeros(0, np.int32)),
    ):
        model = attention_model(shape, **{name: list(np.shape(value))})
        feeds = dict(zip(INPUTS, sequence.feeds)) | {name: np.asarray(value)}
        with pytest.raises(RuntimeError, match="cos must have 3 or 4 dimensions and past_length be one number"):
            compile_model(model).create_infer_request().infer(feeds)
    use("sse9")
    with pytest.raises(RuntimeError, match="CHATGLM_OV_ISA: sse9 is not one of .*portable"):
        Sequence(shape, 1, capacity=32).step(request, 8, np.ones((1, 8)))
    with pytest.raises(RuntimeError, match="head_dim must be a multiple of 16"):
        attention_model(Shape(head_dim=24))
    with pytest.raises(RuntimeError, match="must be a multiple of num_key_value_heads"):
        attention_model(Shape(heads=4, kv_heads=3))
    with pytest.raises(RuntimeError, match=f"head_dim must be a multiple of 16 up to {max_head_dim()}, found"):
        attention_model(Shape(head_dim=max_head_dim() + 16))


@pytest.mark.parametrize("head_dim", [256, max_head_dim()])
@pytest.mark.parametrize("cache_precision", ["bf16", "f32", "i8"])
def test_large_heads(head_dim, cache_precision, use):
    shape = Shape(4, 2, head_dim, 64, cache_precision)
    request = compile_attention(shape).create_infer_request()
    for name in SETS:
        if takes(name, shape):
            use(name)
            sequence = Sequence(shape, 1, capacity=96)
            for length in (40, 1):
                error = relative_error(*sequence.step(request, length, np.ones((1, sequence.past + length))))
                assert error <= TOLERANCE[cache_precision], (name, length, error)
