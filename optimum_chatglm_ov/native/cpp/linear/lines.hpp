// SPDX-License-Identifier: Apache-2.0
// What tile_linear.hpp asks of vectors: weights and activations to bf16, 64 bytes at a time.
//
// Weights: a unit is 8 input features of 16 columns. It becomes four tile rows of 16 columns x 2 features: features
// (0, 2), (4, 6), (1, 3), (5, 7), which takes no permutation, since they are 16 bits apart where they are stored.
// Integers become f16 and from there bf16 times 2^-112: the five exponent bits of the one are put into the place of
// the other's, shifting by three; which is exact for integers of 8 bits.
#pragma once

#include "linear/concepts.hpp"

namespace optimum_chatglm_ov {
namespace {

struct PortableLines {
    using Vector = PortableVector;

    static Vector from_half(const f16* p) {
        Vector r;
        for (int i = 0; i < Vector::kLanes; i++) r.lane[i] = half(p[i]);
        return r;
    }
    static Vector from_bytes(const uint8_t* p) {
        Vector r;
        for (int i = 0; i < Vector::kLanes; i++) r.lane[i] = static_cast<float>(p[i]);
        return r;
    }

    // 32 numbers become bf16 times 2^64, of each 8 the even ones first. The lanes of `sum` together gain their sum
    // times 2^-48.
    static void pack(const float* x, bf16* line, Vector& sum) {
        for (int i = 0; i < 32; i++) {
            const bf16 rounded = to_bf16(x[i] * 0x1p64f);
            line[i / 8 * 8 + i % 2 * 4 + i % 8 / 2] = rounded;
            sum.lane[i % Vector::kLanes] += to_float(rounded) * 0x1p-112f;
        }
    }

    // The largest magnitude; NaN if one of the numbers is NaN or infinite.
    static float largest(const float* x, int64_t count) {
        float most = 0, none = 0;
        for (int64_t i = 0; i < count; i++) {
            most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
            none += x[i] * 0.0f;
        }
        return most + none;
    }

    static float squares(const float* x, int64_t count) {
        float sum = 0;
        for (int64_t i = 0; i < count; i++) sum += x[i] * x[i];
        return sum;
    }

    // Writes numbers times `inverse` as 16-bit integers, and returns the sums of their bytes, both with signs.
    static WideSums round_wide(const float* x, int64_t count, float inverse, const WideTarget& target) {
        WideSums sums{0, 0};
        for (int64_t i = 0; i < count; i++) {
            const int32_t whole = to_integer(x[i] * inverse), high = (whole + 128) >> 8, low = whole - 256 * high;
            int8_t* place = target.high + i / 64 * target.stride + i % 64;
            place[0] = static_cast<int8_t>(high), place[target.low] = static_cast<int8_t>(low);
            sums.high += high, sums.low += low;
        }
        return sums;
    }
    // Writes numbers times `inverse` as 8-bit integers, 64 of them every `stride` bytes, and returns their sum.
    static int32_t round_bytes(const float* x, int64_t count, float inverse, int8_t* target, int64_t stride) {
        int32_t sum = 0;
        for (int64_t i = 0; i < count; i++) {
            const int32_t whole = to_integer(x[i] * inverse);
            target[i / 64 * stride + i % 64] = static_cast<int8_t>(whole);
            sum += whole;
        }
        return sum;
    }

    // Integers minus another, which is exact.
    static Vector difference(const float* integers, int32_t other) {
        Vector r;
        for (int i = 0; i < Vector::kLanes; i++) r.lane[i] = static_cast<float>(as_integer(integers[i]) - other);
        return r;
    }

    // 256 * high + low, of integers whose high and low bytes have sums of their own.
    static Vector wide(const float* high, const float* low) {
        Vector r;
        for (int i = 0; i < Vector::kLanes; i++)
            r.lane[i] = static_cast<float>(as_integer(high[i]) * 256 + as_integer(low[i]));
        return r;
    }

    // The low, then the high halves of 64 bytes.
    static void split_halves(const uint8_t* stored, uint8_t* target) {
        for (int i = 0; i < 64; i++) target[i] = stored[i] & 15, target[64 + i] = stored[i] >> 4;
    }

    // Bytes of features 0 .. 3 and 4 .. 7, minus 128.
    static void convert_bytes(const uint8_t* low, const uint8_t* high, bf16* target) {
        for (int column = 0; column < 16; column++)
            for (int k = 0; k < 8; k++) {
                const uint8_t* bytes = k < 4 ? low : high;
                put(static_cast<float>(bytes[column * 4 + k % 4] - 128), k, column, target);
            }
    }
    // Half bytes of features 0 .. 3 (low) and 4 .. 7 (high), minus 8.
    static void convert_halves(const uint8_t* stored, bf16* target) {
        for (int column = 0; column < 16; column++)
            for (int k = 0; k < 8; k++)
                put(static_cast<float>((stored[column * 4 + k % 4] >> k / 4 * 4 & 15) - 8), k, column, target);
    }
    // The same times scales, minus zero points.
    static void convert_scaled_bytes(const uint8_t* low, const uint8_t* high, const f16* scales,
                                     const uint8_t* zero_points, bf16* target) {
        for (int column = 0; column < 16; column++)
            for (int k = 0; k < 8; k++) {
                const uint8_t* bytes = k < 4 ? low : high;
                put(static_cast<float>(bytes[column * 4 + k % 4] - zero_points[column]) * half(scales[column]), k,
                    column, target);
            }
    }
    static void convert_scaled_halves(const uint8_t* stored, const f16* scales, const uint8_t* zero_points,
                                      bf16* target) {
        for (int column = 0; column < 16; column++)
            for (int k = 0; k < 8; k++)
                put(static_cast<float>((stored[column * 4 + k % 4] >> k / 4 * 4 & 15) - zero_points[column]) *
                        half(scales[column]),
                    k, column, target);
    }

private:
    static int32_t to_integer(float x) { return x == x ? static_cast<int32_t>(std::nearbyint(x)) : 0; }
    static int32_t as_integer(float x) { return static_cast<int32_t>(as_bits(x)); }
    static float half(f16 number) {
        const uint32_t sign = static_cast<uint32_t>(number.bits & 0x8000u) << 16, rest = number.bits & 0x7fffu;
        const bool is_denormal = rest < 0x400;  // as an f32 it would be one too, which the CPU may take for 0
        const float magnitude =
            is_denormal ? static_cast<float>(rest) * 0x1p-24f : as_float((rest << 13) + (112u << 23));
        return as_float(sign | as_bits(magnitude));
    }
    static void put(float weight, int k, int column, bf16* target) {
        target[(k % 2 * 2 + k / 4) * 32 + column * 2 + k % 4 / 2] = to_bf16(weight * 0x1p-112f);
    }
};

#if defined(__AVX512BF16__)
struct Avx512Lines {
    using Vector = Avx512Vector;

    static Vector from_half(const f16* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    static Vector from_bytes(const uint8_t* p) {
        return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
    }

    static void pack(const float* x, bf16* line, Vector& sum) {
        const __m512 shift = _mm512_set1_ps(0x1p64f);
        const __m512bh pairs = _mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_loadu_ps(x + 16), shift),
                                                   _mm512_mul_ps(_mm512_loadu_ps(x), shift));
        const __m512i order = _mm512_set_epi16(31, 29, 27, 25, 30, 28, 26, 24, 23, 21, 19, 17, 22, 20, 18, 16, 15, 13,
                                               11, 9, 14, 12, 10, 8, 7, 5, 3, 1, 6, 4, 2, 0);
        _mm512_storeu_si512(line, _mm512_permutexvar_epi16(order, (__m512i)pairs));
        const __m512bh small = (__m512bh)_mm512_set1_epi16(0x0780);  // 2^-112
        sum = {_mm512_dpbf16_ps(sum.v, pairs, small)};
    }

    static float largest(const float* x, int64_t count) {
        __m512 most[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, none[2] = {most[0], most[0]};
        for (int64_t i = 0; i < count; i += 32)
            for (int j = 0; j < 2; j++) {
                const __m512 v = _mm512_loadu_ps(x + i + 16 * j);
                most[j] = _mm512_max_ps(most[j], _mm512_abs_ps(v));
                none[j] = _mm512_fmadd_ps(v, _mm512_setzero_ps(), none[j]);
            }
        return _mm512_reduce_max_ps(_mm512_max_ps(most[0], most[1])) +
               _mm512_reduce_add_ps(_mm512_add_ps(none[0], none[1]));
    }

    static float squares(const float* x, int64_t count) {
        __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t i = 0; i < count; i += 32)
            for (int j = 0; j < 2; j++) {
                const __m512 v = _mm512_loadu_ps(x + i + 16 * j);
                sums[j] = _mm512_fmadd_ps(v, v, sums[j]);
            }
        return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
    }

    static WideSums round_wide(const float* x, int64_t count, float inverse, const WideTarget& target) {
        int8_t *high_bytes = target.high, *low_bytes = target.high + target.low;
        const __m512 factor = _mm512_set1_ps(inverse);
        __m512i sum = _mm512_setzero_si512(), high_sums = sum;
        for (int64_t i = 0; i < count; i += 64, high_bytes += target.stride, low_bytes += target.stride)
#    pragma GCC unroll 4
            for (int64_t j = 0; j < 64; j += 16) {
                const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i + j), factor));
                const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
                _mm_storeu_si128(reinterpret_cast<__m128i*>(high_bytes + j), _mm512_cvtepi32_epi8(high));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(low_bytes + j), _mm512_cvtepi32_epi8(whole));
                sum = _mm512_add_epi32(sum, whole);
                high_sums = _mm512_add_epi32(high_sums, high);
            }
        return {_mm512_reduce_add_epi32(high_sums),
                _mm512_reduce_add_epi32(_mm512_sub_epi32(sum, _mm512_slli_epi32(high_sums, 8)))};
    }

    static int32_t round_bytes(const float* x, int64_t count, float inverse, int8_t* target, int64_t stride) {
        const __m512 factor = _mm512_set1_ps(inverse);
        __m512i sums = _mm512_setzero_si512();
        for (int64_t i = 0; i < count; i += 64, target += stride)
#    pragma GCC unroll 4
            for (int64_t j = 0; j < 64; j += 16) {
                const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i + j), factor));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(target + j), _mm512_cvtepi32_epi8(whole));
                sums = _mm512_add_epi32(sums, whole);
            }
        return _mm512_reduce_add_epi32(sums);
    }

    static Vector difference(const float* integers, int32_t other) {
        return {_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(integers), _mm512_set1_epi32(other)))};
    }

    static Vector wide(const float* high, const float* low) {
        const __m512i shifted = _mm512_slli_epi32(_mm512_loadu_si512(high), 8);
        return {_mm512_cvtepi32_ps(_mm512_add_epi32(shifted, _mm512_loadu_si512(low)))};
    }

    static inline __attribute__((always_inline)) void split_halves(const uint8_t* stored, uint8_t* target) {
        const __m512i x = _mm512_loadu_si512(stored), low = _mm512_set1_epi8(15);
        _mm512_store_si512(target, _mm512_and_si512(x, low));
        _mm512_store_si512(target + 64, _mm512_and_si512(_mm512_srli_epi16(x, 4), low));
    }

    static inline __attribute__((always_inline)) void convert_bytes(const uint8_t* low, const uint8_t* high,
                                                                    bf16* target) {
        const __m512i middle = _mm512_set1_epi16(0x6480);  // f16 1024 + 128
        each_line(low, high, [&](__m512i whole, bf16* line) { store(subtract(whole, middle), line); }, target);
    }

    static inline __attribute__((always_inline)) void convert_halves(const uint8_t* stored, bf16* target) {
        // bf16 of q - 8 times 2^-112, for q and q + 16: the lowest of the bits that follow does not matter
        alignas(64) static constexpr uint16_t kTable[32] = {
            0x8900, 0x88e0, 0x88c0, 0x88a0, 0x8880, 0x8840, 0x8800, 0x8780, 0,      0x0780, 0x0800,
            0x0840, 0x0880, 0x08a0, 0x08c0, 0x08e0, 0x8900, 0x88e0, 0x88c0, 0x88a0, 0x8880, 0x8840,
            0x8800, 0x8780, 0,      0x0780, 0x0800, 0x0840, 0x0880, 0x08a0, 0x08c0, 0x08e0};
        const __m512i table = _mm512_load_si512(kTable), x = _mm512_loadu_si512(stored);
        _mm512_store_si512(target, _mm512_permutexvar_epi16(x, table));
        _mm512_store_si512(target + 32, _mm512_permutexvar_epi16(_mm512_srli_epi16(x, 4), table));
        _mm512_store_si512(target + 64, _mm512_permutexvar_epi16(_mm512_srli_epi16(x, 8), table));
        _mm512_store_si512(target + 96, _mm512_permutexvar_epi16(_mm512_srli_epi16(x, 12), table));
    }

    static inline __attribute__((always_inline)) void convert_scaled_bytes(const uint8_t* low, const uint8_t* high,
                                                                           const f16* scales,
                                                                           const uint8_t* zero_points, bf16* target) {
        const __m512i scale = load_scales(scales), zero = load_zero_points(zero_points);
        each_line(
            low, high, [&](__m512i whole, bf16* line) { store_rounded(multiply(subtract(whole, zero), scale), line); },
            target);
    }

    static inline __attribute__((always_inline)) void convert_scaled_halves(const uint8_t* stored, const f16* scales,
                                                                            const uint8_t* zero_points, bf16* target) {
        const __m512i scale = load_scales(scales), zero = load_zero_points(zero_points);
        const __m512i x = _mm512_loadu_si512(stored);
        const auto line = [&](__m512i shifted, bf16* place) __attribute__((always_inline)) {
            const __m512i whole = merge(shifted, _mm512_set1_epi16(15));
            store_rounded(multiply(subtract(whole, zero), scale), place);
        };
        line(x, target);
        line(_mm512_srli_epi16(x, 4), target + 32);
        line(_mm512_srli_epi16(x, 8), target + 64);
        line(_mm512_srli_epi16(x, 12), target + 96);
    }

private:
    // f16 1024 + the bits of x that `kept` names
    static __m512i merge(__m512i x, __m512i kept) {
        return _mm512_ternarylogic_epi32(x, kept, _mm512_set1_epi16(0x6400), 0xea);  // (x & kept) | 1024
    }
    // f16 instructions as assembly: GCC 11 knows no flag for them.
    static __m512i subtract(__m512i a, __m512i b) {
        asm("vsubph %2, %1, %0" : "=v"(a) : "v"(a), "v"(b));
        return a;
    }
    static __m512i multiply(__m512i a, __m512i b) {
        asm("vmulph %2, %1, %0" : "=v"(a) : "v"(a), "v"(b));
        return a;
    }
    template <class Line>
    static inline __attribute__((always_inline)) void each_line(const uint8_t* low, const uint8_t* high,
                                                                const Line& line, bf16* target) {
        const __m512i a = _mm512_loadu_si512(low), b = _mm512_loadu_si512(high);
        const __m512i bytes = _mm512_set1_epi16(255);
        line(merge(a, bytes), target);
        line(merge(b, bytes), target + 32);
        line(merge(_mm512_srli_epi16(a, 8), bytes), target + 64);
        line(merge(_mm512_srli_epi16(b, 8), bytes), target + 96);
    }
    // f16 -> bf16 times 2^-112
    static void store(__m512i x, bf16* line) {
        _mm512_store_si512(line, _mm512_and_si512(_mm512_srai_epi16(x, 3), _mm512_set1_epi16(int16_t(0x8fff))));
    }
    static void store_rounded(__m512i x, bf16* line) { store(_mm512_add_epi16(x, _mm512_set1_epi16(4)), line); }
    static __m512i pairs(__m256i words) {
        const __m512i twice = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6,
                                               5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
        return _mm512_permutexvar_epi16(twice, _mm512_castsi256_si512(words));
    }
    static __m512i load_scales(const f16* scales) {
        return pairs(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
    }
    static __m512i load_zero_points(const uint8_t* zero_points) {
        const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zero_points)));
        return pairs(_mm256_or_si256(words, _mm256_set1_epi16(0x6400)));  // 1024 + zero point
    }
};
#endif

}  // namespace
}  // namespace optimum_chatglm_ov
