// SPDX-License-Identifier: Apache-2.0
// Linear layers on bf16 tiles, for every format: weights become bf16 where they are used, activations are rounded to
// bf16, sums are f32. Activations are held times 2^64 and weights times 2^-112, which costs the conversions nothing.
//   Tiles   the tile instructions, or their model (tiles.hpp)
//   Lines   conversion of weights and activations, 64 bytes at a time (lines.hpp); its Vector for what is f32
#pragma once

#include "linear/bf16_operands.hpp"
#include "linear/tile_few_rows.hpp"

namespace optimum_chatglm_ov {
namespace {

// Sums of block m and panel n become results. With kScales the weights were multiplied with their scales, but for the
// multipliers.
template <class Lines, int kBits, bool kScales>
class Bf16Results {
public:
    using Vector = typename Lines::Vector;
    static constexpr int64_t kRows = Bf16Operands<Lines, kBits>::kRows;

    Bf16Results(const TileTask& task, int64_t n, int64_t m, float* sums, const float* gates)
        : sums_(sums),
          row_sums_(static_cast<const float*>(task.blocks[m].sums)),
          row_bias_(task.blocks[m].scales),
          output_(task, n, m * kRows, sums, gates) {
        const Panel weights(*task.format, task.weights[n]);
        for (int v = 0; v < kVectors; v++) {
            const int64_t c = v * Vector::kLanes;
            const ColumnScale<Lines, 1 << (kBits - 1)> column(weights, 0, c);
            const Vector scale = kScales ? Vector::load(weights.multipliers + c) : column.scale;
            scale_[v] = Vector::multiply(scale, Vector::all(kUndoPowers)), minus_zero_[v] = column.minus_zero;
            bias_[v] = Vector::load(weights.bias + c);
        }
    }

    void row(int64_t r) const {
        for (int v = 0; v < kVectors; v++) {
            const int64_t c = v * Vector::kLanes;
            Vector sum = Vector::load(sums_ + sum_at(r, c)), bias = bias_[v];
            if constexpr (kScales)
                bias = Vector::add(bias, Vector::all(row_bias_[r]));
            else
                sum = Vector::multiply_add(minus_zero_[v], Vector::all(row_sums_[r]), sum);
            output_.put(r, c, Vector::multiply_add(scale_[v], sum, bias));
        }
    }

private:
    static constexpr int kVectors = kPanelColumns / Vector::kLanes;

    const float *sums_, *row_sums_, *row_bias_;
    Vector scale_[kVectors], minus_zero_[kVectors], bias_[kVectors];
    BlockOutput<Vector> output_;
};

template <class Tiles, class Lines>
struct TileLinear {
    using Vector = typename Lines::Vector;
    using Session = TileSession<Tiles>;
    static constexpr int64_t kStep = Bf16Operands<Lines, 8>::kStep;
    static constexpr int64_t kRows = Bf16Operands<Lines, 8>::kRows;
    static constexpr int64_t kTaskBlocks = 16, kTaskPanels = 8;  // each task converts its weights, for many rows

    static int64_t value_bytes(const LinearFormat& f) { return f.in_features / kStep * kStepBytes; }
    static int64_t sum_bytes(const LinearFormat& f) { return f.in_features / f.group_size * kRows * 4; }

    // values [in_features / 32][32 rows][32], of every 8 features the even ones first; sums [groups][32] of x * 2^-48;
    // scales: 0, or NaN for a row with NaN or infinity
    static void pack(const LinearFormat& f, const float* input, int64_t stride, int64_t first, int64_t last,
                     const RowBlock& block) {
        bf16* step = static_cast<bf16*>(block.values);
        auto* sums = static_cast<float*>(block.sums);
        for (int64_t r = first; r < last; r++) block.scales[r] = 0.0f;
        for (int64_t k = 0; k < f.in_features; sums += kRows) {
            Vector totals[kRows];
            for (int64_t r = first; r < last; r++) totals[r] = Vector::all(0.0f);
            for (const int64_t end = k + f.group_size; k < end; k += kStep, step += kRows * kStep)
                for (int64_t r = first; r < last; r++) {
                    bf16* line = step + r * kStep;
                    __builtin_prefetch(line + kPackedAhead * kRows * kStep, 1, 3);
                    Lines::pack(input + r * stride + k, line, totals[r]);
                }
            for (int64_t r = first; r < last; r++) {
                sums[r] = totals[r].sum_lanes();
                block.scales[r] += sums[r] * 0.0f;
            }
        }
    }

    static size_t scratch_bytes(const TileTask& task) {
        const int64_t blocks = (task.rows + kRows - 1) / kRows;
        return task.panels * (2 * kChunkSteps * kStepBytes + blocks * kBlockSums * 4);
    }

    static void multiply(const TileTask& task, void* scratch) {
        task.format->bits == 8 ? multiply_bits<8>(task, scratch) : multiply_bits<4>(task, scratch);
    }

private:
    static constexpr int64_t kUnitsOfStep = kStepBytes / 2 / kUnit;

    template <int kBits>
    static void multiply_bits(const TileTask& task, void* scratch) {
        const bool has_groups = task.format->group_size != task.format->in_features;
        using Few = TileFewRows<Tiles, Bf16Operands<Lines, kBits>>;
        auto* results = static_cast<float*>(scratch);
        if (task.rows <= 16)
            Few::template multiply<1, 1>(task, results);
        else if (task.rows <= kRows)
            Few::template multiply<2, 1>(task, results);
        else
            has_groups ? many<kBits, true>(task, scratch) : many<kBits, false>(task, scratch);
    }

    // 8 input features of 16 columns, times their scales.
    template <int kBits>
    static inline __attribute__((always_inline)) void convert_scaled(const uint8_t* stored, const f16* scales,
                                                                     const uint8_t* zero_points, bf16* target) {
        if constexpr (kBits == 8)
            Lines::convert_scaled_bytes(stored, stored + kPanelColumns * 4, scales, zero_points, target);
        else
            Lines::convert_scaled_halves(stored, scales, zero_points, target);
    }

    // The weights of one chunk of features, one unit after the other.
    template <int kBits, bool kScales>
    class Converter {
    public:
        Converter(const TileTask& task, int64_t first, int64_t last, void* target)
            : format_(*task.format),
              weights_(task.weights),
              first_(first),
              steps_(last - first),
              target_(static_cast<bf16*>(target)),
              units(task.panels * steps_ * kUnitsOfStep) {
            if (units) begin_panel();
        }

        inline __attribute__((always_inline)) void next() {
            if (units == 0) return;
            const uint8_t* stored = stored_ + unit_ % 4 * kUnitBytes<kBits> + unit_ / 4 * 64;
            if constexpr (kScales)
                convert_scaled<kBits>(stored, scales_ + unit_ / 4 * 16, zero_points_ + unit_ / 4 * 16, target_);
            else
                convert_unit<Lines, kBits>(stored, target_);
            target_ += kUnit;
            units--;
            if (++unit_ == kUnitsOfStep) next_step();
        }

    private:
        void begin_panel() {
            const Panel panel(format_, *weights_++);
            step_ = 0;
            stored_ = panel.integers + first_ * 4 * kUnitBytes<kBits>;
            if constexpr (kScales) {
                group_steps_ = format_.group_size / kStep;
                const int64_t group = first_ / group_steps_;
                left_ = (group + 1) * group_steps_ - first_;
                scales_ = panel.scales + group * kPanelColumns;
                zero_points_ = panel.zero_points + group * kPanelColumns;
            }
        }
        void next_step() {
            unit_ = 0;
            stored_ += 4 * kUnitBytes<kBits>;
            if (++step_ == steps_) {
                if (units) begin_panel();
            } else if (kScales && --left_ == 0) {
                left_ = group_steps_;
                scales_ += kPanelColumns;
                zero_points_ += kPanelColumns;
            }
        }

        const LinearFormat& format_;
        const uint8_t* const* weights_;
        const int64_t first_, steps_;
        bf16* target_;
        const uint8_t* stored_ = nullptr;
        uint32_t unit_ = 0;
        int64_t step_ = 0, group_steps_ = 0, left_ = 0;  // left: steps until the next group
        const f16* scales_ = nullptr;
        const uint8_t* zero_points_ = nullptr;

    public:
        int64_t units;     // that are left
        int64_t pace = 0;  // units to convert in two steps
    };

    // Many rows: weights are converted once for all rows of a task, the next ones while the last are multiplied.
    template <int kBits, bool kScales>
    static void many(const TileTask& task, void* scratch) {
        const int64_t steps = task.format->in_features / kStep, panels = task.panels;
        const int64_t blocks = (task.rows + kRows - 1) / kRows;
        const int64_t chunks = (steps + kChunkSteps - 1) / kChunkSteps;
        const int64_t weight_bytes = panels * kChunkSteps * kStepBytes;
        uint8_t* const weights[2] = {static_cast<uint8_t*>(scratch), static_cast<uint8_t*>(scratch) + weight_bytes};
        float* sums = reinterpret_cast<float*>(weights[1] + weight_bytes);
        // Bytes of the next block of activations that each step with each panel fetches, in whole lines.
        const int64_t share = (kStepBytes / 64 + panels - 1) / panels * 64;
        Session session(16, 16);
        PendingResults<Bf16Results<Lines, kBits, kScales>> pending;
        const auto begin = [&](int64_t chunk) { return chunk * steps / chunks; };
        for (Converter<kBits, kScales> first(task, 0, begin(1), weights[0]); first.units;) first.next();
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const int64_t first = begin(chunk), count = begin(chunk + 1) - first;
            const bool is_last = chunk + 1 == chunks;
            Converter<kBits, kScales> converter(task, first + count, begin(is_last ? chunk + 1 : chunk + 2),
                                                weights[(chunk + 1) % 2]);
            const int64_t pairs = blocks * panels * ((count + 1) / 2);
            converter.pace = (converter.units + pairs - 1) / pairs;
            const auto activations = [&](int64_t m, int64_t step) {
                return static_cast<const uint8_t*>(task.blocks[m].values) + step * kStepBytes;
            };
            for (int64_t m = 0; m < blocks; m++) {
                const int64_t rows = task.rows - m * kRows;
                const uint8_t* a = activations(m, first);
                const uint8_t* next = m + 1 < blocks ? activations(m + 1, first) : activations(0, first + count);
                for (int64_t n = 0; n < panels; n++) {
                    float* block_sums = sums + (m * panels + n) * kBlockSums;
                    const uint8_t* b = weights[chunk % 2] + n * count * kStepBytes;
                    const Chunk operands{a, b, count};
                    const Ahead ahead{next + n * count * share, share};
                    if (rows > 16)
                        block<2>(session, operands, block_sums, chunk > 0, ahead, converter, pending);
                    else
                        block<1>(session, operands, block_sums, chunk > 0, ahead, converter, pending);
                    if (is_last) pending.begin({task, n, m, block_sums, block_sums - panels / 2 * kBlockSums}, rows);
                }
            }
            while (converter.units) converter.next();
        }
        pending.finish();
        if (task.streams) Vector::end_streams();
    }

    template <int kRowTiles, class Converter, class Pending>
    static inline __attribute__((always_inline)) void block(Session& session, Chunk chunk, float* sums, bool has_sums,
                                                            Ahead ahead, Converter& converter, Pending& pending) {
        const int64_t pace = converter.pace;
        if (has_sums)
            session.template load_sums<kRowTiles>(sums);
        else
            session.template zero<kRowTiles>();
        for (int64_t step = 0; step < chunk.steps; step++) {
            session.template multiply<kRowTiles, false, Session::Streams::weights>(
                chunk.activations + step * kStepBytes, chunk.weights + step * kStepBytes, kTileBytes, 64);
            if (has_sums)
                for (int i = 0; i < 4; i++) __builtin_prefetch(sums + kBlockSums + step * 64 + i * 16, 1, 3);
            ahead.fetch(step);
            if (step % 2)
                for (int64_t i = 0; i < pace; i++) converter.next();
            pending.next_of(kChunkSteps);
        }
        session.template store_sums<kRowTiles>(sums);
    }
};

}  // namespace
}  // namespace optimum_chatglm_ov
