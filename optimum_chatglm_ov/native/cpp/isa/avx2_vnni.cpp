// SPDX-License-Identifier: Apache-2.0
// Byte arithmetic, for int8 caches and for linear layers.
#include "attention/dot_products.hpp"
#include "attention/flash.hpp"
#include "bench/peaks.hpp"
#include "isa/kernels.hpp"
#include "linear/byte_products.hpp"

namespace optimum_chatglm_ov {

const AttentionKernels* avx2_vnni_attention_kernels() {
#if defined(__AVXVNNI__)
    return make_attention_kernels<DotProducts<Int8Dot>, Avx2Vector>();
#else
    return nullptr;
#endif
}

const LinearKernels* avx2_vnni_linear_kernels() {
#if defined(__AVXVNNI__)
    return make_linear_kernels<Int8Dot>();
#else
    return nullptr;
#endif
}

PeakLoop avx2_vnni_peak_loop() {
#if defined(__AVXVNNI__)
    return [](int64_t steps) { CHATGLM_PEAK_PRODUCTS(steps, "%{vex%} vpdpbusd", "ymm"); };
#else
    return nullptr;
#endif
}

}  // namespace optimum_chatglm_ov
