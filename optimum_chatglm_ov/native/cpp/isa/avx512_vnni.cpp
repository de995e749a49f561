// SPDX-License-Identifier: Apache-2.0
// Byte arithmetic, for int8 caches and for linear layers.
#include "linear/byte_products.hpp"
#include "attention/dot_products.hpp"
#include "attention/flash.hpp"

namespace optimum_chatglm_ov {

const Kernels* avx512_vnni_kernels() {
#if defined(__AVX512VNNI__)
    return make_kernels<DotProducts<Int8Dot>, Avx512Vector>("avx512-vnni");
#else
    return nullptr;
#endif
}

const LinearKernels* avx512_vnni_linear_kernels() {
#if defined(__AVX512VNNI__)
    return make_linear_kernels<Int8Dot>("avx512-vnni");
#else
    return nullptr;
#endif
}

}  // namespace optimum_chatglm_ov
