// SPDX-License-Identifier: Apache-2.0
// How many products a second the CPU computes where memory plays no part.
#pragma once

#include <cstdint>

namespace optimum_chatglm_ov {

class Executor;  // parallel.hpp

// Operations a second, 2 for a multiply-add, of products that stay in registers on all threads of the executor: the
// best of a few runs. kind: "tile-bf16", "tile-int8", "vnni-int8" or "f32" (vectors); 0 for another, and where the CPU
// has no such instructions.
double peak_operations(const char* kind, const Executor& executor);

// Vectors of sums that the loops below keep: more than an instruction's latency times the number started in a cycle.
constexpr int64_t kPeakSums = 12;

// `steps` times kPeakSums products; null where the build's target has no such instructions.
using PeakLoop = void (*)(int64_t steps);
PeakLoop avx2_vnni_peak_loop();

// The body of such a loop: the registers, named `vector` (ymm or zmm), hold zeros, of which no product is slow. As
// assembly, for no compiler to leave out what nobody reads, and for no compiler flag to be needed.
#define CHATGLM_PEAK_PRODUCTS(steps, product, vector)                                                             \
    asm volatile(                                                                                                 \
        "vzeroall\n"                                                                                              \
        "1:\n"                                                                                                    \
        ".irp sum, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11\n" product " %%" vector "14, %%" vector "15, %%" vector   \
        "\\sum\n"                                                                                                 \
        ".endr\n"                                                                                                 \
        "dec %0\n"                                                                                                \
        "jnz 1b\n"                                                                                                \
        "vzeroupper"                                                                                              \
        : "+r"(steps)                                                                                             \
        :                                                                                                         \
        : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
          "xmm12", "xmm13", "xmm14", "xmm15")

}  // namespace optimum_chatglm_ov
