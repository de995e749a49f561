// SPDX-License-Identifier: Apache-2.0
#include "attention/dot_products.hpp"
#include "attention/flash.hpp"

namespace optimum_chatglm_ov {

const Kernels* avx2_kernels() {
#if defined(__AVX2__) && defined(__FMA__)
    return make_kernels<DotProducts<F32Dot<Avx2Vector>>, Avx2Vector>("avx2");
#else
    return nullptr;
#endif
}

}  // namespace optimum_chatglm_ov
