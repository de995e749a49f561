// SPDX-License-Identifier: Apache-2.0
// What the CPU can do that kernels ask for.
#pragma once

#include <cstdint>

namespace optimum_chatglm_ov {

struct CpuFeatures {
    bool avx2, avx2_vnni, avx512, avx512_vnni, avx512_bf16, avx512_fp16;
    bool amx_int8, amx_bf16;  // only if the system lets this process use tiles
    bool bf16_dot_is_fast;    // AMD's cores start vdpbf16ps as often as an f32 FMA, Intel's half as often or less
    int64_t l2_bytes;
};
const CpuFeatures& cpu_features();

}  // namespace optimum_chatglm_ov
