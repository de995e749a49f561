# SPDX-License-Identifier: Apache-2.0
"""The pass that gives linear layers with int8 or int4 weights to the native operations.

Before, each is a `MatMul` of f32 activations with a constant that is converted and scaled, and perhaps an `Add`.
After, `ChatGLMLinear` computes the layers of one input at once, and `ChatGLMMLP` a whole MLP; their weights are packed
in the order that the kernels read them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import openvino as ov
from openvino import Node, Output, Type

from .operations import LinearFormat, chatglm_linear, chatglm_mlp, pack_linear, takes_linear


DEFAULT_ACTIVATION_GROUP = 32
"""Input features that share a scale, as with OpenVINO's own `DYNAMIC_QUANTIZATION_GROUP_SIZE`."""


@dataclass
class _Linear:
    """One layer: what it reads, its weights, and the output that others read."""

    matmul: Node
    format: LinearFormat
    integers: np.ndarray  # u8, as stored: [out_features, bytes of in_features]
    is_signed: bool
    scales: np.ndarray  # f16 [out_features, groups]
    zero_points: np.ndarray | None  # i16 [out_features, groups] or [1]
    bias: np.ndarray | None  # f32 [out_features]
    output: Output

    @property
    def source(self) -> tuple[str, int]:
        value = self.matmul.input_value(0)
        return value.get_node().get_name(), value.get_index()

    def pack(self) -> np.ndarray:
        middle = 1 << (self.format.bits - 1) if self.is_signed else 0
        zero_points = np.zeros(self.scales.shape, np.int16) if self.zero_points is None else self.zero_points
        zero_points = np.broadcast_to(zero_points + middle, self.scales.shape).astype(np.uint8)
        return pack_linear(self.format, self.integers, self.is_signed, self.scales, zero_points, self.bias)


@dataclass
class _MLP:
    first: list[_Linear]  # gate and up, or up alone
    activation: str
    down: _Linear


def fuse_linears(
    model: ov.Model,
    activation_group_size: int = DEFAULT_ACTIVATION_GROUP,
    rounds_tokens: bool = False,
    keeps: Sequence[Node] = (),
) -> int:
    """Replaces the linear layers of `model` whose weights are 8- or 4-bit integers, in place.

    Args:
        model: any model; layers that are built otherwise than in this package stay as they are.
        activation_group_size: input features of a token that are rounded to 8 bits with one scale. Layers whose
            features, or groups of weights, are not multiples of it stay as they are, as do all unless it is a
            multiple of 32: OpenVINO rounds them in groups of its own, or not. Kernels of CPUs with AMX round less
            (linear.hpp).
        rounds_tokens: whether prompts are rounded to 8 bits with one scale a token, where that is faster (AMX),
            weights have 8 bits and one scale a row, and the inputs no outliers: each layer measures them anew.
        keeps: products that stay as they are.

    Returns:
        The number of layers replaced.

    Raises:
        NativeBuildError: the native library is not there and cannot be built.
    """
    kept = {node.get_name() for node in keeps}
    nodes = [node for node in model.get_ordered_ops() if node.get_name() not in kept]
    found = [linear for node in nodes for linear in _match_linear(node, activation_group_size)]
    by_output = {_key(linear.output): linear for linear in found}
    mlps: list[_MLP] = []
    inside: set[int] = set()  # layers of an MLP
    for linear in found:
        for mlp in _match_mlp(linear, by_output):
            layers = {id(layer) for layer in (*mlp.first, mlp.down)}
            if not layers & inside:
                mlps.append(mlp)
                inside |= layers
    if rounds_tokens:
        for linear in found:
            if linear.format.group_size == linear.format.in_features:
                linear.format = replace(linear.format, activation_group_size=linear.format.in_features)
    together: dict[tuple, list[_Linear]] = {}
    for linear in found:
        if id(linear) not in inside:
            together.setdefault((linear.source, linear.format), []).append(linear)
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # packing is native, and lets other threads run
        packed = dict(zip(map(id, found), threads.map(_Linear.pack, found)))
    for linears in together.values():
        node = chatglm_linear(
            linears[0].matmul.input_value(0), linears[0].format, [packed[id(linear)] for linear in linears]
        )
        for linear, output in zip(linears, node.outputs()):
            _replace(linear.output, output)
    for mlp in mlps:
        node = chatglm_mlp(
            mlp.first[0].matmul.input_value(0),
            mlp.first[0].format,
            [packed[id(linear)] for linear in mlp.first],
            mlp.activation,
            mlp.down.format,
            packed[id(mlp.down)],
        )
        _replace(mlp.down.output, node.output(0))
    model.validate_nodes_and_infer_types()
    return len(found)


def _key(output: Output) -> tuple[str, int]:
    return output.get_node().get_name(), output.get_index()


def _replace(old: Output, new: Output) -> None:
    new.get_node().set_friendly_name(old.get_node().get_friendly_name())
    if old.get_names():
        new.set_names(old.get_names())
    for target in list(old.get_target_inputs()):
        target.replace_source_output(new)


def _only_reader(output: Output) -> Node | None:
    readers = list(output.get_target_inputs())
    return readers[0].get_node() if len(readers) == 1 else None


def _source(node: Node, index: int = 0) -> Node:
    return node.input_value(index).get_node()


def _constant(node: Node) -> Node | None:
    """Finds the constant that `node` is, or converts."""
    while node.get_type_name() == "Convert":
        node = _source(node)
    return node if node.get_type_name() == "Constant" else None


def _match_linear(node: Node, activation_group_size: int) -> Iterator[_Linear]:
    """Finds the layer that ends in this `MatMul`, if it is one that the operations take."""
    attributes = node.get_attributes()
    if node.get_type_name() != "MatMul" or attributes["transpose_a"] or not attributes["transpose_b"]:
        return
    if node.get_output_element_type(0) != Type.f32 or node.get_output_partial_shape(0).rank.is_dynamic:
        return
    chain = [_source(node, 1)]  # from the matrix back to the integers
    for kind in ("Convert", "Reshape"):
        if chain[-1].get_type_name() == kind:
            chain.append(_source(chain[-1]))
    if chain[-1].get_type_name() != "Multiply":
        return
    scales = _source(chain[-1], 1)
    chain.append(_source(chain[-1]))
    zero_points = None
    if chain[-1].get_type_name() == "Subtract":
        zero_points = _constant(_source(chain[-1], 1))
        if zero_points is None:
            return
        chain.append(_source(chain[-1]))
    if chain[-1].get_type_name() != "Convert" or any(_only_reader(part.output(0)) is None for part in chain):
        return  # also what an embedding reads: it would be there twice
    integers = _source(chain[-1])
    element_type, shape = integers.get_output_element_type(0), list(integers.get_output_shape(0))
    if integers.get_type_name() != "Constant" or element_type not in (Type.u8, Type.i8, Type.u4, Type.i4):
        return
    each = [*shape[:-1], 1]  # a row, or a group of a row
    if len(shape) not in (2, 3) or list(node.input_value(1).get_shape()) != [shape[0], math.prod(shape[1:])]:
        return
    if not (_is_constant(scales, Type.f16) and list(scales.get_output_shape(0)) == each):
        return
    if zero_points is not None and not (
        _is_constant(zero_points, element_type)
        and (list(zero_points.get_output_shape(0)) == each or math.prod(zero_points.get_output_shape(0)) == 1)
    ):
        return
    rows, groups = shape[0], math.prod(each[1:])
    linear_format = LinearFormat(math.prod(shape[1:]), element_type.bitwidth, shape[-1], activation_group_size)
    if activation_group_size > shape[-1] or not takes_linear(linear_format, rows):
        return
    bias, output = _match_bias(node, rows)
    yield _Linear(
        node,
        linear_format,
        integers.data.view(np.uint8).reshape(rows, -1),
        element_type in (Type.i8, Type.i4),
        scales.data.reshape(rows, groups),
        None if zero_points is None else _small_integers(zero_points),
        bias,
        output,
    )


def _is_constant(node: Node, element_type: Type) -> bool:
    return node.get_type_name() == "Constant" and node.get_output_element_type(0) == element_type


def _match_bias(matmul: Node, rows: int) -> tuple[np.ndarray | None, Output]:
    """Finds what is added to every token, and the output with it."""
    output, rank = matmul.output(0), matmul.get_output_partial_shape(0).rank.get_length()
    reader = _only_reader(output)
    if reader is None or reader.get_type_name() != "Add":
        return None, output
    bias = _constant(_source(reader, 1 if _source(reader) == matmul else 0))
    if bias is None:
        return None, output
    shape = list(bias.get_output_shape(0))
    if not shape or shape[-1] != rows or math.prod(shape) != rows or len(shape) > rank:
        return None, output
    # not `data`, in which bf16 looks like f16
    return bias.get_data(dtype=np.float32).ravel(), reader.output(0)


def _small_integers(zero_points: Node) -> np.ndarray:
    """Converts zero points to i16 `[rows, groups]`, or one for all."""
    shape, element_type = list(zero_points.get_output_shape(0)), zero_points.get_output_element_type(0)
    if element_type in (Type.u4, Type.i4):
        stored = zero_points.data.view(np.uint8).ravel()
        halves = np.stack([stored & 15, stored >> 4], axis=1).ravel()[: math.prod(shape)].astype(np.int16)
        values = halves if element_type == Type.u4 else (halves ^ 8) - 8
    else:
        values = zero_points.data.ravel().astype(np.int16)
    return values if values.size == 1 else values.reshape(shape[0], -1)


def _match_mlp(down: _Linear, by_output: dict[tuple[str, int], _Linear]) -> Iterator[_MLP]:
    """Finds the MLP that ends in `down`, if all its layers are known."""

    def layer(node: Node, index: int = 0) -> _Linear | None:
        """Finds the layer whose output is this input and nothing else."""
        value = node.input_value(index)
        return by_output.get(_key(value)) if _only_reader(value) is not None else None

    hidden = _source(down.matmul)
    if _only_reader(hidden.output(0)) is None:
        return
    if hidden.get_type_name() == "Gelu" and hidden.get_attributes()["approximation_mode"].lower() == "tanh":
        up = layer(hidden)
        if up is not None:
            yield _MLP([up], "gelu", down)
    elif hidden.get_type_name() == "Multiply":
        swish = _source(hidden)
        if swish.get_type_name() != "Swish" or _only_reader(swish.output(0)) is None:
            return
        if swish.get_input_size() > 1:
            beta = _constant(_source(swish, 1))
            if beta is None or beta.get_data(dtype=np.float32).tolist() != 1.0:
                return
        gate, up = layer(swish), layer(hidden, 1)
        if gate is not None and up is not None and gate.source == up.source and gate.format == up.format:
            yield _MLP([gate, up], "silu", down)
