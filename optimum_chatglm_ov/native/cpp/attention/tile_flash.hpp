// SPDX-License-Identifier: Apache-2.0
// Flash-style attention of one task on bf16 tiles. The cache layouts are tile layouts already: 16 rows of 64 bytes
// hold 32 channels of 16 keys, or 32 keys of 16 channels. Queries, scores, weights and outputs are kept as whole tiles
// too.
//
// The unit of work is an item: a group of 32 rows against a panel of cache blocks. The tile unit and the vector units
// work side by side: between the products of one item's scores, and of an earlier item's weights and values, come
// slices of the softmax in between.
//
// A row's weights are 2^(score - reference), the reference being its largest score in the first panel it sees. Later
// panels look for no maximum: weights above 1 do no harm until they are huge, and then the item is done again with a
// new reference (rebase).
#pragma once

#include "attention/bf16_tile_products.hpp"
#include "attention/byte_tile_products.hpp"
#include "attention/dequantized_blocks.hpp"
#include "attention/flash.hpp"
#include "attention/tile_rows.hpp"
#include "attention/tile_softmax.hpp"

namespace optimum_chatglm_ov {
namespace {

// Tiles: simd/tiles.hpp. Vector: simd/vector.hpp, of all 16 lanes of a tile's row or a divisor of them.
template <class Tiles, class Vector>
class TileFlash {
public:
    static_assert(IsTiles<Tiles>::value, "Tiles lacks what simd/tiles.hpp lists");
    static_assert(IsTileVector<Vector>::value && 16 % Vector::kLanes == 0, "Vector lacks what simd/vector.hpp lists");

    static constexpr int64_t kMaxRows = 512;  // of a task, beyond which longer ones gain nothing

    // An int8 cache is converted panel by panel, its scales included; for few queries that would take longer than the
    // rest, and bytes are multiplied.
    using FewQueries = Flash<ByteTileProducts<Tiles, Vector>, Vector>;

    static bool accepts(int64_t head_dim, CachePrecision precision) {
        return head_dim % 32 == 0 && precision != CachePrecision::f32;
    }

    static size_t scratch_bytes(const AttentionArguments& a, int64_t rows) {
        const size_t bytes = TileMemory(a, rows, nullptr).bytes;
        return greater(bytes, FewQueries::scratch_bytes(a, lesser(rows, kFewRows)));
    }

    static void attend(const AttentionArguments& a, const AttendTask& task, void* memory) {
        const int64_t rows = (task.last_query - task.first_query) * (a.num_attention_heads / a.num_key_value_heads);
        if (a.cache_precision == CachePrecision::i8 && rows <= kFewRows)
            FewQueries::attend(a, task, memory);
        else
            TileFlash(a, task, memory).run();
    }

private:
    static constexpr int64_t kFirstBlocks = 2;  // of the first panel, whose softmax nothing overlaps
    static constexpr int64_t kItems = 8;        // at most in flight
    static constexpr int64_t kFewRows = 64;
    static constexpr float kHuge = 0x1p64f;  // sums below it leave room for values in f32

    TileFlash(const AttentionArguments& a, const AttendTask& task, void* memory)
        : a_(a),
          task_(task),
          head_dim_(a.head_dim),
          rows_(a, task),
          steps_(a.head_dim / 32),
          slices_((128 + a.head_dim - 1) / a.head_dim),
          scale_(a.scale * 1.44269504f),  // the softmax runs on powers of two
          memory_(a, rows_.count, memory) {
        TileConfiguration c;
        c.palette = 1;
        for (int t = 0; t < 8; t++) c.rows[t] = kTileRows, c.row_bytes[t] = 64;
        tiles_.configure(c);
    }
    ~TileFlash() { tiles_.release(); }

    void run() {
        load_tile_queries<Vector>(rows_, memory_);
        const int64_t groups = round_up(rows_.count, kGroupRows) / kGroupRows, end = rows_.last_block();
        int64_t size = kFirstBlocks;
        for (int64_t block = task_.first_block, number = 0; block < end; number++, size = kTilePanelBlocks) {
            TilePanel& panel = panels_[number % kTilePanels];
            block = panel.collect(task_, block, end, size, [&](int64_t i, int64_t b) {
                const int64_t index = number % kTilePanels * 2 * kTilePanelBlocks + i;
                panel.keys[i] = readable<Kind::keys>(b, index);
                panel.values[i] = readable<Kind::values>(b, index + kTilePanelBlocks);
            });
            for (int64_t group = 0; group < groups; group++) {
                const int64_t rows = rows_.count - group * kGroupRows;
                const int64_t count = panel.count_before(limit_of((group + 1) * kGroupRows - 1));
                if (count > 0) attend_item(panel, group, count, rows > kTileRows ? kGroupRows : kTileRows);
            }
        }
        finish_softmax();
        finish_values();
        write_tile_results<Vector>(a_, task_, rows_, memory_);
    }

    template <Kind kKind>
    const bf16* readable(int64_t block, int64_t index) {
        uint8_t* gathered = memory_.gathered + index * cache_block_bytes(a_.cache_precision, head_dim_);
        uint8_t* data = stored_block<kKind>(a_, task_, block, gathered);
        if (a_.cache_precision == CachePrecision::bf16) return reinterpret_cast<const bf16*>(data);
        bf16* target = memory_.converted + index * kBlockTokens * head_dim_;
        const float* scales = Int8Block::scales(data, head_dim_);
        kKind == Kind::keys ? dequantize_keys(data, scales, head_dim_, target)
                            : dequantize_values(data, scales, head_dim_, target);
        return target;
    }

    // ---- the pipeline: scores of an item, softmax at most kRing blocks behind, then its values

    void attend_item(const TilePanel& panel, int64_t group, int64_t count, int64_t rows) {
        TileItem& item = items_[scored_items_ % kItems];
        item = {&panel, scored_items_++, group, count, rows};
        if (!(memory_.state[group] & kHasReferences)) {
            finish_softmax();
            rebase(item);
            return;
        }
        for (int64_t b = 0; b < count; b++) {
            while (scored_ - weighed_ >= kRing) press_on();
            Waiting& waiting = waiting_[scored_ % kRing];
            waiting = {&item, b};
            score_block(item, b, memory_.ring + scored_ % kRing * kBlockScores);
            scored_++;
            settle();
            // As many products with values as with keys, in the long run.
            owed_ = valued_items_ < weighed_items_ ? owed_ + steps_ : 0;
            while (valued_items_ < weighed_items_ && owed_ >= items_[valued_items_ % kItems].count) {
                owed_ -= items_[valued_items_ % kItems].count;
                accumulate_channels();
                settle();
            }
        }
    }

    // A few rows of scores become weights, if any wait. Between tile products: leaves tiles alone.
    __attribute__((always_inline)) void weigh_slice() {
        for (int64_t i = 0; i < slices_; i++) {
            if (slice_.rows == 0 && !begin_block()) return;
            weigh_rows<Vector>(slice_, scale_);
            if (slice_.rows == 0) finish_block();
        }
    }

    // False if no block of scores waits, or there is no room for its weights.
    __attribute__((noinline)) bool begin_block() {
        if (weighed_ == scored_ || has_huge_sums_) return false;
        const Waiting& waiting = waiting_[weighed_ % kRing];
        if (waiting.item->number - valued_items_ >= 2) return false;  // its weights are still an earlier item's
        begin_block(*waiting.item, waiting.block, memory_.ring + weighed_ % kRing * kBlockScores);
        return true;
    }

    void begin_block(const TileItem& item, int64_t b, float* scores) {
        if (is_masked(item, b))
            for (int64_t r = 0; r < item.rows; r++) mask(item, b, r, scores + score_row_offset(r));
        const int64_t row = item.group * kGroupRows;
        const int second = memory_.state[item.group] & kSecondSums;
        slice_ = {item.rows,
                  scores,
                  memory_.weights_of(item, b),
                  memory_.sums[b == 0 ? second : !second] + row * 16,
                  memory_.sums[!second] + row * 16,
                  memory_.shift + row};
    }

    __attribute__((noinline)) void finish_block() {
        const Waiting& waiting = waiting_[weighed_++ % kRing];
        const TileItem& item = *waiting.item;
        if (waiting.block < item.count - 1) return;
        const float* sums = memory_.sums[!(memory_.state[item.group] & kSecondSums)] + item.group * kGroupRows * 16;
        for (int64_t i = 0; i < item.rows * 16; i += Vector::kLanes)
            has_huge_sums_ = has_huge_sums_ || !Vector::load(sums + i).all_below(kHuge);
        if (!has_huge_sums_) finish_item(item);
    }

    void finish_item(const TileItem& item) {
        memory_.state[item.group] ^= kSecondSums;
        weighed_items_++;
    }

    // Between items' products: what slices could not do.
    void settle() {
        if (has_huge_sums_) rebase(items_[weighed_items_ % kItems]);
    }

    void press_on() {
        settle();
        if (weighed_ == scored_) return;
        if (waiting_[weighed_ % kRing].item->number - valued_items_ >= 2)
            accumulate_channels();
        else
            weigh_slice();
        settle();
    }

    void finish_softmax() {
        settle();
        while (weighed_ < scored_) press_on();
    }

    void finish_values() {
        while (valued_items_ < weighed_items_) accumulate_channels();
    }

    // The whole softmax of an item whose rows get the reference that its scores ask for.
    void rebase(const TileItem& item) {
        has_huge_sums_ = true;  // nothing else is weighed meanwhile
        finish_values();
        for (int64_t b = 0; b < item.count; b++) score_block(item, b, memory_.scores + b * kBlockScores);
        bool has_references = true;
        for (int64_t r = 0; r < item.rows; r++) {
            Vector largest = Vector::all(kHidden);
            for (int64_t b = 0; b < item.count; b++) {
                float* scores = memory_.scores + b * kBlockScores + score_row_offset(r);
                if (is_masked(item, b)) mask(item, b, r, scores);
                for (int64_t i = 0; i < 2 * kTileFloats; i += kTileFloats)
                    for (int64_t j = 0; j < 16; j += Vector::kLanes)
                        largest = Vector::maximum(largest, Vector::load(scores + i + j));
            }
            const int64_t row = item.group * kGroupRows + r;
            const float old = memory_.reference[row], found = greater(old, largest.max_lane() * scale_);
            memory_.reference[row] = found;
            memory_.shift[row] = found == kHidden ? 0.0f : -found;
            has_references = has_references && found != kHidden;
            if (found == old) continue;
            const Vector factor = Vector::all(std::exp2(old - found));
            float* sums = memory_.sums[memory_.state[item.group] & kSecondSums] + row * 16;
            for (int64_t j = 0; j < 16; j += Vector::kLanes)
                Vector::multiply(Vector::load(sums + j), factor).store(sums + j);
            for (int64_t d = 0; d < head_dim_; d += Vector::kLanes) {
                float* output = memory_.output_at(row, d);
                Vector::multiply(Vector::load(output), factor).store(output);
            }
        }
        for (int64_t b = 0; b < item.count; b++) {
            begin_block(item, b, memory_.scores + b * kBlockScores);
            while (slice_.rows) weigh_rows<Vector>(slice_, scale_);
        }
        if (has_references) memory_.state[item.group] |= kHasReferences;
        has_huge_sums_ = false;
        finish_item(item);
    }

    // ---- softmax

    bool is_masked(const TileItem& item, int64_t b) const {
        return item.panel->visible_before(b, limit_of(item.group * kGroupRows)) != ~0u;
    }

    void mask(const TileItem& item, int64_t b, int64_t r, float* scores) const {
        mask_scores(item.panel->visible_before(b, limit_of(item.group * kGroupRows + r)), scores);
    }

    // ---- products

    void score_block(const TileItem& item, int64_t b, float* scores) {
        const bf16* keys = item.panel->keys[b];
        const bf16* query = memory_.query + item.group * kGroupRows * head_dim_;
        const auto between = [&]() __attribute__((always_inline)) { weigh_slice(); };
        if (a_.cache_precision == CachePrecision::bf16) {
            prefetch_share(keys, item.group);
            prefetch_share(item.panel->values[b], item.group);
        }
        if (item.rows > kTileRows)
            score_tiles<2>(tiles_, query, keys, head_dim_, scores, between);
        else
            score_tiles<1>(tiles_, query, keys, head_dim_, scores, between);
    }

    // The group's share of the block that most likely takes this one's place in the next panel.
    void prefetch_share(const bf16* block, int64_t group) const {
        const int64_t lines = kBlockTokens * head_dim_ * 2 / 64,
                      groups = round_up(rows_.count, kGroupRows) / kGroupRows;
        const int64_t share = (lines + groups - 1) / groups;
        const uint8_t* next = reinterpret_cast<const uint8_t*>(block) + kTilePanelBlocks * lines * 64;
        for (int64_t i = group * share; i < lesser((group + 1) * share, lines); i++)
            __builtin_prefetch(next + i * 64, 0, 2);
    }

    // Weights times values of the next 32 channels of the first item that waits for them.
    void accumulate_channels() {
        const TileItem& item = items_[valued_items_ % kItems];
        const bf16* weights = memory_.weights_of(item, 0);
        const BlocksView<bf16> values{item.panel->values, item.count, head_dim_};
        float* output = memory_.output_at(item.group * kGroupRows, channel_);
        const auto between = [&]() __attribute__((always_inline)) { weigh_slice(); };
        if (item.rows > kTileRows)
            value_tiles<2>(tiles_, weights, values, channel_, output, between);
        else
            value_tiles<1>(tiles_, weights, values, channel_, output, between);
        channel_ += 32;
        if (channel_ < head_dim_) return;
        channel_ = 0;
        valued_items_++;
    }

    // ---- rows

    // See TaskRows; rows beyond the last one are like it.
    int64_t limit_of(int64_t r) const { return rows_.limit(lesser(r, rows_.count - 1)); }

    struct Waiting {
        const TileItem* item;
        int64_t block;
    };

    const AttentionArguments& a_;
    const AttendTask& task_;
    const int64_t head_dim_;
    const TaskRows rows_;
    const int64_t steps_;   // of four products, of a block's scores
    const int64_t slices_;  // that keep pace with the products, after each step
    const float scale_;
    const TileMemory memory_;
    Tiles tiles_;
    TilePanel panels_[kTilePanels];
    TileItem items_[kItems];  // by number
    Waiting waiting_[kRing];
    int64_t scored_items_ = 0, weighed_items_ = 0, valued_items_ = 0;
    int64_t scored_ = 0, weighed_ = 0;  // blocks
    Slice slice_{};                     // of the first of them that waits
    int64_t channel_ = 0;               // of the item whose values are being added up
    int64_t owed_ = 0;                  // steps of such products
    bool has_huge_sums_ = false;        // the item just weighed must be done again
};

template <class Tiles, class Vector>
const AttentionKernels* make_tile_attention_kernels() {
    using F = TileFlash<Tiles, Vector>;
    static const AttentionKernels kernels{append_tokens, F::scratch_bytes, F::attend, F::accepts, F::kMaxRows};
    return &kernels;
}

}  // namespace
}  // namespace optimum_chatglm_ov
