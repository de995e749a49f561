// SPDX-License-Identifier: Apache-2.0
// Up to 16 rows of a linear layer on byte tiles, for 4-bit weights in groups of 64 or 128 features: half bytes become
// bytes just before they are used, which is less work than making them bf16. Activations are 16-bit integers with one
// scale a row, as in tile_bytes.hpp; the two bytes of each are two lines of one tile. Sums are exact within a group.
//   Tiles, Lines  see tile_linear.hpp
#pragma once

#include "linear/tile_few_rows.hpp"

namespace optimum_chatglm_ov {
namespace {

template <class Lines>
struct HalfByteOperands {
    using Vector = typename Lines::Vector;
    static constexpr bool kIsBytes = true;
    static constexpr int64_t kStep = 64, kLines = 2, kStoredBytes = kStep * kPanelColumns / 2;
    static constexpr int64_t kRows = 16, kRowsOfTile = 8;  // of a block

    static inline __attribute__((always_inline)) void convert(const uint8_t* stored, uint8_t* target) {
#pragma GCC unroll 2
        for (int64_t half = 0; half < 2; half++)
#pragma GCC unroll 8
            for (int64_t i = 0; i < kStep / 8; i++)
                Lines::split_halves(stored + (2 * i + half) * 64, target + half * kTileBytes + i * 128);
    }

    static void begin(const TileTask& task, const Panel&, float* results) {
        for (int64_t r = 0; r < task.rows; r++)
            for (int64_t c = 0; c < kPanelColumns; c += Vector::kLanes)
                Vector::all(0.0f).store(results + sum_at(r, c));
    }

    // The products of a group of features, times the scales of the weights, are added to the results.
    static void add_group(const TileTask& task, const Panel& panel, int64_t group, int64_t pass, const float* products,
                          float* results) {
        const int64_t first = pass * kRowsOfTile, left = task.rows - first,
                      rows = left < kRowsOfTile ? left : kRowsOfTile;
        const float* sum = static_cast<const float*>(task.blocks[0].sums) + group * kRows + first;
        for (int64_t c = 0; c < kPanelColumns; c += Vector::kLanes) {
            const ColumnScale<Lines, 0> column(panel, group, c);
            const float* high = products + sum_at(0, c);
            float* result = results + sum_at(first, c);
#pragma GCC unroll 4
            for (int64_t r = 0; r < rows; r++, high += 32, result += 16) {
                const Vector total =
                    Vector::multiply_add(column.minus_zero, Vector::all(sum[r]), Lines::wide(high, high + 16));
                Vector::multiply_add(column.scale, total, Vector::load(result)).store(result);
            }
        }
    }

    static void end(const TileTask& task, const Panel& panel, float* results) {
        for (int64_t r = 0; r < task.rows; r++)
            for (int64_t c = 0; c < kPanelColumns; c += Vector::kLanes) {
                float* result = results + sum_at(r, c);
                Vector::multiply_add(Vector::load(result), Vector::all(task.blocks[0].scales[r]),
                                     Vector::load(panel.bias + c))
                    .store(result);
            }
    }
};

template <class Tiles, class Lines>
struct TileHalves {
    using Operands = HalfByteOperands<Lines>;
    using Few = TileFewRows<Tiles, Operands>;
    static constexpr int64_t kStep = Operands::kStep;
    static constexpr int64_t kRows = Operands::kRows, kTaskBlocks = 1, kTaskPanels = 8;

    static bool takes(const LinearFormat& f, int64_t rows) {
        return f.bits == 4 && rows <= kRows && Few::has_passes(f);
    }

    static int64_t value_bytes(const LinearFormat& f) { return f.in_features / kStep * kStepBytes; }
    static int64_t sum_bytes(const LinearFormat& f) { return f.in_features / f.group_size * kRows * 4; }

    // values [in_features / 64][16 rows][high bytes, low bytes][64]; sums f32 [groups][16] of those integers
    static void pack(const LinearFormat& f, const float* input, int64_t stride, int64_t first, int64_t last,
                     const RowBlock& block) {
        for (int64_t r = first; r < last; r++) {
            auto* values = static_cast<int8_t*>(block.values) + r * 2 * kStep;
            float* sum = static_cast<float*>(block.sums) + r;
            const float* x = input + r * stride;
            const RowScale scale(Lines::largest(x, f.in_features), kWideSteps);
            block.scales[r] = scale.step;
            for (int64_t k = 0; k < f.in_features; k += f.group_size, sum += kRows) {
                typename Lines::Totals totals{};
                for (int64_t i = k; i < k + f.group_size; i += kStep) {
                    int8_t* line = values + i / kStep * kStepBytes;
                    Lines::round_wide(x + i, scale.inverse, line, line + kStep, totals);
                }
                const WideSums found = Lines::sums_of(totals);
                *sum = static_cast<float>(found.high) * 256.0f + static_cast<float>(found.low);
            }
        }
    }

    static size_t scratch_bytes(const TileTask& task) { return task.panels * kBlockSums * 4; }

    static void multiply(const TileTask& task, void* scratch) {
        if (task.rows <= Operands::kRowsOfTile)
            Few::template multiply<1, 1>(task, static_cast<float*>(scratch));
        else
            Few::template multiply<1, 2>(task, static_cast<float*>(scratch));
    }
};

}  // namespace
}  // namespace optimum_chatglm_ov
