// SPDX-License-Identifier: Apache-2.0
// f32 arithmetic, for every cache.
#include "attention/dot_products.hpp"
#include "attention/flash.hpp"
#include "isa/kernels.hpp"

namespace optimum_chatglm_ov {

const AttentionKernels* avx2_attention_kernels() {
#if defined(__AVX2__) && defined(__FMA__)
    return make_attention_kernels<DotProducts<F32Dot<Avx2Vector>>, Avx2Vector>();
#else
    return nullptr;
#endif
}

}  // namespace optimum_chatglm_ov
