// SPDX-License-Identifier: Apache-2.0
// The two matrix products of attention for vector instruction sets: outer products of register-blocked rows with
// vectors of 16 keys or channels. `Dot` supplies the arithmetic:
//   kStored             the cache precision whose blocks are read as they are
//   Element, kPair      what queries, weights and panels hold; channels (keys) one multiply-add reduces
//   Accumulator, kLanes vector of f32 or i32 sums; Operand: kLanes x kPair elements
//   kScoreRows          rows of queries held in registers against the 32 keys of a block
//   kValueVectors, kValueRows   channels and rows held in registers for probabilities x values
//   kPanelBlocks        cache blocks worked on at a time
#pragma once

#include "simd/vector.hpp"
#include "attention/kernel.hpp"

namespace optimum_chatglm_ov {
namespace {

template <class Dot>
struct DotProducts {
    using Element = typename Dot::Element;
    using Accumulator = typename Dot::Accumulator;
    using Operand = typename Dot::Operand;
    static constexpr CachePrecision kStored = Dot::kStored;
    static constexpr int kPair = Dot::kPair;
    static constexpr int kPanelBlocks = Dot::kPanelBlocks;
    static constexpr int kLanes = Dot::kLanes;
    static constexpr int kRowMultiple = 1;

    static bool accepts(int64_t head_dim) { return head_dim % 16 == 0; }

    struct Session {};  // nothing to set up

    // scores[r, 32 b + j] = query[r] . key j of block b
    static void scores(Session&, const Element* query, int64_t rows, const Element* const* keys, int64_t blocks,
                       int64_t head_dim, float* scores, int64_t scores_stride) {
        for (int64_t b = 0; b < blocks; b++)
            score_rows<Dot::kScoreRows>(query, rows, keys[b], head_dim, scores + b * kBlockTokens, scores_stride);
    }

    // The same for one block, while `bytes` of memory at each of the `ahead` addresses come closer.
    static void scores_ahead(Session& session, const Element* query, int64_t rows, const Element* const* keys,
                             int64_t head_dim, float* scores_, int64_t scores_stride, const uint8_t* const* ahead,
                             int64_t bytes) {
        constexpr int kRows = Dot::kScoreRows;
        int64_t r = 0;
        for (int i = 0; i < 2 && r + kRows <= rows; i++, r += kRows)
            score_tile<kRows, true>(query + r * head_dim, keys[0], head_dim, scores_ + r * scores_stride,
                                    scores_stride, ahead[i], bytes / (head_dim / kPair));
        if (r < rows)
            scores(session, query + r * head_dim, rows - r, keys, 1, head_dim, scores_ + r * scores_stride,
                   scores_stride);
    }

    // output[r] += sum over the keys of the blocks of weights[r, key] * value[key], times factors[r] for integers
    static void accumulate(Session&, const Element* weights, int64_t weights_stride, int64_t rows,
                           const float* factors, const Element* const* values, int64_t blocks, int64_t head_dim,
                           float* output) {
        // Few rows: all channels at once reads the values in the order of memory.
        constexpr int kWide = 128 / kLanes;
        constexpr int kWideRows = Dot::kRegisters / kWide / 2;
        if constexpr (kWideRows >= 1) {
            if (rows <= 2 * kGroupRows && head_dim % 128 == 0) {
                for (int64_t c = 0; c < head_dim; c += 128)
                    value_rows<kWideRows, kWide>(weights, weights_stride, rows, factors, values, blocks, head_dim,
                                                 output, c);
                return;
            }
        }
        constexpr int kChannels = Dot::kValueVectors * kLanes;
        int64_t c = 0;
        for (; c + kChannels <= head_dim; c += kChannels)
            value_rows<Dot::kValueRows, Dot::kValueVectors>(weights, weights_stride, rows, factors, values, blocks,
                                                            head_dim, output, c);
        for (; c < head_dim; c += 16)
            value_rows<Dot::kValueRows, 16 / kLanes>(weights, weights_stride, rows, factors, values, blocks, head_dim,
                                                     output, c);
    }

private:
    static constexpr int kGroupRows = 8;

    // kRows rows at a time, then what is left with fewer registers.
    template <int kRows>
    static void score_rows(const Element* query, int64_t rows, const Element* keys, int64_t head_dim, float* scores,
                           int64_t stride) {
        int64_t r = 0;
        for (; r + kRows <= rows; r += kRows)
            score_tile<kRows>(query + r * head_dim, keys, head_dim, scores + r * stride, stride);
        if constexpr (kRows > 1)
            if (r < rows)
                score_rows<kRows / 2>(query + r * head_dim, rows - r, keys, head_dim, scores + r * stride, stride);
    }

    template <int kRows, bool kAhead = false>
    static void score_tile(const Element* query, const Element* keys, int64_t head_dim, float* scores, int64_t stride,
                           const uint8_t* ahead = nullptr, int64_t ahead_bytes = 0) {
        constexpr int kVectors = kBlockTokens / kLanes;  // of the block
        constexpr int kHalf = 16 / kLanes;               // of 16 keys
        // One or two rows alone would wait for each multiply-add: two chains, of even and odd reduction steps.
        constexpr int kChains = kRows * kVectors < 8 ? 2 : 1;
        Accumulator sums[kChains][kRows][kVectors];
        for (auto& chain : sums)
            for (auto& row : chain)
                for (auto& sum : row) sum = Dot::zero();
        const int64_t steps = head_dim / kPair;
        const Element* second = keys + 16 * head_dim;
        for (int64_t s = 0; s < steps; s += kChains) {
            if constexpr (kAhead) {
                for (int64_t at = 0; at < ahead_bytes * kChains; at += 64)
                    __builtin_prefetch(ahead + s * ahead_bytes + at, 0, 2);
            }
#pragma GCC unroll 2
            for (int chain = 0; chain < kChains; chain++) {
                Operand key[kVectors];
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; v++)
                    key[v] = Dot::load((v < kHalf ? keys : second) +
                                       ((s + chain) * 16 + v % kHalf * kLanes) * kPair);
#pragma GCC unroll 16
                for (int r = 0; r < kRows; r++) {
                    const Operand q = Dot::broadcast(query + r * head_dim + (s + chain) * kPair);
#pragma GCC unroll 8
                    for (int v = 0; v < kVectors; v++)
                        sums[chain][r][v] = Dot::multiply_add_key(q, key[v], sums[chain][r][v]);
                }
            }
        }
        for (int r = 0; r < kRows; r++)
            for (int v = 0; v < kVectors; v++) {
                Accumulator sum = sums[0][r][v];
                if constexpr (kChains == 2) sum = Dot::add(sum, sums[1][r][v]);
                Dot::store(scores + r * stride + v * kLanes, sum);
            }
    }

    template <int kRows, int kVectors>
    static void value_rows(const Element* weights, int64_t weights_stride, int64_t rows, const float* factors,
                           const Element* const* values, int64_t blocks, int64_t head_dim, float* output, int64_t c) {
        int64_t r = 0;
        for (; r + kRows <= rows; r += kRows)
            value_tile<kRows, kVectors>(weights + r * weights_stride, weights_stride, factors + r, values,
                                        blocks, head_dim, output + r * head_dim, c);
        if constexpr (kRows > 1)
            if (r < rows)
                value_rows<kRows / 2, kVectors>(weights + r * weights_stride, weights_stride, rows - r,
                                                factors + r, values, blocks, head_dim, output + r * head_dim, c);
    }

    template <int kRows, int kVectors>
    static void value_tile(const Element* weights, int64_t weights_stride, const float* factors,
                           const Element* const* values, int64_t blocks, int64_t head_dim, float* output, int64_t c) {
        Accumulator sums[kRows][kVectors];
        for (int r = 0; r < kRows; r++)
            for (int v = 0; v < kVectors; v++)
                sums[r][v] = Dot::begin(output + r * head_dim + c + v * kLanes);
        for (int64_t b = 0; b < blocks; b++) {
            const Element* value = values[b] + c * kPair;
            const Element* weight = weights + b * kBlockTokens;
            for (int64_t s = 0; s < kBlockTokens / kPair; s++) {
                Operand operand[kVectors];
#pragma GCC unroll 16
                for (int v = 0; v < kVectors; v++)
                    operand[v] = Dot::load(value + s * head_dim * kPair + v * kLanes * kPair);
#pragma GCC unroll 16
                for (int r = 0; r < kRows; r++) {
                    const Operand w = Dot::broadcast(weight + r * weights_stride + s * kPair);
#pragma GCC unroll 16
                    for (int v = 0; v < kVectors; v++)
                        sums[r][v] = Dot::multiply_add(w, operand[v], sums[r][v]);
                }
            }
        }
        for (int r = 0; r < kRows; r++)
            for (int v = 0; v < kVectors; v++)
                Dot::end(output + r * head_dim + c + v * kLanes, sums[r][v], factors[r]);
    }
};

// f32 multiply-adds over any vector type.
template <class Vector>
struct F32Dot {
    static constexpr CachePrecision kStored = CachePrecision::f32;
    using Element = float;
    using Accumulator = Vector;
    using Operand = Vector;
    static constexpr int kPair = 1;
    static constexpr int kLanes = Vector::kLanes;
    static constexpr int kPanelBlocks = 4;
    static constexpr int kRegisters = kLanes == 16 ? 32 : 16;
    static constexpr int kScoreRows = kLanes == 16 ? 8 : 3;
    static constexpr int kValueVectors = 2;
    static constexpr int kValueRows = kLanes == 16 ? 8 : 6;

    static Vector zero() { return Vector::all(0.0f); }
    static Vector load(const float* p) { return Vector::load(p); }
    static Vector broadcast(const float* p) { return Vector::all(*p); }
    static Vector multiply_add(Vector a, Vector b, Vector c) { return Vector::multiply_add(a, b, c); }
    static Vector multiply_add_key(Vector a, Vector b, Vector c) { return Vector::multiply_add(a, b, c); }
    static Vector add(Vector a, Vector b) { return Vector::add(a, b); }
    static void store(float* p, Vector v) { v.store(p); }
    static Vector begin(const float* output) { return Vector::load(output); }
    static void end(float* output, Vector sum, float) { sum.store(output); }
};

#if defined(__AVX512BF16__)
// vdpbf16ps: 16 sums of two bf16 products, accumulated in f32.
struct Bf16Dot {
    static constexpr CachePrecision kStored = CachePrecision::bf16;
    using Element = uint16_t;
    using Accumulator = __m512;
    using Operand = __m512bh;
    static constexpr int kPair = 2;
    static constexpr int kLanes = 16;
    static constexpr int kPanelBlocks = 8;
    static constexpr int kRegisters = 32;
    static constexpr int kScoreRows = 8;
    static constexpr int kValueVectors = 2;
    static constexpr int kValueRows = 8;

    static __m512 zero() { return _mm512_setzero_ps(); }
    static __m512bh load(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static __m512bh broadcast(const uint16_t* p) {
        int pair;
        std::memcpy(&pair, p, 4);
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    static __m512 multiply_add(__m512bh a, __m512bh b, __m512 c) { return _mm512_dpbf16_ps(c, a, b); }
    static __m512 multiply_add_key(__m512bh a, __m512bh b, __m512 c) { return _mm512_dpbf16_ps(c, a, b); }
    static __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
    static void store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
    static __m512 begin(const float* output) { return _mm512_loadu_ps(output); }
    static void end(float* output, __m512 sum, float) { _mm512_storeu_ps(output, sum); }
};
#endif

// vpdpbusd: sums of four products of unsigned and signed bytes, exact. Queries are signed and keys unsigned, weights
// unsigned and values signed.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
struct Int8Dot {
    static constexpr CachePrecision kStored = CachePrecision::i8;
    using Element = uint8_t;
    static constexpr int kPair = 4;
    static constexpr int kPanelBlocks = 4;
#    if defined(__AVX512VNNI__)
    using Vector = Avx512Vector;
    using Operand = __m512i;
    static constexpr int kRegisters = 32;
    static constexpr int kScoreRows = 8;
    static constexpr int kValueVectors = 2;
    static constexpr int kValueRows = 8;
    static constexpr int kLinearRows = 6;
    static constexpr int kWideRows = 2;
    static constexpr int kLinearVectors = 2;

    static Operand zero() { return _mm512_setzero_si512(); }
    static Operand load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static Operand all(int32_t x) { return _mm512_set1_epi32(x); }
    static Operand dot(Operand bytes, Operand signed_bytes, Operand c) {
        asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(bytes), "v"(signed_bytes));  // GCC 12 spills the intrinsic's sums
        return c;
    }
    static Operand add(Operand a, Operand b) { return _mm512_add_epi32(a, b); }
    static void store(float* p, Operand v) { _mm512_storeu_si512(p, v); }
    static Vector to_float(Operand v) { return {_mm512_cvtepi32_ps(v)}; }
    static Operand low_halves(Operand v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
    static Operand high_halves(Operand v) { return low_halves(_mm512_srli_epi16(v, 4)); }
    static Vector from_half(const uint16_t* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    static Vector from_bytes(const uint8_t* p) {
        return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
    }
#    else
    using Vector = Avx2Vector;
    using Operand = __m256i;
    static constexpr int kRegisters = 16;
    static constexpr int kScoreRows = 3;
    static constexpr int kValueVectors = 2;
    static constexpr int kValueRows = 6;
    static constexpr int kLinearRows = 3;
    static constexpr int kWideRows = 1;
    static constexpr int kLinearVectors = 2;

    static Operand zero() { return _mm256_setzero_si256(); }
    static Operand load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static Operand all(int32_t x) { return _mm256_set1_epi32(x); }
    static Operand dot(Operand bytes, Operand signed_bytes, Operand c) {
        return _mm256_dpbusd_avx_epi32(c, bytes, signed_bytes);
    }
    static Operand add(Operand a, Operand b) { return _mm256_add_epi32(a, b); }
    static void store(float* p, Operand v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
    static Vector to_float(Operand v) { return {_mm256_cvtepi32_ps(v)}; }
    static Operand low_halves(Operand v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
    static Operand high_halves(Operand v) { return low_halves(_mm256_srli_epi16(v, 4)); }
    static Vector from_half(const uint16_t* p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
    }
    static Vector from_bytes(const uint8_t* p) {
        return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
    }
#    endif
    using Accumulator = Operand;
    static constexpr int kLanes = Vector::kLanes;

    static Operand broadcast(const uint8_t* p) {
        int32_t four;
        std::memcpy(&four, p, 4);
        return all(four);
    }
    static Operand multiply_add(Operand weight, Operand value, Operand c) { return dot(weight, value, c); }
    static Operand multiply_add_key(Operand query, Operand key, Operand c) { return dot(key, query, c); }
    static Operand begin(const float*) { return zero(); }
    static void end(float* output, Operand sum, float factor) {
        Vector::multiply_add(to_float(sum), Vector::all(factor), Vector::load(output)).store(output);
    }
};
#endif

}  // namespace
}  // namespace optimum_chatglm_ov
