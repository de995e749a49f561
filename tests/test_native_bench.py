# SPDX-License-Identifier: Apache-2.0
"""The measurement of attention alone runs every way on small shapes (its figures are not tested)."""

import numpy as np
import pytest

from optimum_chatglm_ov.native.bench_attention import AttentionShape, _Paged, _Stateful, measure_attention


SHAPE = AttentionShape(num_attention_heads=4, num_key_value_heads=2, head_dim=64, rotary_dim=32)


@pytest.mark.parametrize(("new_tokens", "past_tokens"), [(40, 0), (1, 70)])
def test_every_way_is_measured(new_tokens, past_tokens):
    results = measure_attention(SHAPE, new_tokens, past_tokens, layers=2, repetitions=1, threads=1)
    ways = ["fused", "fused-int8", "sdpa", "paged", "torch-bf16", "torch-f32"]
    assert [m.way for m in results] == ways
    pairs = sum(past_tokens + i + 1 for i in range(new_tokens))
    for m, bits in zip(results, (16, 8, 8, 8, 16, 32)):
        assert m.seconds > 0
        assert m.gigaflops * m.seconds * 1e9 == pytest.approx(2 * 2 * pairs * 4 * 64)
        assert m.gigabytes * m.seconds * 1e9 == pytest.approx(2 * (past_tokens + new_tokens) * 2 * 64 * bits / 8)


def test_the_ways_compute_the_same():
    def output(way):
        call = way.prepare(40, 0)
        return next(iter(call().values())).reshape(40, -1)

    config = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    expected = output(_Stateful(SHAPE, 2, None, config))
    np.testing.assert_allclose(output(_Stateful(SHAPE, 2, "f32", config)), expected, atol=1e-4)
    np.testing.assert_allclose(output(_Paged(SHAPE, 2, {"INFERENCE_PRECISION_HINT": "f32"})), expected, atol=0.05)
