// SPDX-License-Identifier: Apache-2.0
// The activation functions of an MLP, on the f32 vectors of any instruction set.
#pragma once

#include "simd/vector.hpp"

namespace optimum_chatglm_ov {
namespace {

// 1 / (1 + exp(-t)). exp2 takes numbers below 127.
template <class Vector>
Vector sigmoid(Vector t) {
    const Vector exponent = Vector::minimum(Vector::multiply(t, Vector::all(-1.44269504089f)), Vector::all(126.0f));
    const Vector one = Vector::all(1.0f);
    return Vector::divide(one, Vector::add(one, Vector::template exp2<Exp2<true>>(exponent)));
}

template <class Vector>
Vector silu(Vector x) {
    return Vector::multiply(x, sigmoid(x));
}

// The tanh form, which is x * sigmoid of a cubic.
template <class Vector>
Vector gelu(Vector x) {
    const Vector cubic = Vector::multiply_add(Vector::multiply(x, x), Vector::all(0.0713548162726f),
                                              Vector::all(1.59576912161f));  // 2 sqrt(2 / pi)
    return Vector::multiply(x, sigmoid(Vector::multiply(x, cubic)));
}

}  // namespace
}  // namespace optimum_chatglm_ov
