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

    using Totals = WideSums;
    static WideSums sums_of(const Totals& totals) { return totals; }

    // Writes 64 numbers times `inverse` as 16-bit integers, their high and their low bytes, both with signs.
    static void round_wide(const float* x, float inverse, int8_t* high_bytes, int8_t* low_bytes, Totals& totals) {
        for (int i = 0; i < 64; i++) {
            const int32_t whole = to_integer(x[i] * inverse), high = (whole + 128) >> 8, low = whole - 256 * high;
            high_bytes[i] = static_cast<int8_t>(high), low_bytes[i] = static_cast<int8_t>(low);
            totals.high += high, totals.low += low;
        }
    }
    // Writes 64 numbers times `inverse` as 8-bit integers: low ones, whose high bytes are 0.
    static void round_bytes(const float* x, float inverse, int8_t* bytes, Totals& totals) {
        for (int i = 0; i < 64; i++) {
            const int32_t whole = to_integer(x[i] * inverse);
            bytes[i] = static_cast<int8_t>(whole);
            totals.low += whole;
        }
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

    struct Totals {
        __m512i whole, high;
    };
    static WideSums sums_of(const Totals& totals) {
        return {_mm512_reduce_add_epi32(totals.high),
                _mm512_reduce_add_epi32(_mm512_sub_epi32(totals.whole, _mm512_slli_epi32(totals.high, 8)))};
    }

    static void round_wide(const float* x, float inverse, int8_t* high_bytes, int8_t* low_bytes, Totals& totals) {
        const Integers whole = round_all(x, inverse);
        const auto high = [&](int i) {
            return _mm512_srai_epi32(_mm512_add_epi32(whole.part[i], _mm512_set1_epi32(128)), 8);
        };
        const auto low = [&](int i) { return _mm512_and_si512(whole.part[i], _mm512_set1_epi32(255)); };
        const Integers highs{{high(0), high(1), high(2), high(3)}}, lows{{low(0), low(1), low(2), low(3)}};
        totals.whole = _mm512_add_epi32(totals.whole, sum(whole));
        totals.high = _mm512_add_epi32(totals.high, sum(highs));
        store_bytes(_mm512_packs_epi16(words(highs, 0), words(highs, 2)), high_bytes);
        store_bytes(_mm512_packus_epi16(words(lows, 0), words(lows, 2)), low_bytes);
    }

    static void round_bytes(const float* x, float inverse, int8_t* bytes, Totals& totals) {
        const Integers whole = round_all(x, inverse);
        totals.whole = _mm512_add_epi32(totals.whole, sum(whole));
        store_bytes(_mm512_packs_epi16(words(whole, 0), words(whole, 2)), bytes);
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
    struct Integers {  // 64 i32
        __m512i part[4];
    };
    static Integers round_all(const float* x, float inverse) {
        const __m512 factor = _mm512_set1_ps(inverse);
        const auto part = [&](int i) {
            return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), factor));
        };
        return {{part(0), part(1), part(2), part(3)}};
    }
    static __m512i sum(const Integers& x) {
        return _mm512_add_epi32(_mm512_add_epi32(x.part[0], x.part[1]), _mm512_add_epi32(x.part[2], x.part[3]));
    }
    static __m512i words(const Integers& x, int i) { return _mm512_packs_epi32(x.part[i], x.part[i + 1]); }
    // Packing puts together what the same 128 bits of its operands hold.
    static void store_bytes(__m512i bytes, int8_t* target) {
        const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
        _mm512_storeu_si512(target, _mm512_permutexvar_epi32(order, bytes));
    }
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
