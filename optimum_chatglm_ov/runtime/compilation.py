# SPDX-License-Identifier: Apache-2.0
"""How a model is compiled: what the native operations of this package compute of it, and which logits it keeps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov
from openvino import Type
from openvino import opset13 as ops

from .. import environment, native
from ..choices import KV_CACHE_PRECISIONS, canonical
from ..native import NativeBuildError
from ..native.fuse_attention import CacheLayout, cache_layout, fuse_attention
from ..native.fuse_linear import DEFAULT_ACTIVATION_GROUP, fuse_linears
from .engine import LOGITS_TO_KEEP, Engine, FusedEngine, StatefulEngine


logger = logging.getLogger(__name__)

core = ov.Core()
"""Reads and compiles models; the native operations are registered with it once they are needed."""

_GROUP_SIZE = "DYNAMIC_QUANTIZATION_GROUP_SIZE"


def choice(argument: str, value: str | None, choices: tuple[str, ...], variable: str, default: str = "auto") -> str:
    """Returns the name in `choices` of `value`, else of the environment variable, else `default`.

    Raises:
        ValueError: it is none of them.
    """
    name = f"`{argument}`" if value else f"The variable {variable}"
    value = canonical(value or environment.variable(variable) or default)
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}.")
    return value


def compile_engine(
    model: ov.Model,
    *,
    device: str,
    ov_config: Mapping[str, Any],
    attention: str,
    linear: str,
    context_length: int,
) -> Engine:
    """Compiles a copy of `model`, and gives the engine that runs it.

    Args:
        model: a portable IR, or one that was exported with native attention.
        device: OpenVINO device.
        ov_config: OpenVINO properties.
        attention: one of `ATTENTIONS`.
        linear: one of `LINEARS`.
        context_length: tokens that a sequence never exceeds.

    Raises:
        NativeBuildError: `attention="native"` or `linear="native"`, and the native library is not there and cannot be
            built.
        ValueError: one of these, or an IR that was exported with native attention, with another device than CPU;
            `attention="native"` or such an IR, with a `KV_CACHE_PRECISION` or a graph that it does not have;
            `linear="native"` for a model without layers that it takes, or with activations in smaller groups than
            it rounds; a `DYNAMIC_QUANTIZATION_GROUP_SIZE` that is no integer.
    """
    layout = cache_layout(model)  # of an IR that was exported with native attention
    attention = "native" if layout is not None else attention
    group_size = _activation_group_size(model, ov_config)
    rounds = group_size >= DEFAULT_ACTIVATION_GROUP
    linear = "openvino" if linear == "auto" and not rounds else linear
    if linear.startswith("native") and not rounds:
        raise ValueError(
            f"`linear={linear!r}` (or CHATGLM_OV_LINEAR={linear}) rounds activations in groups of at least "
            f"{DEFAULT_ACTIVATION_GROUP}; found {_GROUP_SIZE} {group_size}. Leave one out."
        )
    model = with_logits_to_keep(model)
    is_fused = has_native = False
    if _loads_native(attention, linear, device, layout is not None):
        is_fused = attention != "openvino" and _fuse_attention(model, ov_config, layout, attention == "auto")
        has_native = _fuse_linears(model, linear, group_size) or is_fused
    config = _native_config(ov_config) if has_native else dict(ov_config)
    request = core.compile_model(model, device, config).create_infer_request()
    if is_fused:
        return FusedEngine(request, cache_layout(model), context_length)
    return StatefulEngine(request)


def _loads_native(attention: str, linear: str, device: str, holds_attention: bool) -> bool:
    """Loads the native operations where they are wanted; tells whether they are there."""
    chosen = {"attention": attention, "linear": linear}
    asked = [f"{name}={value!r}" for name, value in chosen.items() if value.startswith("native")]
    if not asked and "auto" not in (attention, linear):
        return False
    if device != "CPU":
        if asked:
            remedy = "Take a portable IR" if holds_attention else f"Leave out `{asked[0]}`"
            raise ValueError(f"The native operations run on CPU, not on {device}. {remedy}.")
        logger.info(f"OpenVINO's own operations are used on {device}.")
        return False
    try:
        native.load(core)
    except NativeBuildError as error:
        if asked:
            raise
        what, chooser = "linear layers are", "linear='openvino'"
        if attention == "auto":
            what, chooser = "attention and linear layers are", "attention='openvino'"
        logger.warning(f"OpenVINO's own {what} used (`{chooser}` chooses so without this warning): {error}")
        return False
    return True


def _fuse_attention(
    model: ov.Model, ov_config: Mapping[str, Any], layout: CacheLayout | None, is_optional: bool
) -> bool:
    try:
        fuse_attention(model, _cache_precision(ov_config, layout))
    except ValueError as error:
        if not is_optional:
            raise
        logger.warning(
            f"OpenVINO's own attention is used (`attention='openvino'` chooses it without this warning): {error}"
        )
        return False
    return True


def _fuse_linears(model: ov.Model, linear: str, group_size: int) -> bool:
    if linear == "openvino" or (linear == "auto" and not native.linear_is_fast()):
        return False
    has_linears = fuse_linears(model, group_size, rounds_tokens=linear == "native-int8") > 0
    if linear.startswith("native") and not has_linears:
        raise ValueError(
            f"`linear={linear!r}` (or CHATGLM_OV_LINEAR={linear}): the model has no int8 or int4 linear layers "
            f"that the native operations take, with activations in groups of {group_size}. Leave it out."
        )
    return has_linears


def _native_config(ov_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `ov_config` for a model with native operations.

    For f16 OpenVINO would turn all numbers of the model to f16, those too that the operations take as f32: rotary
    angles of a long text would be wrong. bf16 is what it takes for f16 on CPUs that have no f16 arithmetic.
    """
    is_f16 = _type_name(ov_config.get("INFERENCE_PRECISION_HINT")) == "f16"
    return {**ov_config, **({"INFERENCE_PRECISION_HINT": "bf16"} if is_f16 else {})}


def _activation_group_size(model: ov.Model, ov_config: Mapping[str, Any]) -> int:
    """Finds the size that OpenVINO would take: the property, or the execution mode's, or the IR's, or its default."""
    if _GROUP_SIZE in ov_config:
        try:
            return int(ov_config[_GROUP_SIZE])
        except (TypeError, ValueError):
            raise ValueError(
                f"`ov_config` has {_GROUP_SIZE} {ov_config[_GROUP_SIZE]!r}; expected an integer."
            ) from None
    if "ACCURACY" in str(ov_config.get("EXECUTION_MODE_HINT")):
        return 0
    path = ["runtime_options", _GROUP_SIZE]
    if model.has_rt_info(path):
        return int(model.get_rt_info(path).astype(str))
    return DEFAULT_ACTIVATION_GROUP


def _cache_precision(ov_config: Mapping[str, Any], layout: CacheLayout | None) -> str:
    """Finds the precision of native caches, which the properties choose, or the export of an IR with such caches."""
    name = _type_name(ov_config.get("KV_CACHE_PRECISION"))
    if name is None:
        return "bf16" if layout is None else layout.cache_precision
    if name not in KV_CACHE_PRECISIONS:
        raise ValueError(f"KV_CACHE_PRECISION is {name!r}; fused attention has {', '.join(KV_CACHE_PRECISIONS)}.")
    if layout is not None and layout.cache_precision != KV_CACHE_PRECISIONS[name]:
        raise ValueError(
            f"KV_CACHE_PRECISION is {name!r}, but this IR was exported with fused attention and a cache in "
            f"{layout.cache_precision}. Leave it out, or export again with `kv_cache_precision={name!r}`."
        )
    return KV_CACHE_PRECISIONS[name]


def _type_name(precision: Any) -> str | None:
    """Names an element type in a property, which may be an `ov.Type` or a text."""
    if precision is None:
        return None
    return precision.get_type_name() if isinstance(precision, Type) else str(precision).lower()


def with_logits_to_keep(model: ov.Model) -> ov.Model:
    """Copies `model` and adds an i64 input `logits_to_keep`: the output layer sees only that many last positions.

    The saved model keeps the inputs that every tool knows; constants are shared between the two.
    """
    model = model.clone()
    if any(LOGITS_TO_KEEP in port.names for port in model.inputs):
        return model
    head = model.output("logits").node.input_value(0).get_node()
    if head.get_type_name() != "MatMul":
        logger.warning("The output layer was not found; logits of all positions are computed in every call.")
        return model
    parameter = ops.parameter(ov.PartialShape([]), Type.i64, name=LOGITS_TO_KEEP)
    parameter.output(0).set_names({LOGITS_TO_KEEP})
    start = ops.unsqueeze(ops.negative(parameter), ops.constant(np.int64(0)))
    end = ops.constant(np.array([np.iinfo(np.int64).max]))
    one = ops.constant(np.array([1], dtype=np.int64))
    kept = ops.slice(head.input_value(0), start, end, one, one)
    head.input(0).replace_source_output(kept.output(0))
    model.add_parameters([parameter])
    model.validate_nodes_and_infer_types()
    return model
