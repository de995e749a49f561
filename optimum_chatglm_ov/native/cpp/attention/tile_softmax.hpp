// SPDX-License-Identifier: Apache-2.0
// From tiles of scores to tiles of weights, a few rows at a time, for the vector units to work beside the tile unit.
#pragma once

#include "attention/tile_memory.hpp"
#include "simd/vector.hpp"

namespace optimum_chatglm_ov {
namespace {

constexpr int64_t kSliceRows = 4;

// Scores of a row within its group.
inline int64_t score_row_offset(int64_t r) {
    return r / kTileRows * 2 * kTileFloats + r % kTileRows * 16;
}

// Scores of a row with a block, of which the query sees the keys in `visible`: the others at minus infinity.
inline void mask_scores(uint32_t visible, float* scores) {
    for (int64_t j = 0; j < 16; j++) {
        scores[j] = visible >> j & 1 ? scores[j] : kHidden;
        scores[kTileFloats + j] = visible >> (16 + j) & 1 ? scores[kTileFloats + j] : kHidden;
    }
}

// What is left of a block of scores: rows, and where the next one's parts are.
struct Slice {
    int64_t rows;
    const float* scores;
    bf16* weights;
    const float* before;  // sums
    float* after;
    const float* shift;
};

// The next kSliceRows rows.
template <class Vector>
inline __attribute__((always_inline)) void weigh_rows(Slice& slice, float scale) {
    const Vector factor = Vector::all(scale);
    const float* const scores = slice.scores;
    bf16* const weights = slice.weights;
    const float* const before = slice.before;
    float* const after = slice.after;
#pragma GCC unroll 4
    for (int64_t r = 0; r < kSliceRows; r++) {
        const Vector shift = Vector::all(slice.shift[r]);
        const auto weight = [&](int64_t j) {
            return Vector::weight(Vector::multiply_add(Vector::load(scores + r * 16 + j), factor, shift));
        };
#pragma GCC unroll 2
        for (int64_t j = 0; j < 16; j += Vector::kLanes) {
            const Vector left = weight(j), right = weight(kTileFloats + j);
            Vector::add(Vector::load(before + r * 16 + j), Vector::add(left, right)).store(after + r * 16 + j);
            if constexpr (Vector::kLanes == 16) {
                Vector::store_bf16(weights + r * 32, left, right);
            } else {
                left.store_bf16(weights + r * 32 + j);
                right.store_bf16(weights + r * 32 + 16 + j);
            }
        }
    }
    slice.rows -= kSliceRows;
    slice.scores += kSliceRows * 16 + (slice.rows == kTileRows ? kTileFloats : 0);
    slice.weights += kSliceRows * 32;
    slice.before += kSliceRows * 16;
    slice.after += kSliceRows * 16;
    slice.shift += kSliceRows;
}

}  // namespace
}  // namespace optimum_chatglm_ov
