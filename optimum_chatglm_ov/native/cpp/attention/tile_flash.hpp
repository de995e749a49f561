// SPDX-License-Identifier: Apache-2.0
// Flash-style attention of one task on bf16 tiles. The cache layouts are tile layouts already: 16 rows of 64 bytes hold
// 32 channels of 16 keys, or 32 keys of 16 channels. Queries, scores, weights and outputs are kept as whole tiles too.
//
// The unit of work is an item: a group of 32 rows against a panel of cache blocks. The tile unit and the vector units
// work side by side: between the products of one item's scores, and of an earlier item's weights and values, come
// slices of the softmax in between.
//
// A row's weights are 2^(score - reference), the reference being its largest score in the first panel it sees. Later
// panels look for no maximum: weights above 1 do no harm until they are huge, and then the item is done again with a
// new reference (rebase).
#pragma once

#include "attention/flash.hpp"
#include "attention/tile_products.hpp"
#include "simd/tiles.hpp"

namespace optimum_chatglm_ov {
namespace {

#if defined(__AVX512BF16__)
// Four bytes of each of 16 lanes, times scales of their own -> two lines of bf16 pairs.
inline void convert_fours(const uint8_t* source, __m512i flip, const __m512* scales, uint16_t* first,
                          uint16_t* second) {
    alignas(64) static constexpr uint16_t kInTurns[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(kInTurns);
    const __m512i fours = _mm512_xor_si512(_mm512_loadu_si512(source), flip);
    const auto scaled = [&](__m512i integers, int i) { return _mm512_mul_ps(_mm512_cvtepi32_ps(integers), scales[i]); };
    const __m512 a = scaled(_mm512_srai_epi32(_mm512_slli_epi32(fours, 24), 24), 0);
    const __m512 b = scaled(_mm512_srai_epi32(_mm512_slli_epi32(fours, 16), 24), 1);
    const __m512 c = scaled(_mm512_srai_epi32(_mm512_slli_epi32(fours, 8), 24), 2);
    const __m512 d = scaled(_mm512_srai_epi32(fours, 24), 3);
    _mm512_storeu_si512(first, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a)));
    _mm512_storeu_si512(second, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(d, c)));
}

inline void dequantize_keys(const uint8_t* block, const float* scales, int64_t head_dim, uint16_t* target) {
    const __m512i flip = _mm512_set1_epi8(-kKeyOffset);
    for (int64_t half = 0; half < 2; half++) {
        __m512 of_tokens[4];
        for (__m512& s : of_tokens) s = _mm512_loadu_ps(scales + half * 16);
        for (int64_t d = 0; d < head_dim; d += 4, block += 64, target += 64)
            convert_fours(block, flip, of_tokens, target, target + 32);
    }
}

inline void dequantize_values(const uint8_t* block, const float* scales, int64_t head_dim, uint16_t* target) {
    for (int64_t t = 0; t < kBlockTokens; t += 4, target += 2 * head_dim) {
        __m512 of_tokens[4];
        for (int i = 0; i < 4; i++) of_tokens[i] = _mm512_set1_ps(scales[t + i]);
        for (int64_t d = 0; d < head_dim; d += 16, block += 64, target += 32)
            convert_fours(block, _mm512_setzero_si512(), of_tokens, target, target + 2 * head_dim);
    }
}
#else
inline void dequantize_keys(const uint8_t* block, const float* scales, int64_t head_dim, uint16_t* target) {
    for (int64_t t = 0; t < kBlockTokens; t++)
        for (int64_t d = 0; d < head_dim; d++)
            target[key_offset<uint16_t>(t, d, head_dim)] =
                to_bf16(scales[t] * to_float(block[key_offset<uint8_t>(t, d, head_dim)]));
}

inline void dequantize_values(const uint8_t* block, const float* scales, int64_t head_dim, uint16_t* target) {
    const int8_t* integers = reinterpret_cast<const int8_t*>(block);
    for (int64_t t = 0; t < kBlockTokens; t++)
        for (int64_t d = 0; d < head_dim; d++)
            target[value_offset<uint16_t>(t, d, head_dim)] =
                to_bf16(scales[t] * to_float(integers[value_offset<int8_t>(t, d, head_dim)]));
}
#endif

// Tiles, Vector: what computes; Vector has either all 16 lanes of a tile's row or a divisor of them.
template <class Tiles, class Vector>
class TileFlash {
public:
    static constexpr int64_t kMaxRows = 512;  // of a task, beyond which longer ones gain nothing

    // An int8 cache is converted panel by panel, its scales included; for few queries that would take longer than the
    // rest, and bytes are multiplied.
    using FewQueries = Flash<ByteTileProducts<Tiles, Vector>, Vector>;

    static bool accepts(int64_t head_dim, CachePrecision precision) {
        return head_dim % 32 == 0 && precision != CachePrecision::f32;
    }

    static size_t scratch_bytes(const AttentionArguments& a, int64_t rows) {
        const size_t bytes = Scratch(a, round_up(rows, kGroupRows), nullptr).bytes;
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
    static constexpr int64_t kGroupRows = 32, kTileRows = 16, kSliceRows = 4;
    static constexpr int64_t kTileFloats = 256, kTileElements = 512;
    static constexpr int64_t kPanelBlocks = 8;
    static constexpr int64_t kFirstBlocks = 2;  // of the first panel, whose softmax nothing overlaps
    static constexpr int64_t kPanels = 3;       // that items in flight may be of
    static constexpr int64_t kItems = 8;        // at most in flight
    static constexpr int64_t kRing = 3;         // blocks of scores that wait for their softmax
    static constexpr int64_t kBlockScores = kGroupRows * kBlockTokens;
    static constexpr int64_t kFewRows = 64;
    static constexpr float kHuge = 0x1p64f;  // sums below it leave room for values in f32

    struct Panel {
        int64_t count;
        int64_t first_token[kPanelBlocks];
        uint32_t visible[kPanelBlocks];
        const uint16_t* keys[kPanelBlocks];
        const uint16_t* values[kPanelBlocks];
    };

    // Rows of one group against the first blocks of a panel.
    struct Item {
        const Panel* panel;
        int64_t number, group, count, rows;
    };

    struct Scratch {
        uint16_t* query;    // [row tiles][head_dim / 32] tiles
        float* output;      // [row tiles][head_dim / 16] tiles
        float* sums[2];     // [rows, 16], row sums by lane: before the item in work, and with it
        float* reference;   // [rows]
        float* shift;       // [rows], minus the reference, 0 while there is none
        uint8_t* state;     // [groups]
        float* ring;        // [kRing][2 row tiles][2] tiles
        float* scores;      // [kPanelBlocks] of the same
        uint16_t* weights;  // [2][kPanelBlocks][2 row tiles] tiles
        uint16_t* converted;  // [kPanels][2][kPanelBlocks] blocks
        uint8_t* gathered;    // the same in the cache's layout
        size_t bytes;

        Scratch(const AttentionArguments& a, int64_t rows, void* memory) {
            uint8_t* base = static_cast<uint8_t*>(memory);
            size_t offset = 0;
            const auto take = [&](size_t size) {
                uint8_t* part = base + offset;
                offset += round_up(size, 64);
                return part;
            };
            const auto take_floats = [&](size_t count) { return reinterpret_cast<float*>(take(count * 4)); };
            ring = take_floats(kRing * kBlockScores);
            weights = reinterpret_cast<uint16_t*>(take(2 * kPanelBlocks * kBlockScores * 2));
            query = reinterpret_cast<uint16_t*>(take(rows * a.head_dim * 2));
            output = take_floats(rows * a.head_dim);
            for (float*& s : sums) s = take_floats(rows * 16);
            reference = take_floats(rows);
            shift = take_floats(rows);
            state = take(rows / kGroupRows);
            scores = take_floats(kPanelBlocks * kBlockScores);
            const size_t blocks = kPanels * 2 * kPanelBlocks;
            converted = reinterpret_cast<uint16_t*>(
                take(a.cache_precision == CachePrecision::i8 ? blocks * kBlockTokens * a.head_dim * 2 : 0));
            gathered = take(blocks * cache_block_bytes(a.cache_precision, a.head_dim));
            bytes = offset;
        }
    };

    // State of a group: which of the sums are the ones so far, and whether every row has a reference.
    static constexpr uint8_t kSecondSums = 1, kHasReferences = 2;

    TileFlash(const AttentionArguments& a, const AttendTask& task, void* memory)
        : a_(a),
          task_(task),
          head_dim_(a.head_dim),
          heads_(a.num_attention_heads / a.num_key_value_heads),
          rows_((task.last_query - task.first_query) * heads_),
          context_length_(a.context_length ? a.context_length[task.batch] : 0),
          steps_(a.head_dim / 32),
          slices_((128 + a.head_dim - 1) / a.head_dim),
          scale_(a.scale * 1.44269504f),  // the softmax runs on powers of two
          scratch_(a, round_up(rows_, kGroupRows), memory) {
        TileConfiguration c;
        c.palette = 1;
        for (int t = 0; t < 8; t++) c.rows[t] = kTileRows, c.row_bytes[t] = 64;
        tiles_.configure(c);
    }
    ~TileFlash() { tiles_.release(); }

    void run() {
        load_queries();
        const int64_t groups = (rows_ + kGroupRows - 1) / kGroupRows;
        const int64_t end = lesser(task_.last_block, (limit_of(rows_ - 1) + kBlockTokens - 1) / kBlockTokens);
        int64_t size = kFirstBlocks;
        for (int64_t block = task_.first_block, number = 0; block < end; number++, size = kPanelBlocks) {
            Panel& panel = panels_[number % kPanels];
            for (panel.count = 0; block < end && panel.count < size; block++)
                if (task_.blocks[block].visible) add_block(panel, number % kPanels, block);
            for (int64_t group = 0; group < groups; group++) {
                const int64_t rows = rows_ - group * kGroupRows;
                const int64_t furthest = limit_of((group + 1) * kGroupRows - 1);
                int64_t count = panel.count;
                while (count > 0 && panel.first_token[count - 1] >= furthest) count--;
                if (count > 0) attend_item(panel, group, count, rows > kTileRows ? kGroupRows : kTileRows);
            }
        }
        finish_softmax();
        finish_values();
        write_results();
    }

    // ---- one panel

    void add_block(Panel& panel, int64_t panel_number, int64_t block) {
        const int64_t i = panel.count++;
        panel.first_token[i] = block * kBlockTokens;
        panel.visible[i] = task_.blocks[block].visible;
        panel.keys[i] = readable(block, true, panel_number * 2 * kPanelBlocks + i);
        panel.values[i] = readable(block, false, (panel_number * 2 + 1) * kPanelBlocks + i);
    }

    const uint16_t* readable(int64_t block, bool is_key, int64_t index) {
        const int64_t row = task_.blocks[block].cache_row;
        uint8_t* data = scratch_.gathered + index * cache_block_bytes(a_.cache_precision, head_dim_);
        if (row >= 0)
            data = cache_block(a_, is_key ? a_.key_cache : a_.value_cache, row, task_.kv_head, block);
        else
            gather_block(a_, task_, block, is_key, data);
        if (a_.cache_precision == CachePrecision::bf16) return reinterpret_cast<const uint16_t*>(data);
        uint16_t* target = scratch_.converted + index * kBlockTokens * head_dim_;
        (is_key ? dequantize_keys : dequantize_values)(data, block_scales(data, head_dim_), head_dim_, target);
        return target;
    }

    // ---- the pipeline: scores of an item, softmax at most kRing blocks behind, then its values

    void attend_item(const Panel& panel, int64_t group, int64_t count, int64_t rows) {
        Item& item = items_[scored_items_ % kItems];
        item = {&panel, scored_items_++, group, count, rows};
        if (!(scratch_.state[group] & kHasReferences)) {
            finish_softmax();
            rebase(item);
            return;
        }
        for (int64_t b = 0; b < count; b++) {
            while (scored_ - weighed_ >= kRing) press_on();
            Waiting& waiting = waiting_[scored_ % kRing];
            waiting = {&item, b};
            score_block(item, b, scratch_.ring + scored_ % kRing * kBlockScores);
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
            weigh_rows(slice_, scale_);
            if (slice_.rows == 0) finish_block();
        }
    }

    // False if no block of scores waits, or there is no room for its weights.
    __attribute__((noinline)) bool begin_block() {
        if (weighed_ == scored_ || has_huge_sums_) return false;
        const Waiting& waiting = waiting_[weighed_ % kRing];
        if (waiting.item->number - valued_items_ >= 2) return false;  // its weights are still an earlier item's
        begin_block(*waiting.item, waiting.block, scratch_.ring + weighed_ % kRing * kBlockScores);
        return true;
    }

    void begin_block(const Item& item, int64_t b, float* scores) {
        if (is_masked(item, b))
            for (int64_t r = 0; r < item.rows; r++) mask(item, b, r, scores + row_offset(r, 2 * kTileFloats));
        const int64_t row = item.group * kGroupRows;
        const int second = scratch_.state[item.group] & kSecondSums;
        slice_ = {item.rows,
                  scores,
                  scratch_.weights + (item.number % 2 * kPanelBlocks + b) * kBlockScores,
                  scratch_.sums[b == 0 ? second : !second] + row * 16,
                  scratch_.sums[!second] + row * 16,
                  scratch_.shift + row};
    }

    __attribute__((noinline)) void finish_block() {
        const Waiting& waiting = waiting_[weighed_++ % kRing];
        const Item& item = *waiting.item;
        if (waiting.block < item.count - 1) return;
        const float* sums = scratch_.sums[!(scratch_.state[item.group] & kSecondSums)] + item.group * kGroupRows * 16;
        for (int64_t i = 0; i < item.rows * 16; i += Vector::kLanes)
            has_huge_sums_ = has_huge_sums_ || !Vector::load(sums + i).all_below(kHuge);
        if (!has_huge_sums_) finish_item(item);
    }

    void finish_item(const Item& item) {
        scratch_.state[item.group] ^= kSecondSums;
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
    void rebase(const Item& item) {
        has_huge_sums_ = true;  // nothing else is weighed meanwhile
        finish_values();
        for (int64_t b = 0; b < item.count; b++) score_block(item, b, scratch_.scores + b * kBlockScores);
        bool has_references = true;
        for (int64_t r = 0; r < item.rows; r++) {
            Vector largest = Vector::all(kHidden);
            for (int64_t b = 0; b < item.count; b++) {
                float* scores = scratch_.scores + b * kBlockScores + row_offset(r, kTileFloats * 2);
                if (is_masked(item, b)) mask(item, b, r, scores);
                for (int64_t i = 0; i < 2 * kTileFloats; i += kTileFloats)
                    for (int64_t j = 0; j < 16; j += Vector::kLanes)
                        largest = Vector::maximum(largest, Vector::load(scores + i + j));
            }
            const int64_t row = item.group * kGroupRows + r;
            const float old = scratch_.reference[row], found = greater(old, largest.max_lane() * scale_);
            scratch_.reference[row] = found;
            scratch_.shift[row] = found == kHidden ? 0.0f : -found;
            has_references = has_references && found != kHidden;
            if (found == old) continue;
            const Vector factor = Vector::all(std::exp2(old - found));
            float* sums = scratch_.sums[scratch_.state[item.group] & kSecondSums] + row * 16;
            for (int64_t j = 0; j < 16; j += Vector::kLanes)
                Vector::multiply(Vector::load(sums + j), factor).store(sums + j);
            for (int64_t d = 0; d < head_dim_; d += Vector::kLanes) {
                float* output = output_at(row, d);
                Vector::multiply(Vector::load(output), factor).store(output);
            }
        }
        for (int64_t b = 0; b < item.count; b++) {
            begin_block(item, b, scratch_.scores + b * kBlockScores);
            while (slice_.rows) weigh_rows(slice_, scale_);
        }
        if (has_references) scratch_.state[item.group] |= kHasReferences;
        has_huge_sums_ = false;
        finish_item(item);
    }

    // ---- softmax

    // Queries, scores and outputs of a row within its group: `tile` numbers for each row tile.
    static int64_t row_offset(int64_t r, int64_t tile) { return r / kTileRows * tile + r % kTileRows * 16; }

    bool is_masked(const Item& item, int64_t b) const {
        return visible_before(item.panel->visible[b], item.panel->first_token[b], limit_of(item.group * kGroupRows)) !=
               ~0u;
    }

    void mask(const Item& item, int64_t b, int64_t r, float* scores) const {
        const uint32_t visible = visible_before(item.panel->visible[b], item.panel->first_token[b],
                                                limit_of(item.group * kGroupRows + r));
        for (int64_t j = 0; j < 16; j++) {
            scores[j] = visible >> j & 1 ? scores[j] : kHidden;
            scores[kTileFloats + j] = visible >> (16 + j) & 1 ? scores[kTileFloats + j] : kHidden;
        }
    }

    // What is left of a block of scores: rows, and where the next one's parts are.
    struct Slice {
        int64_t rows;
        const float* scores;
        uint16_t* weights;
        const float* before;  // sums
        float* after;
        const float* shift;
    };

    __attribute__((always_inline)) static void weigh_rows(Slice& slice, float scale) {
        const Vector factor = Vector::all(scale);
        const float* const scores = slice.scores;
        uint16_t* const weights = slice.weights;
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

    // ---- products. Tiles 0..3: sums [row tile][column tile]; 4, 5: left operand; 6, 7: right operand.

    void score_block(const Item& item, int64_t b, float* scores) {
        const uint16_t* keys = item.panel->keys[b];
        if (a_.cache_precision == CachePrecision::bf16) {
            prefetch_share(keys, item.group);
            prefetch_share(item.panel->values[b], item.group);
        }
        if (item.rows > kTileRows)
            score_tiles<2>(item.group, keys, scores);
        else
            score_tiles<1>(item.group, keys, scores);
    }

    // The group's share of the block that most likely takes this one's place in the next panel.
    void prefetch_share(const uint16_t* block, int64_t group) const {
        const int64_t lines = kBlockTokens * head_dim_ * 2 / 64, groups = (rows_ + kGroupRows - 1) / kGroupRows;
        const int64_t share = (lines + groups - 1) / groups;
        const uint8_t* next = reinterpret_cast<const uint8_t*>(block) + kPanelBlocks * lines * 64;
        for (int64_t i = group * share; i < lesser((group + 1) * share, lines); i++)
            __builtin_prefetch(next + i * 64, 0, 2);
    }

    template <int kRowTiles>
    void score_tiles(int64_t group, const uint16_t* keys, float* scores) {
        const uint16_t* query = scratch_.query + group * kGroupRows * head_dim_;
        tiles_.template zero<0>();
        tiles_.template zero<1>();
        if constexpr (kRowTiles == 2) {
            tiles_.template zero<2>();
            tiles_.template zero<3>();
        }
        for (int64_t d = 0; d < head_dim_; d += 32) {
            tiles_.template load<4>(query + d * 16, 64);
            tiles_.template load_streamed<6>(keys + d * 16, 64);
            tiles_.template dot<0, 4, 6>();
            tiles_.template load_streamed<7>(keys + (head_dim_ + d) * 16, 64);
            tiles_.template dot<1, 4, 7>();
            if constexpr (kRowTiles == 2) {
                tiles_.template load<5>(query + (head_dim_ + d) * 16, 64);
                tiles_.template dot<2, 5, 6>();
                tiles_.template dot<3, 5, 7>();
            }
            weigh_slice();
        }
        tiles_.template store<0>(scores, 64);
        tiles_.template store<1>(scores + kTileFloats, 64);
        if constexpr (kRowTiles == 2) {
            tiles_.template store<2>(scores + 2 * kTileFloats, 64);
            tiles_.template store<3>(scores + 3 * kTileFloats, 64);
        }
    }

    // Weights times values of the next 32 channels of the first item that waits for them.
    void accumulate_channels() {
        const Item& item = items_[valued_items_ % kItems];
        if (item.rows > kTileRows)
            value_tiles<2>(item, channel_);
        else
            value_tiles<1>(item, channel_);
        channel_ += 32;
        if (channel_ < head_dim_) return;
        channel_ = 0;
        valued_items_++;
    }

    template <int kRowTiles>
    void value_tiles(const Item& item, int64_t channel) {
        const uint16_t* weights = scratch_.weights + item.number % 2 * kPanelBlocks * kBlockScores;
        float* output = output_at(item.group * kGroupRows, channel);
        float* second = output + head_dim_ * kTileRows;
        tiles_.template load<0>(output, 64);
        tiles_.template load<1>(output + kTileFloats, 64);
        if constexpr (kRowTiles == 2) {
            tiles_.template load<2>(second, 64);
            tiles_.template load<3>(second + kTileFloats, 64);
        }
        for (int64_t b = 0; b < item.count; b++, weights += kBlockScores) {
            const uint16_t* values = item.panel->values[b] + channel * 2;
            tiles_.template load<4>(weights, 64);
            tiles_.template load_streamed<6>(values, head_dim_ * 4);
            tiles_.template dot<0, 4, 6>();
            tiles_.template load_streamed<7>(values + 32, head_dim_ * 4);
            tiles_.template dot<1, 4, 7>();
            if constexpr (kRowTiles == 2) {
                tiles_.template load<5>(weights + kTileElements, 64);
                tiles_.template dot<2, 5, 6>();
                tiles_.template dot<3, 5, 7>();
            }
            weigh_slice();
        }
        tiles_.template store<0>(output, 64);
        tiles_.template store<1>(output + kTileFloats, 64);
        if constexpr (kRowTiles == 2) {
            tiles_.template store<2>(second, 64);
            tiles_.template store<3>(second + kTileFloats, 64);
        }
    }

    // ---- the ends

    // First key that the query of row r does not see; rows beyond the last one are like it.
    int64_t limit_of(int64_t r) const {
        return key_limit(context_length_, a_.past_length + task_.first_query + lesser(r, rows_ - 1) / heads_);
    }

    float* output_at(int64_t row, int64_t channel) const {
        return scratch_.output + row / kTileRows * kTileRows * head_dim_ + channel / 16 * kTileFloats +
               row % kTileRows * 16 + channel % 16;
    }

    void load_queries() {
        const int64_t padded = round_up(rows_, kGroupRows);
        std::memset(scratch_.output, 0, padded * head_dim_ * 4);
        std::memset(scratch_.sums[0], 0, padded * 16 * 4);
        fill(scratch_.reference, scratch_.reference + padded, kHidden);
        std::memset(scratch_.shift, 0, padded * 4);
        std::memset(scratch_.state, 0, padded / kGroupRows);
        alignas(64) float row[kMaxHeadDim];
        for (int64_t r = 0; r < padded; r++) {
            uint16_t* query = scratch_.query + r / kTileRows * kTileRows * head_dim_ + r % kTileRows * 32;
            if (r < rows_) {
                const int64_t token = task_.first_query + r / heads_, head = task_.kv_head * heads_ + r % heads_;
                load_rotated(a_, a_.query,
                             (task_.batch * a_.query_length + token) * a_.query_stride + head * head_dim_,
                             a_.rotary_dim ? rotary_row(a_, a_.cos, task_.batch, token) : nullptr,
                             a_.rotary_dim ? rotary_row(a_, a_.sin, task_.batch, token) : nullptr, row);
            } else {
                fill(row, row + head_dim_, 0.0f);
            }
            for (int64_t d = 0; d < head_dim_; d += Vector::kLanes)
                Vector::load(row + d).store_bf16(query + d / 32 * kTileElements + d % 32);
        }
    }

    void write_results() {
        for (int64_t r = 0; r < rows_; r++) {
            const float* lanes = scratch_.sums[scratch_.state[r / kGroupRows] & kSecondSums] + r * 16;
            Vector sums = Vector::load(lanes);
            for (int64_t j = Vector::kLanes; j < 16; j += Vector::kLanes)
                sums = Vector::add(sums, Vector::load(lanes + j));
            const float sum = sums.sum_lanes();
            const float* source = output_at(r, 0);
            const Vector one = Vector::all(1.0f), factor = Vector::all(sum > 0 ? 1.0f / sum : sum);
            const int64_t token = task_.first_query + r / heads_, head = task_.kv_head * heads_ + r % heads_;
            const int64_t offset =
                ((task_.batch * a_.query_length + token) * a_.num_attention_heads + head) * head_dim_;
            if (task_.partial_output) {
                task_.partial_max[r] = scratch_.reference[r];
                task_.partial_sum[r] = sum;
                write_row(source, one, [&](Vector v, int64_t d) { v.store(task_.partial_output + r * head_dim_ + d); });
            } else if (a_.activation_type == ActivationType::f32) {
                float* target = static_cast<float*>(a_.output) + offset;
                write_row(source, factor, [&](Vector v, int64_t d) { v.store(target + d); });
            } else {
                uint16_t* target = static_cast<uint16_t*>(a_.output) + offset;
                write_row(source, factor, [&](Vector v, int64_t d) { v.store_bf16(target + d); });
            }
        }
    }

    // A row of outputs, times `factor`.
    template <class Write>
    __attribute__((always_inline)) void write_row(const float* source, Vector factor, const Write& write) {
        for (int64_t d = 0; d < head_dim_; d += 16, source += kTileFloats)
            for (int64_t j = 0; j < 16; j += Vector::kLanes)
                write(Vector::multiply(Vector::load(source + j), factor), d + j);
    }

    struct Waiting {
        const Item* item;
        int64_t block;
    };

    const AttentionArguments& a_;
    const AttendTask& task_;
    const int64_t head_dim_, heads_, rows_, context_length_;
    const int64_t steps_;       // of four products, of a block's scores
    const int64_t slices_;  // that keep pace with the products, after each step
    const float scale_;
    const Scratch scratch_;
    Tiles tiles_;
    Panel panels_[kPanels];
    Item items_[kItems];        // by number
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
