# SPDX-License-Identifier: Apache-2.0
"""How a model is compiled: what the native operations of this package compute of it, and which logits it keeps."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import Type
from openvino import opset13 as ops
from optimum.intel.openvino.modeling_base import core

from .. import environment, native
from ..choices import KV_CACHE_PRECISIONS, canonical
from ..native import NativeBuildError
from ..native.cache_state import FusedAttentionState
from ..native.fuse_attention import CacheLayout, cache_layout, fuse_attention
from ..native.fuse_linear import DEFAULT_ACTIVATION_GROUP, fuse_linears


logger = logging.getLogger(__name__)

LOGITS_TO_KEEP = "logits_to_keep"
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


class CompilationMixin:
    """`compile` of an optimum-intel model class; comes before `OVModelForCausalLM` in the list of base classes."""

    _attention = "openvino"
    _linear = "openvino"
    _fused: FusedAttentionState | None = None

    @classmethod
    def _compile_model(
        cls,
        model: ov.Model | str | Path,
        device: str | None = None,
        ov_config: dict | None = None,
        model_save_dir=None,
    ) -> ov.CompiledModel:
        if isinstance(model, (str, Path)):
            model_save_dir = model_save_dir or Path(model).parent
            model = cls.load_model(model)
        return super()._compile_model(_with_logits_to_keep(model), device, ov_config, model_save_dir)

    def compile(self) -> None:
        """Compiles the model, unless it is compiled already.

        Raises:
            NativeBuildError: `attention="native"` or `linear="native"`, and the native library is not there and cannot
                be built.
            ValueError: one of these, or an IR that was exported with fused attention, with another device than CPU;
                `attention="native"` or such an IR, with a `KV_CACHE_PRECISION` or a graph that it does not have;
                `linear="native"` for a model without layers that it takes, or with activations in smaller groups than
                it rounds; a `DYNAMIC_QUANTIZATION_GROUP_SIZE` that is no integer.
        """
        if self.request is not None:
            return
        self._release_caches()
        layout = cache_layout(self.model)  # of an IR that was exported fused
        attention = "native" if layout is not None else self._attention
        group_size = self._activation_group_size()
        rounds = group_size >= DEFAULT_ACTIVATION_GROUP
        linear = "openvino" if self._linear == "auto" and not rounds else self._linear
        if linear.startswith("native") and not rounds:
            raise ValueError(
                f"`linear={linear!r}` (or {environment.LINEAR}={linear}) rounds activations in groups of at least "
                f"{DEFAULT_ACTIVATION_GROUP}; found {_GROUP_SIZE} {group_size}. Leave one out."
            )
        if not self._loads_native(attention, linear, layout is not None):
            super().compile()
            return
        model = _with_logits_to_keep(self.model)
        has_attention = attention != "openvino" and self._fuse_attention(model, layout, attention == "auto")
        if not (self._fuse_linears(model, linear, group_size) or has_attention):
            super().compile()
            return
        self.request = core.compile_model(model, self._device, self._native_config()).create_infer_request()
        if has_attention:
            self._fused = FusedAttentionState(self.request, cache_layout(model), self.config.max_position_embeddings)
            self._fused_inputs = {name for port in model.inputs for name in port.names}

    def clear_requests(self) -> None:
        """Forgets the compiled model and its caches."""
        super().clear_requests()
        self._release_caches()

    def _release_caches(self) -> None:
        if self._fused is not None:
            self._fused.release()  # what a `FusedCache` of it shows is outdated
            self._fused = None

    def _loads_native(self, attention: str, linear: str, holds_attention: bool) -> bool:
        """Whether the native operations are wanted, and are there."""
        chosen = {"attention": attention, "linear": linear}
        asked = [f"{name}={value!r}" for name, value in chosen.items() if value.startswith("native")]
        if not asked and "auto" not in (attention, linear):
            return False
        if self._device != "CPU":
            if asked:
                remedy = "Take a portable IR" if holds_attention else f"Leave out `{asked[0]}`"
                raise ValueError(f"The native operations run on CPU, not on {self._device}. {remedy}.")
            logger.info(f"OpenVINO's own operations are used on {self._device}.")
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

    def _fuse_attention(self, model: ov.Model, layout: CacheLayout | None, is_optional: bool) -> bool:
        try:
            fuse_attention(model, self._fused_cache_precision(layout))
        except ValueError as error:
            if not is_optional:
                raise
            logger.warning(
                f"OpenVINO's own attention is used (`attention='openvino'` chooses it without this warning): {error}"
            )
            return False
        return True

    def _fuse_linears(self, model: ov.Model, linear: str, group_size: int) -> bool:
        if linear == "openvino" or (linear == "auto" and not native.linear_is_fast()):
            return False
        has_linears = fuse_linears(model, group_size, rounds_tokens=linear == "native-int8") > 0
        if linear.startswith("native") and not has_linears:
            raise ValueError(
                f"`linear={linear!r}` (or {environment.LINEAR}={linear}): the model has no int8 or int4 linear layers "
                f"that the native operations take, with activations in groups of {group_size}. Leave it out."
            )
        return has_linears

    def _native_config(self) -> dict:
        """`ov_config` for a model with native operations.

        For f16 OpenVINO would turn all numbers of the model to f16, those too that the operations take as f32: rotary
        angles of a long text would be wrong. bf16 is what it takes for f16 on CPUs that have no f16 arithmetic.
        """
        chosen = self.ov_config.get("INFERENCE_PRECISION_HINT")
        name = chosen.get_type_name() if isinstance(chosen, Type) else str(chosen).lower()
        return self.ov_config | ({"INFERENCE_PRECISION_HINT": "bf16"} if name == "f16" else {})

    def _activation_group_size(self) -> int:
        """What OpenVINO would take: the property, or the execution mode's, or the IR's, or its default."""
        if _GROUP_SIZE in self.ov_config:
            try:
                return int(self.ov_config[_GROUP_SIZE])
            except (TypeError, ValueError):
                raise ValueError(
                    f"`ov_config` has {_GROUP_SIZE} {self.ov_config[_GROUP_SIZE]!r}; expected an integer."
                ) from None
        if "ACCURACY" in str(self.ov_config.get("EXECUTION_MODE_HINT")):
            return 0
        path = ["runtime_options", _GROUP_SIZE]
        if self.model.has_rt_info(path):
            return int(self.model.get_rt_info(path).astype(str))
        return DEFAULT_ACTIVATION_GROUP

    def _fused_cache_precision(self, layout: CacheLayout | None) -> str:
        chosen = self.ov_config.get("KV_CACHE_PRECISION")
        if chosen is None:
            return "bf16" if layout is None else layout.cache_precision
        name = chosen.get_type_name() if isinstance(chosen, Type) else str(chosen).lower()
        if name not in KV_CACHE_PRECISIONS:
            raise ValueError(f"KV_CACHE_PRECISION is {name!r}; fused attention has {', '.join(KV_CACHE_PRECISIONS)}.")
        if layout is not None and layout.cache_precision != KV_CACHE_PRECISIONS[name]:
            raise ValueError(
                f"KV_CACHE_PRECISION is {name!r}, but this IR was exported with fused attention and a cache in "
                f"{layout.cache_precision}. Leave it out, or export again with `kv_cache_precision={name!r}`."
            )
        return KV_CACHE_PRECISIONS[name]


def _with_logits_to_keep(model: ov.Model) -> ov.Model:
    """Copies `model` with an i64 input `logits_to_keep`: the output layer sees only that many last positions.

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
