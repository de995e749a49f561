// SPDX-License-Identifier: Apache-2.0
// bf16 arithmetic with f32 sums: dot product instructions, or AMX tiles.
#include "attention/dot_products.hpp"
#include "attention/flash.hpp"
#include "attention/tile_flash.hpp"

namespace optimum_chatglm_ov {

#if defined(__AVX512BF16__)
const Kernels* avx512_bf16_kernels() {
    return make_kernels<DotProducts<Bf16Dot>, Avx512Vector>("avx512-bf16");
}
const Kernels* amx_kernels() {
    return make_tile_kernels<TileInstructions, Avx512Vector>("amx");
}
#else
const Kernels* avx512_bf16_kernels() {
    return nullptr;
}
const Kernels* amx_kernels() {
    return nullptr;
}
#endif

}  // namespace optimum_chatglm_ov
