// SPDX-License-Identifier: Apache-2.0
// What the source files of the instruction sets have. They include nothing that would let the linker merge functions
// of files compiled for different instruction sets.
#pragma once

namespace optimum_chatglm_ov {

struct AttentionKernels;  // attention/kernel.hpp
struct LinearKernels;     // linear/linear_kernel.hpp

// Null where the compiler, or the CPU, lacks what they need beside the instruction set of the file; whether the CPU
// has that one, the table asks before.
const AttentionKernels* amx_attention_kernels();
const AttentionKernels* amx_model_attention_kernels();
const AttentionKernels* avx2_attention_kernels();
const AttentionKernels* avx2_vnni_attention_kernels();
const AttentionKernels* avx512_attention_kernels();
const AttentionKernels* avx512_bf16_attention_kernels();
const AttentionKernels* avx512_vnni_attention_kernels();
const AttentionKernels* portable_attention_kernels();
const LinearKernels* amx_linear_kernels();
const LinearKernels* amx_model_linear_kernels();
const LinearKernels* avx2_vnni_linear_kernels();
const LinearKernels* avx512_vnni_linear_kernels();
const LinearKernels* portable_linear_kernels();

}  // namespace optimum_chatglm_ov
