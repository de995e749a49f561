// SPDX-License-Identifier: Apache-2.0
// The two matrix products of attention for vector instruction sets: outer products of register-blocked rows with
// vectors of 16 keys or channels. `Dot` supplies the arithmetic:
//   Element, kPair      what queries, probabilities and panels hold; channels (keys) one multiply-add reduces
//   Accumulator, kLanes f32 vector; Operand: kLanes x kPair elements
//   kScoreRows          rows of queries held in registers against the 32 keys of a block
//   kValueVectors, kValueRows   channels and rows held in registers for probabilities x values
//   kPanelBlocks        cache blocks worked on at a time
#pragma once

#include "vector.hpp"
#include "kernel.hpp"

namespace optimum_chatglm_ov {
namespace {

template <class Dot>
struct DotProducts {
    using Element = typename Dot::Element;
    using Accumulator = typename Dot::Accumulator;
    using Operand = typename Dot::Operand;
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

    // output[r] += sum over the keys of the blocks of weights[r, key] * value[key]
    static void accumulate(Session&, const Element* weights, int64_t weights_stride, int64_t rows,
                           const Element* const* values, int64_t blocks, int64_t head_dim, float* output) {
        // Few rows: all channels at once reads the values in the order of memory.
        constexpr int kWide = 128 / kLanes;
        constexpr int kWideRows = Dot::kRegisters / kWide / 2;
        if constexpr (kWideRows >= 1) {
            if (rows <= 2 * kGroupRows && head_dim % 128 == 0) {
                for (int64_t c = 0; c < head_dim; c += 128)
                    value_rows<kWideRows, kWide>(weights, weights_stride, rows, values, blocks, head_dim, output, c);
                return;
            }
        }
        constexpr int kChannels = Dot::kValueVectors * kLanes;
        int64_t c = 0;
        for (; c + kChannels <= head_dim; c += kChannels)
            value_rows<Dot::kValueRows, Dot::kValueVectors>(weights, weights_stride, rows, values, blocks, head_dim,
                                                            output, c);
        for (; c < head_dim; c += 16)
            value_rows<Dot::kValueRows, 16 / kLanes>(weights, weights_stride, rows, values, blocks, head_dim, output,
                                                     c);
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
                        sums[chain][r][v] = Dot::multiply_add(q, key[v], sums[chain][r][v]);
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
    static void value_rows(const Element* weights, int64_t weights_stride, int64_t rows,
                           const Element* const* values, int64_t blocks, int64_t head_dim, float* output, int64_t c) {
        int64_t r = 0;
        for (; r + kRows <= rows; r += kRows)
            value_tile<kRows, kVectors>(weights + r * weights_stride, weights_stride, values, blocks, head_dim,
                                        output + r * head_dim, c);
        if constexpr (kRows > 1)
            if (r < rows)
                value_rows<kRows / 2, kVectors>(weights + r * weights_stride, weights_stride, rows - r, values, blocks,
                                                head_dim, output + r * head_dim, c);
    }

    template <int kRows, int kVectors>
    static void value_tile(const Element* weights, int64_t weights_stride, const Element* const* values,
                           int64_t blocks, int64_t head_dim, float* output, int64_t c) {
        Accumulator sums[kRows][kVectors];
        for (int r = 0; r < kRows; r++)
            for (int v = 0; v < kVectors; v++) sums[r][v] = Dot::load_sum(output + r * head_dim + c + v * kLanes);
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
            for (int v = 0; v < kVectors; v++) Dot::store(output + r * head_dim + c + v * kLanes, sums[r][v]);
    }
};

// f32 multiply-adds over any vector type.
template <class Vector>
struct F32Dot {
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
    static Vector load_sum(const float* p) { return Vector::load(p); }
    static Vector broadcast(const float* p) { return Vector::all(*p); }
    static Vector multiply_add(Vector a, Vector b, Vector c) { return Vector::multiply_add(a, b, c); }
    static Vector add(Vector a, Vector b) { return Vector::add(a, b); }
    static void store(float* p, Vector v) { v.store(p); }
};

#if defined(__AVX512BF16__)
// vdpbf16ps: 16 sums of two bf16 products, accumulated in f32.
struct Bf16Dot {
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
    static __m512 load_sum(const float* p) { return _mm512_loadu_ps(p); }
    static __m512bh broadcast(const uint16_t* p) {
        int pair;
        std::memcpy(&pair, p, 4);
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    static __m512 multiply_add(__m512bh a, __m512bh b, __m512 c) { return _mm512_dpbf16_ps(c, a, b); }
    static __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
    static void store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
};
#endif

}  // namespace
}  // namespace optimum_chatglm_ov
