// SPDX-License-Identifier: Apache-2.0
// The two matrix products of attention for vector instruction sets: outer products of register-blocked rows with
// vectors of 16 keys or channels. The arithmetic is a class `Dot`: dots.hpp.
#pragma once

#include "attention/dots.hpp"
#include "attention/products.hpp"

namespace optimum_chatglm_ov {
namespace {

template <class Dot>
struct DotProducts {
    static_assert(IsDot<Dot>::value, "Dot lacks what dots.hpp lists");
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

    static void scores(Session&, RowsView<const Element> query, BlocksView<Element> keys, RowsView<float> scores) {
        for (int64_t b = 0; b < keys.count; b++)
            score_rows<Dot::kScoreRows>(query, keys.blocks[b],
                                        {scores.data + b * kBlockTokens, scores.stride, scores.count});
    }

    static void scores_ahead(Session&, RowsView<const Element> query, BlocksView<Element> keys, RowsView<float> scores,
                             AheadView ahead) {
        constexpr int kRows = Dot::kScoreRows;
        const int64_t step_bytes = ahead.bytes / (keys.head_dim / kPair);
        for (int i = 0; i < 2 && query.count >= kRows; i++) {
            score_tile<kRows, true>(query, keys.blocks[0], scores, ahead.addresses[i], step_bytes);
            query = from_row(query, kRows), scores = from_row(scores, kRows);
        }
        if (query.count > 0) score_rows<kRows>(query, keys.blocks[0], scores);
    }

    static void accumulate(Session&, RowsView<const Element> weights, const float* factors, BlocksView<Element> values,
                           float* output) {
        // Few rows: all channels at once reads the values in the order of memory.
        constexpr int kWide = 128 / kLanes;
        constexpr int kWideRows = Dot::kRegisters / kWide / 2;
        if constexpr (kWideRows >= 1) {
            if (weights.count <= 2 * kGroupRows && values.head_dim % 128 == 0) {
                for (int64_t c = 0; c < values.head_dim; c += 128)
                    value_rows<kWideRows, kWide>(weights, factors, values, c, output);
                return;
            }
        }
        constexpr int kChannels = Dot::kValueVectors * kLanes;
        int64_t c = 0;
        for (; c + kChannels <= values.head_dim; c += kChannels)
            value_rows<Dot::kValueRows, Dot::kValueVectors>(weights, factors, values, c, output);
        for (; c < values.head_dim; c += 16)
            value_rows<Dot::kValueRows, 16 / kLanes>(weights, factors, values, c, output);
    }

private:
    static constexpr int kGroupRows = 8;

    template <class Number>
    static RowsView<Number> from_row(RowsView<Number> rows, int64_t first) {
        return {rows.data + first * rows.stride, rows.stride, rows.count - first};
    }

    // kRows rows at a time, then what is left with fewer registers.
    template <int kRows>
    static void score_rows(RowsView<const Element> query, const Element* keys, RowsView<float> scores) {
        for (; query.count >= kRows; query = from_row(query, kRows), scores = from_row(scores, kRows))
            score_tile<kRows>(query, keys, scores);
        if constexpr (kRows > 1)
            if (query.count > 0) score_rows<kRows / 2>(query, keys, scores);
    }

    // The first kRows rows; meanwhile `ahead_bytes` come closer with each reduction step.
    template <int kRows, bool kAhead = false>
    static void score_tile(RowsView<const Element> query, const Element* keys, RowsView<float> scores,
                           const uint8_t* ahead = nullptr, int64_t ahead_bytes = 0) {
        const int64_t head_dim = query.stride;
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
                    key[v] = Dot::load((v < kHalf ? keys : second) + ((s + chain) * 16 + v % kHalf * kLanes) * kPair);
#pragma GCC unroll 16
                for (int r = 0; r < kRows; r++) {
                    const Operand q = Dot::broadcast(query.data + r * head_dim + (s + chain) * kPair);
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
                Dot::store(scores.data + r * scores.stride + v * kLanes, sum);
            }
    }

    // The same for kVectors vectors of channels from channel c on.
    template <int kRows, int kVectors>
    static void value_rows(RowsView<const Element> weights, const float* factors, BlocksView<Element> values,
                           int64_t c, float* output) {
        for (; weights.count >= kRows; weights = from_row(weights, kRows)) {
            value_tile<kRows, kVectors>(weights, factors, values, c, output);
            factors += kRows, output += kRows * values.head_dim;
        }
        if constexpr (kRows > 1)
            if (weights.count > 0) value_rows<kRows / 2, kVectors>(weights, factors, values, c, output);
    }

    template <int kRows, int kVectors>
    static void value_tile(RowsView<const Element> weights, const float* factors, BlocksView<Element> values,
                           int64_t c, float* output) {
        const int64_t head_dim = values.head_dim;
        Accumulator sums[kRows][kVectors];
        for (int r = 0; r < kRows; r++)
            for (int v = 0; v < kVectors; v++) sums[r][v] = Dot::begin(output + r * head_dim + c + v * kLanes);
        for (int64_t b = 0; b < values.count; b++) {
            const Element* value = values.blocks[b] + c * kPair;
            const Element* weight = weights.data + b * kBlockTokens;
            for (int64_t s = 0; s < kBlockTokens / kPair; s++) {
                Operand operand[kVectors];
#pragma GCC unroll 16
                for (int v = 0; v < kVectors; v++)
                    operand[v] = Dot::load(value + s * head_dim * kPair + v * kLanes * kPair);
#pragma GCC unroll 16
                for (int r = 0; r < kRows; r++) {
                    const Operand w = Dot::broadcast(weight + r * weights.stride + s * kPair);
#pragma GCC unroll 16
                    for (int v = 0; v < kVectors; v++) sums[r][v] = Dot::multiply_add(w, operand[v], sums[r][v]);
                }
            }
        }
        for (int r = 0; r < kRows; r++)
            for (int v = 0; v < kVectors; v++)
                Dot::end(output + r * head_dim + c + v * kLanes, sums[r][v], factors[r]);
    }
};

}  // namespace
}  // namespace optimum_chatglm_ov
