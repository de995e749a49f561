# SPDX-License-Identifier: Apache-2.0
"""Times the linear layers of one model alone: the native operations against OpenVINO's own.

Weights are random integers in the forms that the export writes. A graph holds as many copies of a layer, each with
weights of its own, as are not all in the processor's cache. What OpenVINO needs to convert f32 activations, where it
computes in bf16, counts. Every figure is the best of a few repetitions.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import openvino as ov
from openvino import Node, Type
from openvino import opset13 as ops

from ..native import load
from ..native.fuse_linear import fuse_linears
from .turns import best_seconds


WEIGHTS = ("int8", "int4")
"""int8 with one scale a row, and int4 with a scale and a zero point for every 64 input features."""
WAYS = ("native", "openvino")
LAYERS = ("qkv", "dense", "mlp", "output")

_INT4_GROUP = 64
_STACK_BYTES = 256 << 20  # of weights in one graph, at least; the ways in turns read twice as many
_FEW_ROWS = 32  # take milliseconds
_FEW_ROWS_REPETITIONS = 10  # as many more


@dataclass(frozen=True)
class LinearShape:
    """Widths of the linear layers of a block, and of the output layer."""

    hidden_size: int = 4096
    qkv_size: int = 4608
    intermediate_size: int = 13696
    vocab_size: int = 65024
    gated: bool = True
    """Whether the MLP is `down(silu(gate) * up)`, else `down(gelu(up))`."""


CHATGLM3 = LinearShape()
CHATGLM_6B = LinearShape(4096, 3 * 4096, 16384, 130528, False)


@dataclass(frozen=True)
class Measurement:
    """One layer, computed by one way, timed."""

    layer: str
    """One of `LAYERS`; "mlp" is all of it."""
    weights: str
    rows: int
    way: str
    seconds: float
    """Of one layer and call."""
    teraflops: float
    """10^12 operations a second, 2 for a multiply-add."""
    gigabytes: float
    """10^9 bytes a second of weights, scales and zero points as exported."""


class _Stack:
    """Copies of one layer in one graph, each with an input `[1, rows, hidden_size]` and weights of its own.

    The outputs are the first row of each copy, so that the rest needs no more memory than in a whole model.
    """

    def __init__(self, shape: LinearShape, layer: str, weights: str, copies: int | None):
        self.random = np.random.default_rng(0)
        self.weights = weights
        self.numbers = self.bytes = 0  # of weights in one copy
        nodes: list[Node] = []
        self.parameters: list[Node] = []
        while len(nodes) < (copies or -(-_STACK_BYTES // self.bytes) if nodes else 1):
            self.numbers = self.bytes = 0
            x = ops.parameter(
                ov.PartialShape([1, -1, shape.hidden_size]), Type.f32, name=f"hidden_states.{len(nodes)}"
            )
            x.output(0).set_names({x.get_friendly_name()})
            self.parameters.append(x)
            nodes.append(self._layer(shape, layer, x))
        i64 = [np.array(values, np.int64) for values in ([0], [1], [1], [1])]
        first_rows = [ops.slice(node, *map(ops.constant, i64)) for node in nodes]
        self.model = ov.Model([ops.result(row) for row in first_rows], self.parameters, f"{layer}_{weights}")

    def _layer(self, shape: LinearShape, layer: str, x: Node) -> Node:
        hidden = shape.hidden_size
        if layer != "mlp":
            sizes = {"qkv": shape.qkv_size, "dense": hidden, "output": shape.vocab_size}
            return self._linear(x, hidden, sizes[layer])
        up = self._linear(x, hidden, shape.intermediate_size)
        if shape.gated:
            between = ops.multiply(ops.swish(self._linear(x, hidden, shape.intermediate_size)), up)
        else:
            between = ops.gelu(up, "tanh")
        return self._linear(between, shape.intermediate_size, hidden)

    def _linear(self, x: Node, in_features: int, out_features: int) -> Node:
        self.numbers += in_features * out_features
        if self.weights == "int8":
            integers = ops.convert(self._integers(Type.i8, [out_features, in_features]), "f16")
            matrix = ops.multiply(integers, self._scales([out_features, 1], in_features, 128))
        else:
            groups = [out_features, in_features // _INT4_GROUP]
            integers = ops.convert(self._integers(Type.u4, [*groups, _INT4_GROUP]), "f16")
            zero_points = ops.convert(self._integers(Type.u4, [*groups, 1]), "f16")
            matrix = ops.multiply(ops.subtract(integers, zero_points), self._scales([*groups, 1], in_features, 8))
            matrix = ops.reshape(matrix, ops.constant(np.array([out_features, in_features])), False)
        return ops.matmul(x, ops.convert(matrix, "f32"), False, True)

    def _integers(self, element_type: Type, shape: list[int]) -> Node:
        tensor = ov.Tensor(element_type, ov.Shape(shape))
        stored = tensor.data.view(np.uint8).reshape(-1)
        stored[:] = self.random.integers(0, 256, stored.size, np.uint8)
        return self._constant(tensor)

    def _scales(self, shape: list[int], in_features: int, largest: int) -> Node:
        """Makes scales with which outputs are about as large as inputs."""
        scales = self.random.uniform(0.5, 1.5, shape) / (largest * in_features**0.5)
        return self._constant(ov.Tensor(scales.astype(np.float16)))

    def _constant(self, tensor: ov.Tensor) -> Node:
        self.bytes += tensor.byte_size
        return ops.constant(tensor, shared_memory=True)


class _Way:
    """The compiled stack."""

    def __init__(self, model: ov.Model, way: str, config: dict[str, str]):
        core = ov.Core()
        if way == "native":
            model = model.clone()
            load(core)
            fuse_linears(model)
        compiled = core.compile_model(model, "CPU", config)
        self.names = [port.any_name for port in compiled.inputs]
        self.request = compiled.create_infer_request()

    def __call__(self, hidden_states: np.ndarray) -> list[np.ndarray]:
        """Computes the first row of each copy, f32 `[1, 1, out_features]`, from f32 `[1, rows, hidden_size]`."""
        return list(self.request.infer(dict.fromkeys(self.names, hidden_states), share_inputs=True).values())


def measure_linear(
    shape: LinearShape = CHATGLM3,
    rows: Sequence[int] = (1, 16, 64, 1024),
    copies: int | None = None,
    repetitions: int = 3,
    threads: int = 0,
) -> Iterator[Measurement]:
    """Times every layer with every form of weights, both ways in turns.

    Args:
        shape: widths of the layers.
        rows: tokens at once.
        copies: how many of a layer, each with its own weights; unset: so many that they have 256 MB.
        repetitions: the best of these counts; for fewer than 32 rows of ten times as many.
        threads: 0 = as many as OpenVINO takes.

    Returns:
        For each layer, form of weights and number of rows the measurements of `WAYS`.
    """
    config = {"INFERENCE_NUM_THREADS": str(threads)} if threads else {}
    random = np.random.default_rng(0)
    for layer in LAYERS:
        for weights in WEIGHTS:
            stack = _Stack(shape, layer, weights, copies)
            ways = {way: _Way(stack.model, way, config) for way in WAYS}
            for count in rows:
                hidden_states = random.standard_normal((1, count, shape.hidden_size), np.float32)
                calls = {way: partial(call, hidden_states) for way, call in ways.items()}
                best = best_seconds(calls, repetitions * (_FEW_ROWS_REPETITIONS if count < _FEW_ROWS else 1))
                for way, total in best.items():
                    seconds = total / len(stack.parameters)
                    teraflops = 2 * count * stack.numbers / seconds / 1e12
                    yield Measurement(layer, weights, count, way, seconds, teraflops, stack.bytes / seconds / 1e9)
            del stack, ways, calls
            gc.collect()
