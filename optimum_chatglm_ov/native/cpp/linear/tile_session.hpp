// SPDX-License-Identifier: Apache-2.0
// What the ways of linear layers on tiles share: the product of two times two tiles, and what becomes of sums.
#pragma once

#include <optional>

#include "linear/activation.hpp"
#include "linear/linear_kernel.hpp"
#include "simd/tiles.hpp"

namespace optimum_chatglm_ov {
namespace {

constexpr int64_t kTileBytes = 1024;
constexpr int64_t kStepBytes = 2 * kTileBytes;  // of each operand of a step, two tiles
constexpr int64_t kTileSums = 256;              // of one tile
constexpr int64_t kBlockSums = 4 * kTileSums;   // [row tile][column tile][16][16]
constexpr int64_t kChunkSteps = 14;             // products whose held operand, 28 KB, fits the first-level cache

// Activations are packed step by step of all rows, so that what is written is one stream, and so many steps are fetched
// ahead to be written. Row after row, each line would lie a step's bytes after the last.
constexpr int64_t kPackedAhead = 2;

// Bytes that each step of a chunk brings closer, `share` of them, in whole lines; the first from `address` on.
struct Ahead {
    const uint8_t* address;
    int64_t share;

    inline __attribute__((always_inline)) void fetch(int64_t step) const {
        for (int64_t byte = 0; byte < share; byte += 64) __builtin_prefetch(address + step * share + byte, 0, 2);
    }
};

// The operands of a block's products, `steps` of them.
struct Chunk {
    const uint8_t *activations, *weights;
    int64_t steps;
};

// Offset of a sum of a block.
inline int64_t sum_at(int64_t row, int64_t column) {
    return row / 16 * 2 * kTileSums + column / 16 * kTileSums + row % 16 * 16 + column % 16;
}

// Tiles 0 .. 3: sums [row tile][column tile]; 4, 5: activations; 6, 7: weights.
template <class Tiles>
class TileSession {
public:
    TileSession(int64_t first_rows, int64_t second_rows) {
        TileConfiguration c;
        c.palette = 1;
        for (int t = 0; t < 8; t++) c.rows[t] = 16, c.row_bytes[t] = 64;
        c.rows[0] = c.rows[1] = c.rows[4] = static_cast<uint8_t>(first_rows);
        c.rows[2] = c.rows[3] = c.rows[5] = static_cast<uint8_t>(second_rows);
        tiles_.configure(c);
    }
    ~TileSession() { tiles_.release(); }
    TileSession(const TileSession&) = delete;

    // One row tile alone is the first or the second, by kHalf.
    template <int kRowTiles, int kHalf = 0>
    void zero() {
        tiles_.template zero<first_sums<kRowTiles, kHalf>()>();
        tiles_.template zero<first_sums<kRowTiles, kHalf>() + 1>();
        if constexpr (kRowTiles == 2) {
            tiles_.template zero<2>();
            tiles_.template zero<3>();
        }
    }
    template <int kRowTiles>
    void load_sums(const void* sums) {
        const auto* base = static_cast<const uint8_t*>(sums);
        tiles_.template load<0>(base, 64);
        tiles_.template load<1>(base + kTileBytes, 64);
        if constexpr (kRowTiles == 2) {
            tiles_.template load<2>(base + 2 * kTileBytes, 64);
            tiles_.template load<3>(base + 3 * kTileBytes, 64);
        }
    }
    template <int kRowTiles, int kHalf = 0>
    void store_sums(void* sums) {
        auto* base = static_cast<uint8_t*>(sums);
        tiles_.template store<first_sums<kRowTiles, kHalf>()>(base, 64);
        tiles_.template store<first_sums<kRowTiles, kHalf>() + 1>(base + kTileBytes, 64);
        if constexpr (kRowTiles == 2) {
            tiles_.template store<2>(base + 2 * kTileBytes, 64);
            tiles_.template store<3>(base + 3 * kTileBytes, 64);
        }
    }

    // The operand that is read once must not push the other out of the first-level cache: with plain loads for both a
    // third of the speed is lost.
    enum class Streams { none, activations, weights };

    // Adds the products of one step. b1 follows b0 after `next` bytes, its rows are `stride` apart.
    template <int kRowTiles, bool kBytes, Streams kStreams, int kHalf = 0>
    void multiply(const uint8_t* a, const uint8_t* b, int64_t next, int64_t stride) {
        constexpr int kSums = first_sums<kRowTiles, kHalf>(), kRows = 4 + kSums / 2;
        load<kRows, kStreams == Streams::activations>(a, 64);
        load<6, kStreams == Streams::weights>(b, stride);
        dot<kSums, kRows, 6, kBytes>();
        load<7, kStreams == Streams::weights>(b + next, stride);
        dot<kSums + 1, kRows, 7, kBytes>();
        if constexpr (kRowTiles == 2) {
            load<5, kStreams == Streams::activations>(a + kTileBytes, 64);
            dot<2, 5, 6, kBytes>();
            dot<3, 5, 7, kBytes>();
        }
    }

private:
    template <int kRowTiles, int kHalf>
    static constexpr int first_sums() {
        return kRowTiles == 1 ? 2 * kHalf : 0;
    }
    template <int T, bool kStreamed>
    void load(const uint8_t* base, int64_t stride) {
        if constexpr (kStreamed)
            tiles_.template load_streamed<T>(base, stride);
        else
            tiles_.template load<T>(base, stride);
    }
    template <int C, int A, int B, bool kBytes>
    void dot() {
        if constexpr (kBytes)
            tiles_.template dot_signed_unsigned<C, A, B>();
        else
            tiles_.template dot<C, A, B>();
    }

    Tiles tiles_;
};

constexpr float kWideSteps = 32639.0f;  // 127 * 256 + 127, whose bytes, both with signs, are the largest there are

// How a row becomes integers of at most `steps`. NaN or infinity in it makes `step` NaN, and the row with it.
struct RowScale {
    float step, inverse;

    RowScale(float largest, float steps)
        : step(largest > 1e-30f || largest != largest ? largest / steps : 0.0f),
          inverse(largest > 1e-30f ? steps / largest : 0.0f) {}
};

// What a panel of weights holds: linear.hpp.
struct Panel {
    const float *bias, *multipliers;
    const f16* scales;
    const uint8_t *zero_points, *integers;

    Panel(const LinearFormat& f, const uint8_t* panel)
        : bias(reinterpret_cast<const float*>(panel)),
          multipliers(bias + kPanelColumns),
          scales(reinterpret_cast<const f16*>(multipliers + kPanelColumns)),
          zero_points(reinterpret_cast<const uint8_t*>(scales + f.in_features / f.group_size * kPanelColumns)),
          integers(panel + panel_header_bytes(f)) {}
};

// Scales of as many columns as a vector has, and minus the zero points of integers that kMiddle was taken from.
template <class Lines, int kMiddle>
struct ColumnScale {
    using Vector = typename Lines::Vector;
    Vector scale, minus_zero;

    ColumnScale(const Panel& panel, int64_t group, int64_t column)
        : scale(Vector::multiply(Lines::from_half(panel.scales + group * kPanelColumns + column),
                                 Vector::load(panel.multipliers + column))),
          minus_zero(Vector::multiply_add(Lines::from_bytes(panel.zero_points + group * kPanelColumns + column),
                                          Vector::all(-1.0f), Vector::all(static_cast<float>(kMiddle)))) {}
};

// Where the results of a block go: to the output, or through the activation function.
template <class Vector>
class BlockOutput {
public:
    // results, and those of the gates that are their partners, in the places of sums
    BlockOutput(const TileTask& task, int64_t panel, int64_t first_row, float* results, const float* gates)
        : activation_(task.activation),
          is_gate_(task.activation == Activation::silu && panel < task.panels / 2),
          results_(results),
          gates_(gates),
          output_(task.outputs[panel] + first_row * task.stride),
          stride_(task.stride),
          streams_(task.streams) {}

    void put(int64_t row, int64_t column, Vector x) const {
        if (is_gate_) return x.store(results_ + sum_at(row, column));  // until its partner is there
        if (activation_ == Activation::gelu) x = gelu(x);
        if (activation_ == Activation::silu) x = Vector::multiply(x, silu(Vector::load(gates_ + sum_at(row, column))));
        float* place = output_ + row * stride_ + column;
        streams_ ? x.stream(place) : x.store(place);
    }

private:
    Activation activation_;
    bool is_gate_;
    float* results_;
    const float* gates_;
    float* output_;
    int64_t stride_;
    bool streams_;
};

// What becomes of the sums of a block whose products are complete, some rows at a time: beside the products of the next
// block it costs hardly anything.
//   Results   kRows, of a block; row(r): what becomes of a row
template <class Results>
class PendingResults {
public:
    // `left`: rows from the block's first on; those of later blocks do not count.
    void begin(const Results& results, int64_t left) {
        finish();
        results_.emplace(results);
        rows_ = left < Results::kRows ? left : Results::kRows;
        row_ = 0;
    }
    // The share of one of so many steps.
    inline __attribute__((always_inline)) void next_of(int64_t steps) {
        for (int64_t count = (Results::kRows + steps - 1) / steps; count > 0 && row_ < rows_; count--)
            results_->row(row_++);
    }
    void finish() { next_of(1); }

private:
    std::optional<Results> results_;
    int64_t rows_ = 0, row_ = 0;
};

}  // namespace
}  // namespace optimum_chatglm_ov
