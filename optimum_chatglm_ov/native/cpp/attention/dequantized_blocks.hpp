// SPDX-License-Identifier: Apache-2.0
// Blocks of the int8 cache as bf16, their scales included.
#pragma once

#include "attention/converted_blocks.hpp"
#include "simd/vector.hpp"

namespace optimum_chatglm_ov {
namespace {

#if defined(__AVX512BF16__)
// Four bytes of each of 16 lanes, times scales of their own -> two lines of bf16 pairs.
inline void convert_fours(const uint8_t* source, __m512i flip, const __m512* scales, bf16* first, bf16* second) {
    alignas(64) static constexpr uint16_t kInTurns[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                          21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                          11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(kInTurns);
    const __m512i fours = _mm512_xor_si512(_mm512_loadu_si512(source), flip);
    const auto scaled = [&](__m512i integers, int i) {
        return _mm512_mul_ps(_mm512_cvtepi32_ps(integers), scales[i]);
    };
    const __m512 a = scaled(_mm512_srai_epi32(_mm512_slli_epi32(fours, 24), 24), 0);
    const __m512 b = scaled(_mm512_srai_epi32(_mm512_slli_epi32(fours, 16), 24), 1);
    const __m512 c = scaled(_mm512_srai_epi32(_mm512_slli_epi32(fours, 8), 24), 2);
    const __m512 d = scaled(_mm512_srai_epi32(fours, 24), 3);
    _mm512_storeu_si512(first, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a)));
    _mm512_storeu_si512(second, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(d, c)));
}

inline void dequantize_keys(const uint8_t* block, const float* scales, int64_t head_dim, bf16* target) {
    const __m512i flip = _mm512_set1_epi8(-Int8Block::kKeyOffset);
    for (int64_t half = 0; half < 2; half++) {
        __m512 of_tokens[4];
        for (__m512& s : of_tokens) s = _mm512_loadu_ps(scales + half * 16);
        for (int64_t d = 0; d < head_dim; d += 4, block += 64, target += 64)
            convert_fours(block, flip, of_tokens, target, target + 32);
    }
}

inline void dequantize_values(const uint8_t* block, const float* scales, int64_t head_dim, bf16* target) {
    for (int64_t t = 0; t < kBlockTokens; t += 4, target += 2 * head_dim) {
        __m512 of_tokens[4];
        for (int i = 0; i < 4; i++) of_tokens[i] = _mm512_set1_ps(scales[t + i]);
        for (int64_t d = 0; d < head_dim; d += 16, block += 64, target += 32)
            convert_fours(block, _mm512_setzero_si512(), of_tokens, target, target + 2 * head_dim);
    }
}
#else
inline void dequantize_keys(const uint8_t* block, const float* scales, int64_t head_dim, bf16* target) {
    for (int64_t t = 0; t < kBlockTokens; t++)
        for (int64_t d = 0; d < head_dim; d++)
            target[Bf16Block::key_offset(t, d, head_dim)] =
                to_bf16(scales[t] * to_float(block[Int8Block::key_offset(t, d, head_dim)]));
}

inline void dequantize_values(const uint8_t* block, const float* scales, int64_t head_dim, bf16* target) {
    const int8_t* integers = reinterpret_cast<const int8_t*>(block);
    for (int64_t t = 0; t < kBlockTokens; t++)
        for (int64_t d = 0; d < head_dim; d++)
            target[Bf16Block::value_offset(t, d, head_dim)] =
                to_bf16(scales[t] * to_float(integers[Int8Block::value_offset(t, d, head_dim)]));
}
#endif

}  // namespace
}  // namespace optimum_chatglm_ov
