// SPDX-License-Identifier: Apache-2.0
// What Flash holds in memory while it works on a task.
#pragma once

#include "attention/products.hpp"
#include "attention/task.hpp"

namespace optimum_chatglm_ov {
namespace {

constexpr int64_t kRowGroup = 32;  // rows whose scores are in the first-level cache at a time

// Up to kPanelBlocks cache blocks in the form the products read.
template <class Products>
struct FlashPanel : VisibleBlocks<Products::kPanelBlocks> {
    static constexpr int64_t kBlocks = Products::kPanelBlocks;
    static constexpr int64_t kTokens = kBlocks * kBlockTokens;
    using Element = typename Products::Element;

    const uint8_t* stored_keys[kBlocks];
    const uint8_t* stored_values[kBlocks];
    const Element* keys[kBlocks];
    const Element* values[kBlocks];
    const float* key_scales[kBlocks];  // of integers
    const float* value_scales[kBlocks];
};

// One row of scores, on its way to weights.
template <class Element>
struct ScoreRow {
    float* scores;     // of the panel, f32 or i32
    Element* weights;  // likewise
    float& max;
    float& sum;
    float query_scale;   // of integer queries,
    float query_offset;  // whose scores are too large by this
    float& factor;       // of integer sums of weights and values
    float& rest;         // sum of what integer weights were rounded by
};

template <class Products>
struct FlashMemory {
    using Element = typename Products::Element;
    using Panel = FlashPanel<Products>;

    Element* query;       // [rows, head_dim]; the scale is applied to the scores
    float* query_scale;   // [rows]
    float* query_offset;  // [rows]
    float* output;        // [rows, head_dim]
    float* row_max;       // [rows]
    float* row_sum;       // [rows]
    float* scores;        // [kRowGroup, Panel::kTokens]
    Element* weights;     // [kRowGroup, Panel::kTokens]
    float* factors;       // [kRowGroup]
    float* rests;         // [kRowGroup]
    float* value_sum;     // [head_dim], of integer values
    Element* converted;   // [2, kPanelBlocks] blocks
    uint8_t* gathered;    // [2, kPanelBlocks] blocks of the cache's layout
    size_t bytes;

    FlashMemory(const AttentionArguments& a, int64_t rows, void* memory) {
        Parts parts(memory);
        rows = round_up(rows, kRowGroup);
        parts.take(query, rows * a.head_dim);
        parts.take(query_scale, rows);
        parts.take(query_offset, rows);
        parts.take(output, rows * a.head_dim);
        parts.take(row_max, rows);
        parts.take(row_sum, rows);
        parts.take(scores, kRowGroup * Panel::kTokens);
        parts.take(weights, kRowGroup * Panel::kTokens);
        parts.take(factors, kRowGroup);
        parts.take(rests, kRowGroup);
        parts.take(value_sum, a.head_dim);
        parts.take(converted, 2 * Panel::kTokens * a.head_dim);
        parts.take(gathered, 2 * Panel::kBlocks * cache_block_bytes(a.cache_precision, a.head_dim));
        bytes = parts.bytes();
    }

    // Row r, of the group that begins at row `first`.
    ScoreRow<Element> row(int64_t r, int64_t first) const {
        return {scores + (r - first) * Panel::kTokens,
                weights + (r - first) * Panel::kTokens,
                row_max[r],
                row_sum[r],
                query_scale[r],
                query_offset[r],
                factors[r - first],
                rests[r - first]};
    }
};

}  // namespace
}  // namespace optimum_chatglm_ov
