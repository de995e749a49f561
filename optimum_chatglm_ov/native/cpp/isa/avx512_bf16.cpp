// SPDX-License-Identifier: Apache-2.0
// Dot products of bf16 with f32 sums.
#include "attention/dot_products.hpp"
#include "attention/flash.hpp"
#include "isa/kernels.hpp"

namespace optimum_chatglm_ov {

const AttentionKernels* avx512_bf16_attention_kernels() {
#if defined(__AVX512BF16__)
    return make_attention_kernels<DotProducts<Bf16Dot>, Avx512Vector>();
#else
    return nullptr;
#endif
}

}  // namespace optimum_chatglm_ov
