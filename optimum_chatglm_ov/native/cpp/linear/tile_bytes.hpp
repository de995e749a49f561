// SPDX-License-Identifier: Apache-2.0
// Linear layers on byte tiles, for 8-bit weights with one scale a row: the weights are multiplied as they are stored.
// A row of activations has one scale, too, and is rounded to 16 bits, held as two bytes (x = scale * (256 * high +
// low)) whose sums are apart, or to 8 bits. Sums are exact. Rounded to 16 bits, the error of a result is less than
// that of bf16 activations: 2^-16 of the largest activation for each, where bf16 is wrong by up to 2^-9 of it for
// that one alone.
//   Tiles, Lines  see tile_linear.hpp
#pragma once

#include "linear/tile_session.hpp"

namespace optimum_chatglm_ov {
namespace {

// Integer sums of block m and panel n become results.
template <class Lines, bool kWide>
class ByteResults {
public:
    using Vector = typename Lines::Vector;
    static constexpr int64_t kRows = kWide ? 16 : 32;  // of a block

    ByteResults(const TileTask& task, int64_t n, int64_t m, float* sums, const float* gates)
        : sums_(sums),
          row_sums_(static_cast<const int32_t*>(task.blocks[m].sums)),
          row_scales_(task.blocks[m].scales),
          output_(task, n, m * kRows, sums, gates) {
        const Panel weights(*task.format, task.weights[n]);
        for (int v = 0; v < kVectors; v++) {
            const ColumnScale<Lines, 128> column(weights, 0, v * Vector::kLanes);
            scale_[v] = column.scale, minus_zero_[v] = column.minus_zero;
            bias_[v] = Vector::load(weights.bias + v * Vector::kLanes);
        }
    }

    void row(int64_t r) const {
        float row_sum = static_cast<float>(row_sums_[r]);
        if constexpr (kWide) row_sum = row_sum * kHigh + static_cast<float>(row_sums_[16 + r]);
        for (int v = 0; v < kVectors; v++) {
            const int64_t c = v * Vector::kLanes;
            const float* place = sums_ + sum_at(r, c);
            Vector sum = Lines::difference(place, row_sums_[r] * 128);
            if constexpr (kWide)
                sum = Vector::multiply_add(sum, Vector::all(kHigh),
                                           Lines::difference(place + 2 * kTileSums, row_sums_[16 + r] * 128));
            sum = Vector::multiply_add(minus_zero_[v], Vector::all(row_sum), sum);
            output_.put(r, c,
                        Vector::multiply_add(Vector::multiply(sum, Vector::all(row_scales_[r])), scale_[v], bias_[v]));
        }
    }

private:
    static constexpr int kVectors = kPanelColumns / Vector::kLanes;
    static constexpr float kHigh = 256.0f;

    const float* sums_;
    const int32_t* row_sums_;
    const float* row_scales_;
    Vector scale_[kVectors], minus_zero_[kVectors], bias_[kVectors];
    BlockOutput<Vector> output_;
};

template <class Tiles, class Lines, bool kWide>
struct TileBytes {
    using Vector = typename Lines::Vector;
    using Session = TileSession<Tiles>;
    using Results = ByteResults<Lines, kWide>;
    static constexpr int64_t kStep = 64;  // input features of one tile product
    static constexpr int64_t kRows = Results::kRows;
    // A task's sums and its chunk of activations take less than half of a second-level cache of 2 MB: two threads of a
    // core share it, of which a virtual machine knows nothing. With 16 threads 16 blocks of 8 panels take up to 1.6
    // times as long.
    static constexpr int64_t kTaskBlocks = 8, kTaskPanels = 16;

    static int64_t value_bytes(const LinearFormat& f) { return f.in_features / kStep * kStepBytes; }
    static int64_t sum_bytes(const LinearFormat&) { return 32 * 4; }

    // values [in_features / 64][high bytes, low bytes][16 rows][64], or [..][32 rows][64]; sums i32 [2][16] of those
    // bytes, or [32]
    static void pack(const LinearFormat& f, const float* input, int64_t stride, int64_t first, int64_t last,
                     const RowBlock& block) {
        for (int64_t r = first; r < last; r += kTogether)
            pack_together(f, input, stride, r, last - r < kTogether ? last : r + kTogether, block);
    }

    static size_t scratch_bytes(const TileTask& task) {
        return task.panels * ((task.rows + kRows - 1) / kRows) * kBlockSums * 4;
    }

    static void multiply(const TileTask& task, void* scratch) {
        // Rows of the activations' tiles that count; all where several blocks meet the same weights.
        const int64_t rows = kWide && task.rows < 16 ? task.rows : 16;
        Session session(rows, rows);
        multiply_blocks(session, task, static_cast<float*>(scratch));
    }

private:
    static constexpr int64_t kAheadBytes = 4096;
    static constexpr int64_t kTogether = 16;  // rows, which the second-level cache still holds when they are rounded

    static void pack_together(const LinearFormat& f, const float* input, int64_t stride, int64_t first, int64_t last,
                              const RowBlock& block) {
        float inverse[kTogether];
        typename Lines::Totals totals[kTogether] = {};
        for (int64_t r = first; r < last; r++) {
            const RowScale scale(Lines::largest(input + r * stride, f.in_features), kWide ? kWideSteps : 127.0f);
            block.scales[r] = scale.step, inverse[r - first] = scale.inverse;
        }
        auto* step = static_cast<int8_t*>(block.values);
        for (int64_t k = 0; k < f.in_features; k += kStep, step += kStepBytes)
            for (int64_t r = first; r < last; r++) {
                const float* x = input + r * stride + k;
                int8_t* line = step + r * kStep;
                __builtin_prefetch(line + kPackedAhead * kStepBytes, 1, 3);
                if constexpr (kWide) {
                    __builtin_prefetch(line + kPackedAhead * kStepBytes + kTileBytes, 1, 3);
                    Lines::round_wide(x, inverse[r - first], line, line + kTileBytes, totals[r - first]);
                } else {
                    Lines::round_bytes(x, inverse[r - first], line, totals[r - first]);
                }
            }
        auto* sums = static_cast<int32_t*>(block.sums);
        for (int64_t r = first; r < last; r++) {
            const WideSums found = Lines::sums_of(totals[r - first]);
            if constexpr (kWide)
                sums[r] = found.high, sums[16 + r] = found.low;
            else
                sums[r] = found.low;
        }
    }

    // Weights are held in the first-level cache, a chunk of a panel at a time, and read once; all blocks of
    // activations pass by. A single block keeps its sums in the tiles.
    static void multiply_blocks(Session& session, const TileTask& task, float* scratch) {
        const int64_t steps = task.format->in_features / kStep, blocks = (task.rows + kRows - 1) / kRows;
        // Bytes of the next chunk that each step of a block fetches, in whole lines: weights and activations.
        const int64_t share = (kStepBytes / 64 + blocks - 1) / blocks * 64;
        const int64_t other_share = (kStepBytes / 64 + task.panels - 1) / task.panels * 64;
        const int64_t chunks = blocks == 1 ? 1 : (steps + kChunkSteps - 1) / kChunkSteps;
        PendingResults<Results> pending;
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const int64_t first = chunk * steps / chunks, count = (chunk + 1) * steps / chunks - first;
            for (int64_t n = 0; n < task.panels; n++) {
                const uint8_t* weights = chunk_weights(task, n, first);
                const uint8_t* next = n + 1 < task.panels  ? chunk_weights(task, n + 1, first)
                                      : chunk + 1 < chunks ? chunk_weights(task, 0, first + count)
                                                           : weights;
                for (int64_t m = 0; m < blocks; m++) {
                    float* sums = scratch + (n * blocks + m) * kBlockSums;
                    const auto* a = static_cast<const uint8_t*>(task.blocks[m].values) + first * kStepBytes;
                    if (chunk)
                        session.template load_sums<2>(sums);
                    else
                        session.template zero<2>();
                    if (blocks == 1)
                        for (int64_t step = 0; step < count; step++) {
                            fetch<3, kStepBytes>(weights + step * kStepBytes + kAheadBytes);
                            session.template multiply<2, true, Session::Streams::none>(
                                a + step * kStepBytes, weights + step * kStepBytes, 64, 2 * 64);
                            pending.next_of(kRows);
                        }
                    else
                        multiply_chunk(session, {a, weights, count}, {next + m * count * share, share},
                                       {a + count * (kStepBytes + n * other_share), other_share},
                                       chunk ? sums + kBlockSums : nullptr, pending);
                    session.template store_sums<2>(sums);
                    if (chunk + 1 == chunks)
                        pending.begin({task, n, m, sums, sums - task.panels / 2 * blocks * kBlockSums},
                                      task.rows - m * kRows);
                }
            }
        }
        pending.finish();
        if (task.streams) Vector::end_streams();
    }

    static void multiply_chunk(Session& session, Chunk chunk, Ahead weights, Ahead activations, const float* next_sums,
                               PendingResults<Results>& pending) {
        for (int64_t step = 0; step < chunk.steps; step++) {
            session.template multiply<2, true, Session::Streams::activations>(
                chunk.activations + step * kStepBytes, chunk.weights + step * kStepBytes, 64, 2 * 64);
            if (next_sums) fetch<3, 256>(reinterpret_cast<const uint8_t*>(next_sums) + step * 256);
            weights.fetch(step);
            activations.fetch(step);
            pending.next_of(kChunkSteps);
        }
    }

    template <int kLevel, int64_t kBytes>
    static inline __attribute__((always_inline)) void fetch(const uint8_t* address) {
#pragma GCC unroll 32
        for (int64_t byte = 0; byte < kBytes; byte += 64) __builtin_prefetch(address + byte, 0, kLevel);
    }

    static const uint8_t* chunk_weights(const TileTask& task, int64_t panel, int64_t first_step) {
        return task.weights[panel] + panel_header_bytes(*task.format) + first_step * kStepBytes;
    }
};

}  // namespace
}  // namespace optimum_chatglm_ov
