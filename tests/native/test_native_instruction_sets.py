# SPDX-License-Identifier: Apache-2.0
"""Which kernels attention and linear layers choose, by the CPU and by `CHATGLM_OV_ISA`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from native.attention_reference import Sequence, Shape, compile_attention, relative_error
from test_native_linear import input_node, layer, run

from optimum_chatglm_ov.native import instruction_sets, linear_instruction_sets
from optimum_chatglm_ov.native.fuse_linear import fuse_linears


SETS, LINEAR_SETS = instruction_sets(), linear_instruction_sets()


def attend(shape: Shape) -> float:
    sequence = Sequence(shape, 1, capacity=32)
    return relative_error(*sequence.step(compile_attention(shape).create_infer_request(), 8, np.ones((1, 8))))


def multiply() -> np.ndarray:
    x = input_node(64)
    linear = layer(32, 64, "i8")
    model = ov.Model([ov.opset13.matmul(x, linear.node, False, True)], [x], "layer")
    assert fuse_linears(model) == 1
    return run(model, np.ones((1, 3, 64), np.float32))[0]


def test_a_name_that_nobody_knows_is_an_error_everywhere(monkeypatch):
    monkeypatch.setenv("CHATGLM_OV_ISA", "sse9")
    for compute in (lambda: attend(Shape()), multiply):
        with pytest.raises(RuntimeError, match="CHATGLM_OV_ISA: sse9 is not one of ") as caught:
            compute()
        listed = str(caught.value).split("is not one of ")[1].split()[0].split(",")
        assert set(listed) == {*SETS, *LINEAR_SETS}


@pytest.mark.parametrize("name", sorted({*SETS, *LINEAR_SETS} - ({*SETS} & {*LINEAR_SETS})))
def test_a_name_of_one_operation_leaves_the_other_at_its_best(name, monkeypatch):
    monkeypatch.setenv("CHATGLM_OV_ISA", name)
    if name in SETS:
        assert np.isfinite(multiply()).all()
    else:
        assert attend(Shape()) <= 1e-2


def test_a_name_that_does_not_take_the_cache_is_an_error(monkeypatch):
    found = [name for name in SETS if "vnni" in name]
    if not found:
        pytest.skip("every kernel of this CPU takes every cache: it has no VNNI")
    monkeypatch.setenv("CHATGLM_OV_ISA", found[0])
    with pytest.raises(
        RuntimeError, match=f"{found[0]} does not take head_dim 16 with a cache of bf16; these do:.*avx2"
    ):
        attend(Shape())


def test_an_empty_name_is_none(monkeypatch):
    monkeypatch.setenv("CHATGLM_OV_ISA", "")
    assert attend(Shape()) <= 1e-2 and np.isfinite(multiply()).all()


def test_the_order_follows_from_the_cpu():
    if "avx512-bf16" not in SETS:
        pytest.skip("this CPU has no bf16 dot products")
    is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    assert (SETS.index("avx512-bf16") < SETS.index("avx512")) == is_amd
