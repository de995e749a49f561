# SPDX-License-Identifier: Apache-2.0
"""Times the attention of one model alone: the native operation, OpenVINO's stateful and paged ones, and torch's.

All attend, and all but torch's compute rotary embedding and append to the cache, on random numbers. Every figure is
the best of a few repetitions.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import Type
from openvino import opset13 as ops
from openvino._offline_transformations import paged_attention_transformation
from torch.nn.functional import scaled_dot_product_attention

from ..architectures import blocks
from ..native import load
from ..native.cache_state import FusedAttentionState
from ..native.fuse_attention import cache_layout, fuse_attention
from ..native.library import block_tokens
from .turns import best_seconds


_PAGED_BLOCK_TOKENS = 32  # of OpenVINO's PagedAttention on CPU
# What caches with scales hold comes from a prompt of so many tokens, repeated. Of made-up bytes some are denormal or
# far too large scales, with which no way takes as long as with keys and values.
_FILLED_TOKENS = 1024
_CACHE_BITS = {"native": 16, "native-int8": 8, "openvino": 8, "paged": 8, "torch-bf16": 16, "torch-f32": 32}


@dataclass(frozen=True)
class AttentionShape:
    """Dimensions of one attention layer."""

    num_attention_heads: int = 32
    num_key_value_heads: int = 2
    head_dim: int = 128
    rotary_dim: int = 64


CHATGLM3 = AttentionShape()
CHATGLM_6B = AttentionShape(32, 32, 128, 128)


@dataclass(frozen=True)
class Measurement:
    """One way of computing attention, timed."""

    way: str
    new_tokens: int
    past_tokens: int
    seconds: float
    """Of one layer and call."""
    gigaflops: float
    """10^9 multiplications and additions a second that causal attention needs."""
    gigabytes: float
    """10^9 bytes a second of keys and values as this way stores them, each read once: at most memory's bandwidth."""


def attention_stack(shape: AttentionShape, layers: int) -> ov.Model:
    """Builds attention layers alone, in the portable stateful form; each layer's output is the next one's query.

    Inputs besides the usual four: f32 `query` `[B, L, H * D]`, `key` and `value` `[B, L, G * D]`. Output:
    `[B, L, H * D]`.
    """
    graph = blocks.Graph()
    heads, groups, head_dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    states = []
    for name, width in (("query", heads), ("key", groups), ("value", groups)):
        parameter = ops.parameter(ov.PartialShape([-1, -1, width * head_dim]), Type.f32, name=name)
        parameter.output(0).set_names({name})
        states.append(parameter)
    inv_freq = 10000.0 ** -(np.arange(0, shape.rotary_dim, 2) / shape.rotary_dim)
    rotary = blocks.rotary_embedding(graph.position_ids, inv_freq)
    mask = blocks.causal_mask(graph)
    query = states[0]
    for i in range(layers):
        key = blocks.apply_rotary(blocks.split_heads(states[1], groups, head_dim), *rotary, shape.rotary_dim, head_dim)
        cached = [
            blocks.key_value_cache(graph, part, f"{kind}.{i}", groups, head_dim, None)
            for kind, part in (("key", key), ("value", blocks.split_heads(states[2], groups, head_dim)))
        ]
        keys, values = (blocks.repeat_key_value(part, groups, heads, head_dim) for part in cached)
        turned = blocks.apply_rotary(blocks.split_heads(query, heads, head_dim), *rotary, shape.rotary_dim, head_dim)
        query = blocks.attention(turned, keys, values, mask)
    inputs = [graph.input_ids, graph.attention_mask, graph.position_ids, graph.beam_idx]
    return ov.Model([ops.result(query)], graph.assignments, [*inputs, *states], "attention_stack")


def _random_states(shape: AttentionShape, *tokens: int) -> dict[str, np.ndarray]:
    """Makes query, key and value, f32 `[*tokens, width]`."""
    random = np.random.default_rng(0)
    heads = {
        "query": shape.num_attention_heads,
        "key": shape.num_key_value_heads,
        "value": shape.num_key_value_heads,
    }
    return {name: random.standard_normal((*tokens, n * shape.head_dim), np.float32) for name, n in heads.items()}


def _repeat(cache: ov.Tensor, axis: int, filled: int) -> None:
    """Repeats the first `filled` blocks of a cache to its end."""
    blocks = np.moveaxis(cache.data, axis, 0)
    for first in range(filled, len(blocks), filled):
        part = blocks[first : first + filled]
        part[:] = blocks[: len(part)]


# Of a prompt, a copy of the output for Python would take up to half as long as the attention on many cores.
_SHARED = {"share_inputs": True, "share_outputs": True}


class _Stateful:
    """The compiled attention stack, native or (`cache_precision` is `None`) OpenVINO's own."""

    def __init__(self, shape: AttentionShape, layers: int, cache_precision: str | None, config: dict[str, str]):
        self.shape = shape
        core = ov.Core()
        model = attention_stack(shape, layers)
        self.fused = cache_precision is not None
        if cache_precision is not None:
            load(core)
            fuse_attention(model, cache_precision)
        self.request = core.compile_model(model, "CPU", config).create_infer_request()
        self.names = {name for port in model.inputs for name in port.names}
        layout = cache_layout(model)
        if layout is not None:
            self.state = FusedAttentionState(self.request, layout, 1 << 20)

    def _inputs(self, new: int, past: int) -> dict[str, np.ndarray]:
        inputs = _random_states(self.shape, 1, new)
        inputs["input_ids"] = np.zeros((1, new), np.int64)
        inputs["attention_mask"] = np.ones((1, past + new), np.int64)
        inputs["position_ids"] = np.arange(past, past + new)[None]
        inputs["beam_idx"] = np.zeros(1, np.int32)
        return {name: value for name, value in inputs.items() if name in self.names}

    def prepare(self, new: int, past: int) -> Callable[[], Any]:
        """Makes a call that computes `new` tokens after `past` ones."""
        inputs = self._inputs(new, past)
        if self.fused:
            self.state.reset()
            self.state.prepare(1, past + new)
            if past:
                filled = min(past, _FILLED_TOKENS)
                self.request.infer(self._inputs(filled, 0), **_SHARED)
                for cache in self.state.caches:
                    _repeat(cache, 2, -(-filled // block_tokens()))
                self.state.advance(past)
            return lambda: self.request.infer(inputs, **_SHARED)
        self.request.reset_state()
        if past:
            rows = np.random.default_rng(0).standard_normal(
                (1, self.shape.num_key_value_heads, past, self.shape.head_dim), np.float32
            )
            for state in self.request.query_state():
                state.state = ov.Tensor(rows)

        def call() -> Any:
            if not past:
                self.request.reset_state()
            outputs = self.request.infer(inputs, **_SHARED)
            if past:  # the cache has grown, and so has the mask
                inputs["attention_mask"] = np.ones((1, inputs["attention_mask"].shape[1] + new), np.int64)
                inputs["position_ids"] = inputs["position_ids"] + new
            return outputs

        return call


class _Paged:
    """The stack with OpenVINO's PagedAttention, as openvino-genai runs models by default."""

    def __init__(self, shape: AttentionShape, layers: int, config: dict[str, str]):
        self.shape = shape
        model = attention_stack(shape, layers)
        paged_attention_transformation(model)
        self.compiled = ov.Core().compile_model(model, "CPU", config)
        self.request = self.compiled.create_infer_request()

    def _inputs(self, new: int, past: int) -> dict[str, np.ndarray]:
        blocks = -(-(past + new) // _PAGED_BLOCK_TOKENS)
        scalars = {
            "past_lens": [past],
            "subsequence_begins": [0, new],
            "block_indices_begins": [0, blocks],
            "block_indices": range(blocks),
            "max_context_len": past + new,
        }
        inputs: dict[str, np.ndarray] = {name: np.array(value, np.int32) for name, value in scalars.items()}
        inputs |= _random_states(self.shape, new, 1)
        inputs["input_ids"] = np.zeros(new, np.int64)
        inputs["position_ids"] = np.arange(past, past + new)
        return inputs

    def prepare(self, new: int, past: int) -> Callable[[], Any]:
        """Makes a call that computes `new` tokens after `past` ones."""
        blocks = -(-(past + new) // _PAGED_BLOCK_TOKENS)
        caches = []
        for port in self.compiled.inputs:
            if "_cache." in port.any_name:
                shape = [dimension.get_length() for dimension in list(port.partial_shape)[1:]]
                caches.append(ov.Tensor(port.element_type, ov.Shape([blocks, *shape])))
                self.request.set_tensor(port, caches[-1])
        if past:
            filled = min(past, _FILLED_TOKENS)
            self.request.infer(self._inputs(filled, 0), **_SHARED)
            for cache in caches:
                _repeat(cache, 0, -(-filled // _PAGED_BLOCK_TOKENS))
        inputs = self._inputs(new, past)
        return lambda: self.request.infer(inputs, **_SHARED)


def _torch_call(shape: AttentionShape, new: int, past: int, dtype: torch.dtype, layers: int) -> Callable[[], None]:
    heads, groups = shape.num_attention_heads, shape.num_key_value_heads
    if past:  # queries of a group as rows: each key is read once, as in the native operation
        query = torch.randn(1, groups, heads // groups * new, shape.head_dim, dtype=dtype)
        caches = [torch.randn(2, 1, groups, past + new, shape.head_dim, dtype=dtype) for _ in range(layers)]
    else:
        query = torch.randn(1, heads, new, shape.head_dim, dtype=dtype)
        caches = [torch.randn(2, 1, heads, new, shape.head_dim, dtype=dtype) for _ in range(layers)]

    def call() -> None:
        for key, value in caches:
            scaled_dot_product_attention(query, key, value, is_causal=not past)

    return call


def measure_attention(
    shape: AttentionShape = CHATGLM3,
    new_tokens: int = 8192,
    past_tokens: int = 0,
    layers: int | None = None,
    repetitions: int = 3,
    threads: int = 0,
) -> list[Measurement]:
    """Times every way at one length.

    Args:
        shape: dimensions of a layer.
        new_tokens, past_tokens: 8192, 0 is the prefill of a long prompt; 1, 8192 one step of decoding after it.
        layers: how many layers, each with its own cache; unset: 1 for a prompt, 8 for decoding, so that the caches are
            not all in the processor's cache.
        repetitions: the best of these counts.
        threads: 0 = as many as OpenVINO takes.

    Returns:
        One measurement for each way, the native ones first.
    """
    layers = layers or (8 if past_tokens else 1)
    config = {"INFERENCE_NUM_THREADS": str(threads)} if threads else {}
    calls = {}
    for way, precision in (("native", "bf16"), ("native-int8", "i8"), ("openvino", None)):
        calls[way] = _Stateful(shape, layers, precision, config).prepare(new_tokens, past_tokens)
    calls["paged"] = _Paged(shape, layers, config).prepare(new_tokens, past_tokens)
    if threads:
        torch.set_num_threads(threads)
    for way, dtype in (("torch-bf16", torch.bfloat16), ("torch-f32", torch.float32)):
        calls[way] = _torch_call(shape, new_tokens, past_tokens, dtype, layers)
    gc.collect()
    best = best_seconds(calls, repetitions, warm_up_each=past_tokens > 0)
    pairs = new_tokens * past_tokens + new_tokens * (new_tokens + 1) / 2
    flops = 4 * pairs * shape.num_attention_heads * shape.head_dim
    numbers = 2 * (past_tokens + new_tokens) * shape.num_key_value_heads * shape.head_dim
    return [
        Measurement(
            way,
            new_tokens,
            past_tokens,
            seconds / layers,
            flops / (seconds / layers) / 1e9,
            numbers * _CACHE_BITS[way] / 8 / (seconds / layers) / 1e9,
        )
        for way, seconds in best.items()
    ]
