// SPDX-License-Identifier: Apache-2.0
// Byte arithmetic, for int8 caches and for linear layers.
#include "attention/dot_products.hpp"
#include "attention/flash.hpp"
#include "isa/kernels.hpp"
#include "linear/byte_products.hpp"

namespace optimum_chatglm_ov {

const AttentionKernels* avx512_vnni_attention_kernels() {
#if defined(__AVX512VNNI__)
    return make_attention_kernels<DotProducts<Int8Dot>, Avx512Vector>();
#else
    return nullptr;
#endif
}

const LinearKernels* avx512_vnni_linear_kernels() {
#if defined(__AVX512VNNI__)
    return make_linear_kernels<Int8Dot>();
#else
    return nullptr;
#endif
}

}  // namespace optimum_chatglm_ov
