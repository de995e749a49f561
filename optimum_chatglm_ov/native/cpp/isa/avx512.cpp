// SPDX-License-Identifier: Apache-2.0
// f32 arithmetic: for f32 caches, and for CPUs whose bf16 dot product is absent or no faster.
#include "attention/dot_products.hpp"
#include "attention/flash.hpp"
#include "isa/kernels.hpp"

namespace optimum_chatglm_ov {

const AttentionKernels* avx512_attention_kernels() {
#if defined(__AVX512F__)
    return make_attention_kernels<DotProducts<F32Dot<Avx512Vector>>, Avx512Vector>();
#else
    return nullptr;
#endif
}

}  // namespace optimum_chatglm_ov
