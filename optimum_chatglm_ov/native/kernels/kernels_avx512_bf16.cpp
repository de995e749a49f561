// SPDX-License-Identifier: Apache-2.0
// bf16 arithmetic with f32 sums: dot product instructions, or AMX tiles.
#include <chrono>

#include "dot_products.hpp"
#include "flash.hpp"
#include "tile_flash.hpp"

namespace optimum_chatglm_ov {

#if defined(__AVX512BF16__)
namespace {

// Seconds of the best of a few runs of 24 independent chains of `Dot` multiply-adds, for each of its products.
template <class Dot>
double time_multiply_adds() {
    alignas(64) typename Dot::Element ones[16 * Dot::kPair] = {};
    double best = 1e9;
    for (int attempt = 0; attempt < 8; attempt++) {
        const auto start = std::chrono::steady_clock::now();
        typename Dot::Accumulator sums[24];
        for (auto& sum : sums) sum = Dot::zero();
        typename Dot::Operand operand = Dot::load(ones);
        for (int i = 0; i < 1000; i++) {
            asm volatile("" : "+v"(operand));
#    pragma GCC unroll 24
            for (int s = 0; s < 24; s++) sums[s] = Dot::multiply_add(operand, operand, sums[s]);
        }
        for (auto& sum : sums) asm volatile("" ::"v"(sum));
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        best = seconds < best ? seconds : best;
    }
    return best / Dot::kPair;
}

}  // namespace

const Kernels* avx512_bf16_kernels() {
    return make_kernels<DotProducts<Bf16Dot>, Avx512Vector>("avx512-bf16");
}
const Kernels* amx_kernels() {
    return make_tile_kernels<TileInstructions, Avx512Vector>("amx");
}
double time_bf16_dot() {
    return time_multiply_adds<Bf16Dot>();
}
double time_f32_fma() {
    return time_multiply_adds<F32Dot<Avx512Vector>>();
}
#else
const Kernels* avx512_bf16_kernels() {
    return nullptr;
}
const Kernels* amx_kernels() {
    return nullptr;
}
double time_bf16_dot() {
    return 1.0;
}
double time_f32_fma() {
    return 1.0;
}
#endif

}  // namespace optimum_chatglm_ov
