# SPDX-License-Identifier: Apache-2.0
"""The pass that gives linear layers with int8 or int4 weights to the native operations.

Before, each is a `MatMul` of f32 activations with a constant that is converted and scaled, and perhaps an `Add`.
After, `ChatGLMLinear` computes the layers of one input at once, and `ChatGLMMLP` a whole MLP; their weights are packed
in the order that the kernels read them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import openvino as ov
from openvino import Node, Output, Type

from .operation import LinearFormat, chatglm_linear, chatglm_mlp, pack_linear, takes_linear


DEFAULT_ACTIVATION_GROUP = 32
"""Input features that share a scale, as with OpenVINO's own `DYNAMIC_QUANTIZATION_GROUP_SIZE`."""
_LARGEST_ACTIVATION_GROUP = 4096


@dataclass
class _Linear:
    """One layer: what it reads, its weights, and the output that others read."""

    matmul: Node
    format: LinearFormat
    integers: np.ndarray  # u8, as stored: [out_features, bytes of in_features]
    is_signed: bool
    scales: np.ndarray  # f16 [out_features, groups]
    zero_points: np.ndarray | None  # [out_features, groups] or broadcast to it
    bias: np.ndarray | None  # f32 [out_features]
    output: Output

    @property
    def source(self) -> tuple[str, int]:
        value = self.matmul.input_value(0)
        return value.get_node().get_name(), value.get_index()

    def pack(self) -> ov.Tensor:
        groups = self.format.in_features // self.format.group_size
        middle = 1 << (self.format.bits - 1) if self.is_signed else 0
        zero_points = np.broadcast_to(
            np.uint8(middle) if self.zero_points is None else self.zero_points.astype(np.int16) + middle,
            (len(self.integers), groups),
        )
        return pack_linear(
            self.format, self.integers, self.is_signed, self.scales, zero_points.astype(np.uint8), self.bias
        )


@dataclass
class _MLP:
    first: list[_Linear]  # gate and up, or up alone
    activation: str
    down: _Linear


def fuse_linears(model: ov.Model, activation_group_size: int = DEFAULT_ACTIVATION_GROUP) -> int:
    """Replaces the linear layers of `model` whose weights are 8- or 4-bit integers, in place.

    Args:
        model: any model; layers that are built otherwise than in this package stay as they are.
        activation_group_size: input features of a token that are rounded to 8 bits with one scale; less where the
            groups of the weights or the features of a layer are not multiples of it. At least 32.

    Returns:
        The number of layers replaced.

    Raises:
        NativeBuildError: the native library is not there and cannot be built.
    """
    found = [linear for node in model.get_ordered_ops() for linear in _match_linear(node, activation_group_size)]
    by_output = {_key(linear.output): linear for linear in found}
    mlps = [mlp for linear in found for mlp in _match_mlp(linear, by_output)]
    inside = {id(linear) for mlp in mlps for linear in (*mlp.first, mlp.down)}
    together: dict[tuple, list[_Linear]] = {}
    for linear in found:
        if id(linear) not in inside:
            together.setdefault((linear.source, linear.format), []).append(linear)
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # packing is native, and lets other threads run
        packed = dict(zip(map(id, found), threads.map(_Linear.pack, found)))
    # from the last to the first, so that no node is left that reads what was replaced
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


def _constant(node: Node) -> np.ndarray | None:
    while node.get_type_name() == "Convert":
        node = _source(node)
    return node.data if node.get_type_name() == "Constant" else None


def _match_linear(node: Node, activation_group_size: int) -> Iterator[_Linear]:
    """The layer that ends in this `MatMul`, if it is one that the operations take."""
    attributes = node.get_attributes()
    if node.get_type_name() != "MatMul" or attributes["transpose_a"] or not attributes["transpose_b"]:
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
        zero_points = _small_integers(_source(chain[-1], 1))
        if zero_points is None:
            return
        chain.append(_source(chain[-1]))
    if chain[-1].get_type_name() != "Convert" or any(_only_reader(part.output(0)) is None for part in chain):
        return  # also what an embedding reads: it would be there twice
    integers = _source(chain[-1])
    element_type = integers.get_element_type()
    if integers.get_type_name() != "Constant" or element_type not in (Type.u8, Type.i8, Type.u4, Type.i4):
        return
    if scales.get_type_name() != "Constant" or scales.get_element_type() != Type.f16:
        return
    shape = list(integers.get_output_shape(0))
    rows, columns = shape[0], int(np.prod(shape[1:]))
    groups = scales.data.size // rows
    if list(node.input_value(1).get_shape()) != [rows, columns] or scales.data.size != rows * groups:
        return
    size = columns // groups
    linear_format = LinearFormat(
        columns, element_type.bitwidth, size, _activation_group(activation_group_size, columns, size)
    )
    if not takes_linear(linear_format, rows):
        return
    output, bias = node.output(0), None
    reader = _only_reader(output)
    if reader is not None and reader.get_type_name() == "Add":
        other = 1 - [value.get_node() for value in reader.input_values()].index(node)
        bias = _constant(_source(reader, other))
        if bias is not None and bias.size == rows and bias.shape[-1] == rows:
            output, bias = reader.output(0), bias.astype(np.float32).ravel()
        else:
            bias = None
    yield _Linear(
        node,
        linear_format,
        integers.data.view(np.uint8).reshape(rows, -1),
        element_type in (Type.i8, Type.i4),
        scales.data.reshape(rows, groups),
        None if zero_points is None or not zero_points.size else _by_row(zero_points, rows),
        bias,
        output,
    )


def _small_integers(node: Node) -> np.ndarray | None:
    """Zero points, which OpenVINO stores in the type of the weights, as i16."""
    while node.get_type_name() == "Convert":
        node = _source(node)
    if node.get_type_name() != "Constant":
        return None
    bytes_, shape = node.data.view(np.uint8).ravel(), list(node.get_output_shape(0))
    element_type = node.get_element_type()
    if element_type in (Type.u8, Type.i8):
        return node.data.reshape(shape).astype(np.int16)
    if element_type not in (Type.u4, Type.i4):
        return None
    halves = np.stack([bytes_ & 15, bytes_ >> 4], axis=1).ravel()[: int(np.prod(shape))].astype(np.int16)
    return (halves if element_type == Type.u4 else (halves ^ 8) - 8).reshape(shape)


def _by_row(zero_points: np.ndarray, rows: int) -> np.ndarray:
    return zero_points.reshape(rows, -1) if zero_points.size % rows == 0 else zero_points.reshape(1, -1)


def _activation_group(wanted: int, in_features: int, group_size: int) -> int:
    size = 1 << (min(wanted, group_size, _LARGEST_ACTIVATION_GROUP).bit_length() - 1)
    while in_features % size or (group_size % size and group_size <= _LARGEST_ACTIVATION_GROUP):
        size //= 2
    return size


def _match_mlp(down: _Linear, by_output: dict[tuple[str, int], _Linear]) -> Iterator[_MLP]:
    """The MLP that ends in `down`, if all its layers are known."""

    def layer(node: Node, index: int = 0) -> _Linear | None:
        """The layer whose output is this input and nothing else."""
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
        if swish.get_input_size() > 1 and _constant(_source(swish, 1)) != 1.0:
            return
        gate, up = layer(swish), layer(hidden, 1)
        if gate is not None and up is not None and gate.source == up.source and gate.format == up.format:
            yield _MLP([gate, up], "silu", down)
