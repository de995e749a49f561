# SPDX-License-Identifier: Apache-2.0
"""The pass to the fused graph and the caches behind it: the originals' logits and tokens, beams, rollback, growth."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
from conftest import EXACT, FLOATING, Golden
from torch_models import TORCH_MODELS

from optimum_chatglm_ov.native import cache_state, load
from optimum_chatglm_ov.native.cache_state import FusedAttentionState
from optimum_chatglm_ov.native.fuse_attention import cache_layout, fuse_attention
from optimum_chatglm_ov.native.memory import aligned_bytes


class FusedModel:
    """A fused model driven by hand."""

    def __init__(self, folder, cache_precision="f32", config=EXACT, max_tokens=4096):
        core = ov.Core()
        load(core)
        self.model = core.read_model(folder / "openvino_model.xml")
        fuse_attention(self.model, cache_precision)
        self.request = core.compile_model(self.model, "CPU", config).create_infer_request()
        self.state = FusedAttentionState(self.request, cache_layout(self.model), max_tokens)

    def reset(self):
        self.state.reset()
        self.request.reset_state()

    def __call__(self, input_ids, attention_mask=None, beam_idx=None):
        """f32 logits `[B, L, vocab]` of int64 `input_ids` `[B, L]` after what the caches hold."""
        rows, new = input_ids.shape
        if attention_mask is None:
            attention_mask = np.ones((rows, self.state.past_length + new), np.int64)
        if beam_idx is not None:
            self.state.reorder(beam_idx)
        self.state.prepare(rows, new)
        positions = np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0)[:, -new:]
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
        inputs["beam_idx"] = np.arange(rows, dtype=np.int32) if beam_idx is None else np.array(beam_idx, np.int32)
        names = {name for port in self.model.inputs for name in port.names}
        self.request.infer({name: value for name, value in inputs.items() if name in names})
        self.state.advance(new)
        return self.request.get_tensor("logits").data.copy()


@pytest.fixture(scope="module")
def fused(exported):
    models = {}

    def make(name, cache_precision="f32", config=None):
        key = name, cache_precision
        if key not in models:
            models[key] = FusedModel(exported(name), cache_precision, EXACT if config is None else config)
        models[key].reset()
        return models[key]

    return make


def mask_of(golden, case):
    inputs = golden.inputs(case)
    if "attention_mask" not in inputs:
        return np.ones(inputs["input_ids"].shape, np.int64)
    mask = inputs["attention_mask"]
    return (mask if mask.dim() == 2 else (~mask[:, 0].all(dim=1)).long()).numpy()


@pytest.mark.parametrize("name", [*FLOATING, *TORCH_MODELS])
def test_fused_graph_equals_the_original(name, fused):
    golden, model = Golden(name), fused(name)
    types = [node.get_type_name() for node in model.model.get_ops()]
    assert "ScaledDotProductAttention" not in types
    assert types.count("ReadValue") == (1 if name.startswith("chatglm-6b") else 0)  # v1's prompt layout stays
    for case in ("single", "batch"):
        model.reset()
        mask = mask_of(golden, case)
        logits = model(golden[f"{case}_input_ids"], mask)
        kept = mask.astype(bool)
        np.testing.assert_allclose(logits[kept], golden[f"{case}_logits"][kept], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["chatglm-6b-ptuning-v2", "chatglm2-6b-ptuning-v2"])
def test_ptuning_prefix(name, fused):
    golden, model = Golden(name), fused(name)
    prefix_tokens = cache_layout(model.model).prefix_tokens
    assert prefix_tokens == {"chatglm-6b-ptuning-v2": 6, "chatglm2-6b-ptuning-v2": 5}[name]
    for case in ("batch", "single", "batch"):
        model.reset()
        mask = mask_of(golden, case)
        logits = model(golden[f"{case}_input_ids"], mask)
        kept = mask.astype(bool)
        np.testing.assert_allclose(logits[kept], golden[f"{case}_logits"][kept], atol=1e-3, rtol=0)
        rows = len(mask)
        mask = np.pad(mask[[-1] * rows], ((0, 0), (0, 1)), constant_values=1)
        again = model(np.full((rows, 1), 11), mask, [rows - 1] * rows)
        np.testing.assert_allclose(again, np.repeat(again[-1:], rows, axis=0), atol=1e-3)
    model.reset()
    expected, prompt = golden["greedy_single"][0].tolist(), golden["single_input_ids"][0].tolist()
    assert greedy(model, prompt, len(expected) - len(prompt)) == expected


@pytest.mark.parametrize("name", [*FLOATING, *TORCH_MODELS])
@pytest.mark.parametrize("cache_precision", ["f32", "bf16", "i8"])
def test_cached_steps(name, cache_precision, fused):
    golden, model = Golden(name), fused(name, cache_precision)
    for case in golden.cases("_logits", prefix="step_"):
        model.reset()
        tokens, mask = golden[f"{case}_input_ids"], mask_of(golden, case)
        for step, expected in enumerate(golden[f"step_{case}_logits"]):
            logits = model(tokens, mask)[:, -1]
            if cache_precision == "f32":
                np.testing.assert_allclose(logits, expected, atol=1e-3, rtol=0)
            else:
                error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
                assert error < {"bf16": 0.05, "i8": 0.15}[cache_precision], (case, step)
            if step < len(golden[f"step_{case}_tokens"]):
                tokens = golden[f"step_{case}_tokens"][step][:, None]
                mask = np.concatenate([mask, np.ones((len(tokens), 1), np.int64)], axis=1)


def greedy(model, prompt, new_tokens):
    tokens, step = list(prompt), np.array([prompt])
    for _ in range(new_tokens):
        logits = model(step)[0, -1]
        tokens.append(int(logits.argmax()))
        step = np.array([tokens[-1:]])
    return tokens


@pytest.mark.parametrize("name", [*FLOATING, *TORCH_MODELS])
def test_greedy_tokens_are_the_original_ones(name, fused):
    golden = Golden(name)
    expected = golden["greedy_single"][0].tolist()
    prompt = golden["single_input_ids"][0].tolist()
    assert greedy(fused(name), prompt, len(expected) - len(prompt)) == expected


def test_beams_fork_and_join_without_copies(fused):
    model = fused("chatglm3-6b")
    prompt = Golden("chatglm3-6b")["single_input_ids"][0].tolist()
    model(np.array([prompt]))
    caches = [tensor.data.copy() for tensor in model.state._caches.values()]
    rows = [prompt[:] for _ in range(3)]
    beam_idx, random = [0, 0, 0], np.random.default_rng(0)
    for step in range(40):
        rows = [rows[parent] + [int(random.integers(5, 600))] for parent in beam_idx]
        logits = model(np.array([row[-1:] for row in rows]), beam_idx=beam_idx)
        beam_idx = random.integers(0, 3, 3).tolist()
        if step == 0:
            for before, tensor in zip(caches, model.state._caches.values()):  # the prompt is still there once
                used = len(prompt) // 32
                assert (tensor.data[0, :, :used] == before[0, :, :used]).all()
    model.reset()
    full = model(np.array(rows))[:, -1]
    np.testing.assert_allclose(logits[:, -1], full, atol=1e-4)
    assert model.state._rows == 3


def test_caches_grow_and_narrow_under_beams(fused):
    model = fused("chatglm3-6b")
    random, batches = np.random.default_rng(1), [1, 2, 5, 3, 1, 4, 2, 6]
    rows = np.zeros((1, 0), np.int64)
    for batch in batches:  # 800 tokens, beyond the first allocation of 512
        parents = random.integers(0, len(rows), batch)
        new = random.integers(5, 600, (batch, 100))
        rows = np.concatenate([rows[parents], new], axis=1)
        last = model(new, beam_idx=parents)[:, -1]
    assert model.state.capacity > 512
    model.reset()
    np.testing.assert_allclose(model(rows)[:, -1], last, atol=1e-4)


def test_prefix_of_a_row_that_beams_have_left(fused):
    model = fused("chatglm2-6b-ptuning-v2")
    prompt = np.random.default_rng(2).integers(5, 300, (1, 7))
    expected = model(prompt)
    model.reset()
    model(prompt.repeat(3, axis=0))
    model(np.full((2, 1), 11), beam_idx=[2, 0])
    model.reset()
    model.state._caches["key_cache.0"].data[2] = 0xFF  # a row that the next sequence must not look at
    np.testing.assert_allclose(model(prompt.repeat(2, axis=0)), expected.repeat(2, axis=0), atol=1e-4)


def test_rollback_forgets_the_last_tokens(fused):
    for name in ("chatglm3-6b", "chatglm-6b"):
        model = fused(name)
        prompt = Golden(name)["single_input_ids"]
        model(prompt)
        first = model(np.array([[11]]))
        model(np.array([[7, 8, 9, 10, 300, 200]]))
        model.state.rollback(7)
        again = model(np.array([[11]]))
        np.testing.assert_array_equal(first, again)
        with pytest.raises(ValueError, match="cannot roll back 1000 tokens, the caches hold"):
            model.state.rollback(1000)


def test_caches_grow_up_to_the_context_length(exported):
    model = FusedModel(exported("chatglm3-6b"), max_tokens=1100)
    tokens = np.random.default_rng(0).integers(5, 600, (1, 1100))
    sizes, parts = set(), []
    for start in range(0, 1100, 100):
        parts.append(model(tokens[:, start : start + 100]))
        sizes.add(model.state.capacity)
    assert len(sizes) <= 3 and max(sizes) == 1120
    with pytest.raises(ValueError, match="exceed the context length of 1100"):
        model(tokens[:, :1])
    model.reset()
    np.testing.assert_allclose(np.concatenate(parts, axis=1), model(tokens), atol=1e-4)
    with pytest.raises(ValueError, match="the caches hold 1 rows, the call has 2"):
        model.state.rollback(600)
        model(tokens[:, :20].reshape(2, 10))
    with pytest.raises(ValueError, match="beam_idx must name rows 0 to 0"):
        model.state.reorder([1])


def test_default_precision_and_half_precision_files(exported, tmp_path):
    core = ov.Core()
    source = core.read_model(exported("chatglm3-6b") / "openvino_model.xml")
    ov.save_model(source, tmp_path / "openvino_model.xml", compress_to_fp16=True)
    golden = Golden("chatglm3-6b")
    for folder in (exported("chatglm3-6b"), tmp_path):
        model = FusedModel(folder, "bf16", config={})
        logits = model(golden["single_input_ids"])
        expected = golden["single_logits"]
        assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 0.05


def test_fused_model_survives_saving(exported, tmp_path):
    golden = Golden("chatglm3-6b")
    model = FusedModel(exported("chatglm3-6b"))
    ov.save_model(model.model, tmp_path / "openvino_model.xml", compress_to_fp16=False)
    again = FusedModel(tmp_path)  # fusing what is fused already changes nothing
    assert cache_layout(again.model) == cache_layout(model.model)
    np.testing.assert_allclose(again(golden["single_input_ids"]), golden["single_logits"], atol=1e-3)


def test_memory_that_ran_out_while_the_caches_grew(exported, monkeypatch):
    ids, new = np.arange(5, 25)[None], np.array([[7]])
    expected = FusedModel(exported("chatglm3-6b"))
    expected(ids)
    model = FusedModel(exported("chatglm3-6b"))
    model(ids)
    caches = []

    def some(shape):
        caches.append(shape)
        if len(caches) == 2:
            raise MemoryError
        return aligned_bytes(shape)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(cache_state, "aligned_bytes", some)
        model(new.repeat(2, 0), beam_idx=[0, 0])
    found = model(new.repeat(3, 0), beam_idx=[0, 1, 1])
    np.testing.assert_array_equal(found, expected(new.repeat(3, 0), beam_idx=[0, 0, 0]))


def test_caches_begin_with_a_cache_line(exported):
    """Of each tile row, half lay in the next line of the processor's cache where they did not."""
    model = FusedModel(exported("chatglm3-6b"))
    for count in 5, 600:  # and when they have grown
        model.state.reset()
        model(np.full((1, count), 7))
        assert {cache.data.ctypes.data % 64 for cache in model.state.caches} == {0}
    other = FusedModel(exported("chatglm3-6b"))
    other.state.copy(model.state)
    assert {cache.data.ctypes.data % 64 for cache in other.state.caches} == {0}


def test_a_request_outlives_the_release_of_its_caches(exported):
    """As when another thread is still computing: the memory that the request writes to is there as long as it is."""
    model = FusedModel(exported("chatglm3-6b"))
    expected = model(np.arange(5, 25)[None])
    model.state.reset()
    model.state.release()
    gc.collect()
    model.request.infer()  # the same inputs
    np.testing.assert_array_equal(model.request.get_tensor("logits").data, expected)


def test_released_caches_keep_nothing(exported):
    model = FusedModel(exported("chatglm3-6b"))
    model(np.arange(5, 25)[None])
    request = weakref.ref(model.request)
    model.state.release()
    del model.request
    gc.collect()
    assert request() is None and not model.state.caches and model.state.past_length == 0


def test_unknown_models_are_left_alone(exported):
    x = ops.parameter([-1, 4], ov.Type.f32)
    plain = ov.Model([ops.relu(x)], [x], "plain")
    with pytest.raises(ValueError, match="cannot be fused: it has no ScaledDotProductAttention node"):
        fuse_attention(plain)
    assert cache_layout(plain) is None
    model = ov.Core().read_model(exported("chatglm3-6b") / "openvino_model.xml")
    before = sorted(node.get_type_name() for node in model.get_ops())
    adds = [node for node in model.get_ops() if node.get_type_name() == "ScaledDotProductAttention"]
    mask = adds[1].input_value(3)
    adds[1].input(3).replace_source_output(ops.multiply(mask, np.float32(1)).output(0))
    with pytest.raises(ValueError, match="different attention masks"):
        fuse_attention(model)
    assert sorted(node.get_type_name() for node in model.get_ops()) == sorted([*before, "Constant", "Multiply"])
    with pytest.raises(ValueError, match="cache_precision must be one of bf16, i8, f32, found 'u4'"):
        fuse_attention(model, "u4")


@pytest.mark.parametrize(
    "name, kind, index, change",
    [
        ("chatglm3-6b", "LessEqual", 0, lambda keys: ops.subtract(keys, np.int64(1))),
        ("chatglm3-6b", "LessEqual", 1, lambda queries: ops.subtract(queries, np.int64(1))),
        ("chatglm3-6b", "NotEqual", 1, lambda zero: ops.add(zero, np.int64(2))),
        ("chatglm3-6b", "Range", 0, lambda start: ops.add(start, np.int64(1))),
        ("chatglm-6b", "LogicalOr", 1, ops.logical_not),
    ],
)
def test_other_masks_are_left_alone(name, kind, index, change, exported):
    model = ov.Core().read_model(exported(name) / "openvino_model.xml")
    for node in [node for node in model.get_ordered_ops() if node.get_type_name() == kind]:
        node.input(index).replace_source_output(change(node.input_value(index)).output(0))
    with pytest.raises(ValueError, match="attention cannot be fused: "):
        fuse_attention(model)


def of_type(model, kind):
    return [node for node in model.get_ordered_ops() if node.get_type_name() == kind]


def double(value):
    return ops.multiply(value, np.float32(2)).output(0)


def other_negation(model):
    for node in of_type(model, "Multiply"):
        factor = node.input_value(1).get_node()
        if factor.get_type_name() == "Constant" and factor.data.ravel().tolist() == [-1.0]:
            node.input(1).replace_source_output(ops.constant(np.full_like(factor.data, -0.5)).output(0))


def other_sines(model):
    (sine,) = of_type(model, "Sin")
    sine.input(0).replace_source_output(double(sine.input_value(0)))


def other_sines_of(count):
    """Of the first `count` that are rotated: the queries of the first layer, then its keys."""

    def change(model):
        (sine,) = of_type(model, "Sin")
        readers = [node for node in of_type(model, "Multiply") if node.input_value(1) == sine.output(0)]
        other = double(sine.output(0))
        for node in readers[:count]:
            node.input(1).replace_source_output(other)

    return change


def other_state(model):
    assignment = of_type(model, "Assign")[0]
    assignment.input(0).replace_source_output(double(assignment.input_value(0)))


def other_scale(model):
    for node in of_type(model, "ScaledDotProductAttention"):
        scaled = ops.scaled_dot_product_attention(*node.input_values(), ops.constant(np.float32(0.5)))
        node.output(0).replace(scaled.output(0))


@pytest.mark.parametrize(
    "change, message",
    [
        (other_negation, "is no negation"),
        (other_sines, "cosine and sine are of different angles"),
        (other_sines_of(1), "rotates queries and keys by different angles"),
        (other_sines_of(2), "its layers rotate by different angles"),
        (other_state, "is not what one state variable keeps"),
        (other_scale, r"does not have a mask, and a scale of head_dim \*\* -0.5"),
    ],
)
def test_other_attention_is_left_alone(change, message, exported):
    model = ov.Core().read_model(exported("chatglm3-6b") / "openvino_model.xml")
    change(model)
    with pytest.raises(ValueError, match=f"attention cannot be fused: .*{message}"):
        fuse_attention(model)
