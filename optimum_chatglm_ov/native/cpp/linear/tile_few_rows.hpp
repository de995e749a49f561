// SPDX-License-Identifier: Apache-2.0
// Up to 32 rows of a linear layer on bf16 tiles: weights are read from memory and used once. See tile_linear.hpp.
#pragma once

#include "linear/tile_session.hpp"

namespace optimum_chatglm_ov {
namespace {

// The stored weights of a task, `kBytes` a step: a chunk of steps of each panel in turn, then the next chunk.
template <int64_t kBytes>
class StoredSteps {
public:
    StoredSteps(const TileTask& task, int64_t steps, int64_t chunk_steps)
        : task_(task), steps_(steps), chunk_steps_(chunk_steps), header_(panel_header_bytes(*task.format)) {
        begin_piece();
    }

    // Where the next step lies; after the last, that one again.
    inline __attribute__((always_inline)) const uint8_t* next() {
        const uint8_t* step = stored_;
        if (--left_ > 0)
            stored_ += kBytes;
        else
            next_piece();
        return step;
    }

private:
    __attribute__((noinline)) void next_piece() {
        if (panel_ + 1 == task_.panels && first_ + chunk_steps_ >= steps_) {
            left_ = 1;
            return;
        }
        if (++panel_ == task_.panels) panel_ = 0, first_ += chunk_steps_;
        begin_piece();
    }
    void begin_piece() {
        stored_ = task_.weights[panel_] + header_ + first_ * kBytes;
        left_ = steps_ - first_ < chunk_steps_ ? steps_ - first_ : chunk_steps_;
    }

    const TileTask& task_;
    int64_t steps_, chunk_steps_, header_;
    int64_t panel_ = 0, first_ = 0, left_ = 0;  // left: steps of this panel's chunk, the next one among them
    const uint8_t* stored_ = nullptr;
};

template <class Tiles, class Lines>
struct TileFewRows {
    using Vector = typename Lines::Vector;
    using Session = TileSession<Tiles>;
    static constexpr int64_t kStep = 32;  // input features of one tile product
    static constexpr int64_t kRows = 32;  // of a block
    static constexpr int64_t kStepBytes = 2 * kTileBytes;
    static constexpr int64_t kUnit = 128;    // numbers that one conversion writes: 8 features of 16 columns
    static constexpr float kUndo = 0x1p48f;  // of the powers of two that weights and activations are held in

    // Bytes of 8 input features of a panel.
    template <int kBits>
    static constexpr int64_t kUnitBytes = kPanelColumns * kBits;

    template <int kBits>
    static inline __attribute__((always_inline)) void convert(const uint8_t* stored, bf16* target) {
        if constexpr (kBits == 8)
            Lines::convert_bytes(stored, stored + kPanelColumns * 4, target);
        else
            Lines::convert_halves(stored, target);
    }

    // Few rows: each weight is converted once, just before its only use. A chunk of the activations stays in the
    // first-level cache for all panels, so that the weights have its fill buffers for themselves.
    template <int kRowTiles, int kBits>
    static void multiply(const TileTask& task, float* scratch) {
        constexpr int64_t kRing = 4, kDistance = 2;  // steps in the ring, and from a conversion to its use
        constexpr int64_t kStoredBytes = 4 * kUnitBytes<kBits>;
        constexpr int64_t kAheadSteps = kAheadBytes / kStoredBytes;
        const LinearFormat& f = *task.format;
        const int64_t groups = f.in_features / f.group_size, group_steps = f.group_size / kStep;
        const int64_t held = kHeldFeatures / kRowTiles / f.group_size, chunk_groups = held ? held : 1;
        Session session(kRowTiles == 2 ? 16 : task.rows, kRowTiles == 2 ? task.rows - 16 : 16);
        alignas(64) bf16 ring[kRing][kStepBytes / 2];
        alignas(64) float products[2][kBlockSums];  // of two groups: one is added up while the next is multiplied
        StoredSteps<kStoredBytes> fetched(task, groups * group_steps, chunk_groups * group_steps), converted = fetched;
        int64_t conversions = 0, multiplications = 0, parity = 0;
        const auto fetch_step = [&]() __attribute__((always_inline)) {
            const uint8_t* stored = fetched.next();
#pragma GCC unroll 16
            for (int64_t byte = 0; byte < kStoredBytes; byte += 64) __builtin_prefetch(stored + byte, 0, 3);
        };
        const auto convert_step = [&]() __attribute__((always_inline)) {
            const uint8_t* stored = converted.next();
            bf16* target = ring[conversions++ % kRing];
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++)
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++)
                    convert<kBits>(stored + i * kUnitBytes<kBits> + half * 64, target + (4 * half + i) * kUnit);
        };
        for (int64_t step = 0; step < kAheadSteps; step++) fetch_step();
        for (int64_t step = 0; step < kDistance; step++) convert_step();
        Panel last_panel(f, task.weights[0]);
        int64_t last_group = -1, last_n = 0;
        const auto add_last = [&] {
            float* results = scratch + last_n * kBlockSums;
            if (last_group == 0) begin_results(task, last_panel, results);
            add_group<kBits>(task, last_panel, last_group, products[parity % 2], results);
            if (last_group == groups - 1)
                deliver<Vector>(task, last_n, 0, task.rows, results, results - task.panels / 2 * kBlockSums);
        };
        for (int64_t first = 0; first < groups; first += chunk_groups) {
            const int64_t end = first + chunk_groups < groups ? first + chunk_groups : groups;
            for (int64_t n = 0; n < task.panels; n++) {
                const Panel panel(f, task.weights[n]);
                const auto* a = static_cast<const uint8_t*>(task.blocks[0].values) + first * group_steps * kStepBytes;
                for (int64_t group = first; group < end; group++) {
                    session.template zero<kRowTiles>();
                    for (int64_t step = 0; step < group_steps; step++, a += kStepBytes) {
                        fetch_step();
                        convert_step();
                        session.template multiply<kRowTiles, false, Session::Streams::none>(
                            a, reinterpret_cast<const uint8_t*>(ring[multiplications++ % kRing]), kTileBytes, 64);
                    }
                    session.template store_sums<kRowTiles>(products[(parity + 1) % 2]);
                    if (last_group >= 0) add_last();
                    parity++, last_panel = panel, last_group = group, last_n = n;
                }
            }
        }
        add_last();
    }

private:
    static constexpr int64_t kAheadBytes = 4096;
    static constexpr int64_t kHeldFeatures = 256;  // of 16 rows that stay in the first-level cache

    // The products of a group of features, scaled, are added to the results.
    template <int kBits>
    static void add_group(const TileTask& task, const Panel& panel, int64_t group, const float* products,
                          float* results) {
        constexpr int kVectors = 16 / Vector::kLanes;  // of a row of a tile
        const float* sums = static_cast<const float*>(task.blocks[0].sums) + group * kRows;
        for (int64_t tile = 0; tile < 2; tile++) {
            Vector scale[kVectors], minus_zero[kVectors];
            for (int v = 0; v < kVectors; v++) {
                const ColumnScale<Lines, kBits> column(panel, group, tile * 16 + v * Vector::kLanes);
                scale[v] = Vector::multiply(column.scale, Vector::all(kUndo));
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

    // Before the first group: biases, or NaN for a row with NaN or infinity.
    static void begin_results(const TileTask& task, const Panel& panel, float* results) {
        for (int64_t r = 0; r < task.rows; r++)
            for (int64_t c = 0; c < kPanelColumns; c += Vector::kLanes)
                Vector::add(Vector::load(panel.bias + c), Vector::all(task.blocks[0].scales[r]))
                    .store(results + sum_at(r, c));
    }
};

}  // namespace
}  // namespace optimum_chatglm_ov
