// SPDX-License-Identifier: Apache-2.0
// Byte arithmetic, for int8 caches and for linear layers.
#include "linear/byte_products.hpp"
#include "attention/dot_products.hpp"
#include "attention/flash.hpp"
#include "bench/peaks.hpp"

namespace optimum_chatglm_ov {

const Kernels* avx2_vnni_kernels() {
#if defined(__AVXVNNI__)
    return make_kernels<DotProducts<Int8Dot>, Avx2Vector>("avx2-vnni");
#else
    return nullptr;
#endif
}

const LinearKernels* avx2_vnni_linear_kernels() {
#if defined(__AVXVNNI__)
    return make_linear_kernels<Int8Dot>("avx2-vnni");
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
