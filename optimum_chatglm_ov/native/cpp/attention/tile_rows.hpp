// SPDX-License-Identifier: Apache-2.0
// The ends of TileFlash: queries become tiles, tiles of outputs become rows.
#pragma once

#include "attention/tile_memory.hpp"
#include "simd/vector.hpp"

namespace optimum_chatglm_ov {
namespace {

// Queries and the state before the first key, of rows beyond the last one, too.
template <class Vector>
void load_tile_queries(const TaskRows& rows, const TileMemory& memory) {
    const int64_t head_dim = memory.head_dim, padded = round_up(rows.count, kGroupRows);
    std::memset(memory.output, 0, padded * head_dim * 4);
    std::memset(memory.sums[0], 0, padded * 16 * 4);
    fill(memory.reference, memory.reference + padded, kHidden);
    std::memset(memory.shift, 0, padded * 4);
    std::memset(memory.state, 0, padded / kGroupRows);
    alignas(64) float row[kMaxHeadDim];
    for (int64_t r = 0; r < padded; r++) {
        bf16* query = memory.query + r / kTileRows * kTileRows * head_dim + r % kTileRows * 32;
        if (r < rows.count)
            rows.load_query(r, row);
        else
            fill(row, row + head_dim, 0.0f);
        for (int64_t d = 0; d < head_dim; d += Vector::kLanes)
            Vector::load(row + d).store_bf16(query + d / 32 * kTileElements + d % 32);
    }
}

// A row of outputs that begins at `source`, times `factor`.
template <class Vector, class Write>
inline __attribute__((always_inline)) void write_tile_row(const float* source, int64_t head_dim, Vector factor,
                                                          const Write& write) {
    for (int64_t d = 0; d < head_dim; d += 16, source += kTileFloats)
        for (int64_t j = 0; j < 16; j += Vector::kLanes)
            write(Vector::multiply(Vector::load(source + j), factor), d + j);
}

template <class Vector>
void write_tile_results(const AttentionArguments& a, const AttendTask& task, const TaskRows& rows,
                        const TileMemory& memory) {
    const int64_t head_dim = memory.head_dim;
    for (int64_t r = 0; r < rows.count; r++) {
        const float* lanes = memory.sums[memory.state[r / kGroupRows] & kSecondSums] + r * 16;
        Vector sums = Vector::load(lanes);
        for (int64_t j = Vector::kLanes; j < 16; j += Vector::kLanes)
            sums = Vector::add(sums, Vector::load(lanes + j));
        const float sum = sums.sum_lanes();
        const float* source = memory.output_at(r, 0);
        const Vector one = Vector::all(1.0f), factor = Vector::all(sum > 0 ? 1.0f / sum : sum);
        if (task.partial_output) {
            task.partial_max[r] = memory.reference[r];
            task.partial_sum[r] = sum;
            float* target = task.partial_output + r * head_dim;
            write_tile_row(source, head_dim, one, [&](Vector v, int64_t d) { v.store(target + d); });
        } else if (a.activation_type == ActivationType::f32) {
            float* target = static_cast<float*>(a.output) + rows.output_offset(r);
            write_tile_row(source, head_dim, factor, [&](Vector v, int64_t d) { v.store(target + d); });
        } else {
            bf16* target = static_cast<bf16*>(a.output) + rows.output_offset(r);
            write_tile_row(source, head_dim, factor, [&](Vector v, int64_t d) { v.store_bf16(target + d); });
        }
    }
}

}  // namespace
}  // namespace optimum_chatglm_ov
