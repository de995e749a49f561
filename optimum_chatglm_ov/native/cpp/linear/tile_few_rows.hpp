// SPDX-License-Identifier: Apache-2.0
// A few rows of a linear layer on tiles: weights are read from memory, converted, and used once.
//   Tiles     tile_linear.hpp
//   Operands  how weights and activations are held (bf16_operands.hpp, tile_halves.hpp):
//     Vector, kIsBytes       of its arithmetic
//     kStep, kStoredBytes    input features of a tile product, and bytes of them in a panel
//     kLines                 lines of tiles that a row of activations takes
//     convert(stored, target)     the weights of a step, two tiles
//     begin(task, panel, results), end(task, panel, results)     before the first group and after the last
//     add_group(task, panel, group, pass, products, results)     adds sums of tiles, as they are stored, to results
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

template <class Tiles, class Operands>
struct TileFewRows {
    using Session = TileSession<Tiles>;
    using Vector = typename Operands::Vector;

    // Each weight is converted once, just before its only use. A chunk of the activations stays in the first-level
    // cache for all panels, so that the weights have its fill buffers for themselves.
    //   kRowTiles  row tiles that are multiplied together
    //   kPasses    of a group, each of another row tile; of two, groups have at most kDistance steps (has_passes)
    // With one row tile sums alternate between two pairs of tiles: one is multiplied while the other is stored.
    template <int kRowTiles, int kPasses>
    static void multiply(const TileTask& task, float* scratch) {
        static_assert(kRowTiles == 1 || kPasses == 1, "sums of all row tiles must have tiles");
        constexpr int64_t kRing = 2 * kDistance;
        constexpr int64_t kStoredBytes = Operands::kStoredBytes, kAheadSteps = kAheadBytes / kStoredBytes;
        const LinearFormat& f = *task.format;
        const int64_t groups = f.in_features / f.group_size, group_steps = f.group_size / Operands::kStep;
        const int64_t held = kHeldTiles / kRowTiles / kPasses / group_steps, chunk_groups = held ? held : 1;
        const int64_t lines = task.rows * Operands::kLines;
        Session session(lines < 16 ? lines : 16, kRowTiles * kPasses == 2 ? lines - 16 : lines);
        alignas(64) uint8_t ring[kRing][kStepBytes];
        alignas(64) float products[2][kBlockSums];
        StoredSteps<kStoredBytes> fetched(task, groups * group_steps, chunk_groups * group_steps), converted = fetched;
        int64_t conversions = 0;
        const auto fetch_step = [&]() __attribute__((always_inline)) {
            const uint8_t* stored = fetched.next();
#pragma GCC unroll 16
            for (int64_t byte = 0; byte < kStoredBytes; byte += 64) __builtin_prefetch(stored + byte, 0, 3);
        };
        const auto convert_step = [&]() __attribute__((always_inline)) {
            Operands::convert(converted.next(), ring[conversions++ % kRing]);
        };
        for (int64_t step = 0; step < kAheadSteps; step++) fetch_step();
        for (int64_t step = 0; step < kDistance; step++) convert_step();

        struct Item {  // some rows of a group, whose products are in tiles or in `products`
            Panel panel;
            int64_t group, n, pass;
        };
        Item items[2] = {{Panel(f, task.weights[0]), -1, 0, 0}, {Panel(f, task.weights[0]), -1, 0, 0}};
        const auto add = [&](int64_t half) {
            const Item& item = items[half];
            if (item.group < 0) return;
            float* results = scratch + item.n * kBlockSums;
            if (item.group == 0 && item.pass == 0) Operands::begin(task, item.panel, results);
            Operands::add_group(task, item.panel, item.group, item.pass, products[half], results);
            if (item.group < groups - 1 || item.pass < kPasses - 1) return;
            Operands::end(task, item.panel, results);
            const BlockOutput<Vector> output(task, item.n, 0, results, results - task.panels / 2 * kBlockSums);
            for (int64_t r = 0; r < task.rows; r++)
                for (int64_t c = 0; c < kPanelColumns; c += Vector::kLanes)
                    output.put(r, c, Vector::load(results + sum_at(r, c)));
        };
        int64_t first_step = 0;  // of the group
        const uint8_t* a = nullptr;
        // Multiplies an item. One row tile alone: the item before it is stored, and the one before that added up.
        // Two: the item itself is stored, and the one before it added up.
        const auto run = [&](auto half, const Item& item) __attribute__((always_inline)) {
            constexpr int kHalf = decltype(half)::value;
            session.template zero<kRowTiles, kHalf>();
            for (int64_t step = 0; step < group_steps; step++) {
                if (item.pass == 0) fetch_step(), convert_step();
                session.template multiply<kRowTiles, Operands::kIsBytes, Session::Streams::none, kHalf>(
                    a + step * kStepBytes + item.pass * kTileBytes, ring[(first_step + step) % kRing], kTileBytes, 64);
            }
            if constexpr (kRowTiles == 2) {
                session.template store_sums<2>(products[kHalf]);
                add(1 - kHalf);
            } else {
                session.template store_sums<1, 1 - kHalf>(products[1 - kHalf]);
                add(kHalf);
            }
            items[kHalf] = item;
        };
        int64_t half = 0;
        for (int64_t first = 0; first < groups; first += chunk_groups) {
            const int64_t end = first + chunk_groups < groups ? first + chunk_groups : groups;
            for (int64_t n = 0; n < task.panels; n++) {
                const Panel panel(f, task.weights[n]);
                a = static_cast<const uint8_t*>(task.blocks[0].values) + first * group_steps * kStepBytes;
                for (int64_t group = first; group < end; group++) {
                    if (kPasses == 2 || half == 0) run(std::integral_constant<int, 0>(), {panel, group, n, 0});
                    if (kPasses == 2 || half == 1)
                        run(std::integral_constant<int, 1>(), {panel, group, n, kPasses - 1});
                    a += group_steps * kStepBytes, first_step += group_steps, half = 1 - half;
                }
            }
        }
        const int64_t last = kPasses == 2 ? 1 : 1 - half;  // its sums are in tiles, if one row tile is multiplied
        if constexpr (kRowTiles == 1) {
            add(1 - last);
            if (last)
                session.template store_sums<1, 1>(products[1]);
            else
                session.template store_sums<1, 0>(products[0]);
        }
        add(last);
    }

    // Whether the second pass of a group finds its weights in the ring.
    static bool has_passes(const LinearFormat& f) {
        return f.group_size % Operands::kStep == 0 && f.group_size / Operands::kStep <= kDistance;
    }

private:
    static constexpr int64_t kAheadBytes = 4096;
    static constexpr int64_t kDistance = 2;   // steps from a conversion to its use
    static constexpr int64_t kHeldTiles = 8;  // of activations that stay in the first-level cache
};

}  // namespace
}  // namespace optimum_chatglm_ov
