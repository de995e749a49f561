# SPDX-License-Identifier: Apache-2.0
"""A one-node model of the fused attention, and the same in float64 numpy."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from optimum_chatglm_ov.native import load
from optimum_chatglm_ov.native.library import block_tokens, cache_block_bytes
from optimum_chatglm_ov.native.operations import chatglm_attention


INPUTS = ("query", "key", "value", "cos", "sin", "key_cache", "value_cache")
INPUTS += ("past_length", "beam_table", "attention_mask", "context_length")


@dataclass
class Shape:
    """Dimensions of one attention layer."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    rotary_dim: int = 8
    cache_precision: str = "bf16"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


def attention_model(shape: Shape, **other: list[int]) -> ov.Model:
    """A model that is the operation alone; inputs are named as in `INPUTS`, `other` are shapes of some of them."""
    block = cache_block_bytes(shape.cache_precision, shape.head_dim)
    shapes = [[-1, -1, n * shape.head_dim] for n in (shape.heads, shape.kv_heads, shape.kv_heads)]
    shapes += (
        [[-1, -1, shape.rotary_dim]] * 2 + [[-1, shape.kv_heads, -1, block]] * 2 + [[1], [-1, -1], [-1, -1], [-1]]
    )
    types = [ov.Type.f32] * 5 + [ov.Type.u8] * 2 + [ov.Type.i32] * 4
    parameters = []
    for name, dims, element_type in zip(INPUTS, shapes, types):
        parameter = ops.parameter(other.get(name, dims), element_type, name=name)
        parameter.output(0).tensor.set_names({name})
        parameters.append(parameter)
    node = chatglm_attention(
        [p.output(0) for p in parameters],
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.scale,
        shape.cache_precision,
    )
    return ov.Model([node], parameters, "attention")


def compile_model(model: ov.Model, precision: str = "f32", threads: int = 2) -> ov.CompiledModel:
    core = ov.Core()
    load(core)
    config = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    return core.compile_model(model, "CPU", config)


def compile_attention(shape: Shape, precision: str = "f32", threads: int = 2) -> ov.CompiledModel:
    return compile_model(attention_model(shape), precision, threads)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x `[B, L, heads, head_dim]`, cos and sin `[B or 1, L, rotary_dim]`."""
    rotary = cos.shape[-1]
    head, tail = x[..., :rotary], x[..., rotary:]
    turned = np.concatenate([-head[..., rotary // 2 :], head[..., : rotary // 2]], axis=-1)
    return np.concatenate([head * cos[:, :, None] + turned * sin[:, :, None], tail], axis=-1)


@dataclass
class Sequence:
    """Batch rows whose tokens are fed to the operation step by step, with the float64 history beside the caches."""

    shape: Shape
    rows: int
    capacity: int
    seed: int = 0
    sink: float = 0.0
    """How much larger every query's score with the first token is, on average."""
    past: int = 0
    loudness: np.ndarray | None = None
    """What the values of each token are multiplied by, `[capacity]`."""
    keys: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        blocks = -(-self.capacity // block_tokens())
        block = cache_block_bytes(self.shape.cache_precision, self.shape.head_dim)
        dims = (self.rows, self.shape.kv_heads, blocks, block)
        self.caches = [np.full(dims, 0xFF, np.uint8) for _ in range(2)]  # NaN in f32 and bf16
        self.beam_table = np.tile(np.arange(self.rows, dtype=np.int32)[:, None], (1, blocks * block_tokens()))
        self.history = [np.zeros((self.rows, 0, self.shape.kv_heads, self.shape.head_dim)) for _ in range(2)]

    def reorder(self, parents: list[int]) -> None:
        self.beam_table[:, : self.past] = self.beam_table[parents, : self.past]
        self.history = [h[parents] for h in self.history]

    def step(self, request: ov.InferRequest, length: int, mask: np.ndarray, context: np.ndarray | None = None):
        """Feeds `length` random tokens; mask `[rows, past + length]`. Returns (output, expected) `[B, L, H, D]`."""
        context = np.zeros(self.rows, np.int32) if context is None else context
        queries, output = self.append(request, length, mask, context)
        return output, self.expected(queries, mask, context)

    def append(self, request: ov.InferRequest, length: int, mask: np.ndarray, context: np.ndarray):
        """The operation alone, without the reference: (rotated queries, output)."""
        s = self.shape
        q, k, v = (
            self.random.standard_normal((self.rows, length, n * s.head_dim), np.float32)
            for n in (s.heads, s.kv_heads, s.kv_heads)
        )
        if self.loudness is not None:
            v *= self.loudness[None, self.past : self.past + length, None].astype(np.float32)
        if self.sink:  # in the last channels, which are not rotated
            height = (self.sink / s.scale / 8) ** 0.5
            q.reshape(self.rows, length, s.heads, -1)[..., -8:] += height
            k.reshape(self.rows, length, s.kv_heads, -1)[:, : int(not self.past), :, -8:] += height
        angles = self.random.uniform(0, 6.28, (self.random.choice([1, self.rows]), length, s.rotary_dim))
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        feeds = [q, k, v, cos, sin, *self.caches, np.array([self.past], np.int32), self.beam_table]
        feeds += [mask.astype(np.int32), context.astype(np.int32)]
        self.feeds = [np.ascontiguousarray(array) for array in feeds]  # the request has their memory, not them
        for name, array in zip(INPUTS, self.feeds):
            request.set_tensor(name, ov.Tensor(array, shared_memory=True))
        request.infer()
        output = request.get_output_tensor(0).data.reshape(self.rows, length, s.heads, s.head_dim).copy()

        heads = [x.reshape(self.rows, length, -1, s.head_dim).astype(np.float64) for x in (q, k, v)]
        q64, k64 = (rotate(x, cos.astype(np.float64), sin.astype(np.float64)) for x in heads[:2])
        self.history = [np.concatenate([h, new], axis=1) for h, new in zip(self.history, (k64, heads[2]))]
        self.past += length
        return q64, output

    def expected(self, queries: np.ndarray, mask: np.ndarray, context: np.ndarray) -> np.ndarray:
        group = self.shape.heads // self.shape.kv_heads
        keys, values = (np.repeat(h, group, axis=2).transpose(0, 2, 1, 3) for h in self.history)
        scores = queries.transpose(0, 2, 1, 3) @ keys.swapaxes(2, 3) * self.shape.scale
        position = np.arange(self.past - queries.shape[1], self.past)[None, :, None]
        index = np.arange(self.past)[None, None]
        visible = ((index <= position) | (index < context[:, None, None])) & (mask[:, None] != 0)
        scores = np.where(visible[:, None], scores, -np.inf)
        weights = np.exp(scores - np.maximum(scores.max(axis=-1, keepdims=True), -1e300))
        weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
        return (weights @ values).transpose(0, 2, 1, 3)


def relative_error(output: np.ndarray, expected: np.ndarray) -> float:
    assert np.isfinite(output).all()
    return float(np.linalg.norm(output - expected) / max(np.linalg.norm(expected), 1e-30))
