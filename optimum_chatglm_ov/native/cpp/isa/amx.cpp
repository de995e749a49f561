// SPDX-License-Identifier: Apache-2.0
// Tiles of bf16 and of bytes. Linear layers convert weights with f16 arithmetic and multiply a row or two with VNNI,
// both of which the CPUs with AMX have.
#include "attention/tile_flash.hpp"
#include "common/cpu_features.hpp"
#include "isa/kernels.hpp"
#include "linear/tile_kernels.hpp"

namespace optimum_chatglm_ov {

const AttentionKernels* amx_attention_kernels() {
#if defined(__AVX512BF16__)
    return make_tile_attention_kernels<TileInstructions, Avx512Vector>();
#else
    return nullptr;
#endif
}

const LinearKernels* amx_linear_kernels() {
#if defined(__AVX512BF16__) && defined(CHATGLM_HAS_F16_ASSEMBLY)
    const LinearKernels* few_rows = cpu_features().avx512_vnni ? avx512_vnni_linear_kernels() : nullptr;
    return few_rows && cpu_features().avx512_fp16 ? make_tile_linear_kernels<TileInstructions, Avx512Lines>(few_rows)
                                                  : nullptr;
#else
    return nullptr;
#endif
}

}  // namespace optimum_chatglm_ov
