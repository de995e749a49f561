// SPDX-License-Identifier: Apache-2.0
// Weights of every format as bf16, and what few rows are added up with. See tile_few_rows.hpp.
#pragma once

#include "linear/tile_session.hpp"

namespace optimum_chatglm_ov {
namespace {

constexpr float kUndoPowers = 0x1p48f;  // undoes the powers of two that weights and activations are held times
constexpr int64_t kUnit = 128;          // numbers that one conversion writes: 8 features of 16 columns

// Bytes of 8 input features of a panel.
template <int kBits>
constexpr int64_t kUnitBytes = kPanelColumns * kBits;

template <class Lines, int kBits>
inline __attribute__((always_inline)) void convert_unit(const uint8_t* stored, bf16* target) {
    if constexpr (kBits == 8)
        Lines::convert_bytes(stored, stored + kPanelColumns * 4, target);
    else
        Lines::convert_halves(stored, target);
}

template <class Lines, int kBits>
struct Bf16Operands {
    using Vector = typename Lines::Vector;
    static constexpr bool kIsBytes = false;
    static constexpr int64_t kStep = 32, kLines = 1, kStoredBytes = 4 * kUnitBytes<kBits>;
    static constexpr int64_t kRows = 32;  // of a block

    static inline __attribute__((always_inline)) void convert(const uint8_t* stored, uint8_t* target) {
        auto* numbers = reinterpret_cast<bf16*>(target);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                convert_unit<Lines, kBits>(stored + i * kUnitBytes<kBits> + half * 64,
                                           numbers + (4 * half + i) * kUnit);
    }

    // Biases, or NaN for a row with NaN or infinity.
    static void begin(const TileTask& task, const Panel& panel, float* results) {
        for (int64_t r = 0; r < task.rows; r++)
            for (int64_t c = 0; c < kPanelColumns; c += Vector::kLanes)
                Vector::add(Vector::load(panel.bias + c), Vector::all(task.blocks[0].scales[r]))
                    .store(results + sum_at(r, c));
    }

    // The products of a group of features, scaled, are added to the results.
    static void add_group(const TileTask& task, const Panel& panel, int64_t group, int64_t /*pass*/,
                          const float* products, float* results) {
        constexpr int kVectors = 16 / Vector::kLanes;  // of a row of a tile
        const float* sums = static_cast<const float*>(task.blocks[0].sums) + group * kRows;
        for (int64_t tile = 0; tile < 2; tile++) {
            Vector scale[kVectors], minus_zero[kVectors];
            for (int v = 0; v < kVectors; v++) {
                const ColumnScale<Lines, 1 << (kBits - 1)> column(panel, group, tile * 16 + v * Vector::kLanes);
                scale[v] = Vector::multiply(column.scale, Vector::all(kUndoPowers));
                minus_zero[v] = column.minus_zero;
            }
            for (int64_t first = 0; first < task.rows; first += 16) {
                const int64_t rows = task.rows - first < 16 ? task.rows - first : 16;
                const float* product = products + sum_at(first, tile * 16);
                float* result = results + sum_at(first, tile * 16);
                const float* sum = sums + first;
#pragma GCC unroll 4
                for (int64_t r = 0; r < rows; r++, product += 16, result += 16)
                    for (int v = 0; v < kVectors; v++) {
                        const int at = v * Vector::kLanes;
                        const Vector total =
                            Vector::multiply_add(minus_zero[v], Vector::all(sum[r]), Vector::load(product + at));
                        Vector::multiply_add(scale[v], total, Vector::load(result + at)).store(result + at);
                    }
            }
        }
    }

    static void end(const TileTask&, const Panel&, float*) {}
};

}  // namespace
}  // namespace optimum_chatglm_ov
