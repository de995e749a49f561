// SPDX-License-Identifier: Apache-2.0
// Linear layers on AMX tiles; weights are converted with f16 arithmetic, which every CPU with AMX has.
#include "linear/tile_kernels.hpp"

namespace optimum_chatglm_ov {

const LinearKernels* amx_linear_kernels() {
#if defined(__AVX512BF16__) && defined(CHATGLM_HAS_F16_ASSEMBLY)
    const LinearKernels* other = avx512_vnni_linear_kernels();
    return other ? make_tile_linear_kernels<TileInstructions, Avx512Lines>("amx", other) : nullptr;
#else
    return nullptr;
#endif
}

}  // namespace optimum_chatglm_ov
