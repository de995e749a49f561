// SPDX-License-Identifier: Apache-2.0
// Flash-style attention of one task, over the matrix products of one instruction set.
//   Products  products.hpp
//   Vector    f32 vectors for the softmax: simd/vector.hpp
#pragma once

#include "attention/append.hpp"
#include "attention/converted_blocks.hpp"
#include "attention/flash_softmax.hpp"
#include "attention/stored_blocks.hpp"

namespace optimum_chatglm_ov {
namespace {

// Tasks of so few queries would wait for memory: it is kept busy while earlier blocks are worked on, and blocks go
// through the first-level cache a few at a time.
constexpr int64_t kFewQueries = 2;
constexpr int64_t kStreamedBlocks = 2;
constexpr int64_t kStreamedRows = 8;  // with fewer, the processor's own prefetching does better

template <class Products, class Vector>
class Flash {
public:
    static_assert(IsProducts<Products>::value, "Products lacks what products.hpp lists");
    using Element = typename Products::Element;

    // Other caches are converted, without loss.
    static bool accepts(int64_t head_dim, CachePrecision precision) {
        const bool converts = kF32 || (!kInt8 && precision == CachePrecision::i8);
        return Products::accepts(head_dim) && (precision == Products::kStored || converts);
    }

    static size_t scratch_bytes(const AttentionArguments& a, int64_t rows) { return Memory(a, rows, nullptr).bytes; }

    static void attend(const AttentionArguments& a, const AttendTask& task, void* memory) {
        Flash(a, task, memory).run();
    }

private:
    static constexpr bool kF32 = Products::kStored == CachePrecision::f32;
    static constexpr bool kInt8 = Products::kStored == CachePrecision::i8;
    using Memory = FlashMemory<Products>;
    using Panel = FlashPanel<Products>;

    Flash(const AttentionArguments& a, const AttendTask& task, void* memory)
        : a_(a),
          task_(task),
          head_dim_(a.head_dim),
          rows_(a, task),
          few_queries_(task.last_query - task.first_query <= kFewQueries),
          reads_directly_(a.cache_precision == Products::kStored),
          scale_(a.scale * 1.44269504f),  // the softmax runs on powers of two
          memory_(a, rows_.count, memory) {}

    void run() {
        load_queries();
        const int64_t end = rows_.last_block();
        const int64_t size = few_queries_ && !reads_directly_ ? kStreamedBlocks : Panel::kBlocks;
        for (int64_t block = task_.first_block; block < end;) {
            block = panel_.collect(task_, block, end, size, [&](int64_t i, int64_t b) { add_block(i, b); });
            for (int64_t first = 0; first < rows_.count; first += kRowGroup) {
                const int64_t last = lesser(first + kRowGroup, rows_.count);
                const int64_t count = panel_.count_before(rows_.limit(last - 1));
                if (count > 0) attend_rows(first, last, count);
            }
        }
        write_results();
    }

    void load_queries() {
        const int64_t padded = round_up(rows_.count, Products::kRowMultiple);
        std::memset(memory_.output, 0, padded * head_dim_ * 4);
        fill(memory_.row_max, memory_.row_max + rows_.count, kHidden);
        fill(memory_.row_sum, memory_.row_sum + rows_.count, 0.0f);
        alignas(64) float row[kMaxHeadDim];
        for (int64_t r = 0; r < rows_.count; r++) {
            rows_.load_query(r, row);
            Element* query = memory_.query + r * head_dim_;
            if constexpr (kInt8) {
                int8_t* integers = reinterpret_cast<int8_t*>(query);
                const float found = quantize(row, head_dim_, integers);
                memory_.query_scale[r] = found < 1e-30f ? 1e-30f : found;  // 0 times a hidden score would be a NaN
                int32_t sum = 0;
                for (int64_t d = 0; d < head_dim_; d++) sum += integers[d];
                memory_.query_offset[r] = static_cast<float>(sum * Int8Block::kKeyOffset);
            } else {
                for (int64_t d = 0; d < head_dim_; d += Vector::kLanes)
                    store_elements(query + d, Vector::load(row + d));
            }
        }
        std::memset(memory_.query + rows_.count * head_dim_, 0, (padded - rows_.count) * head_dim_ * sizeof(Element));
    }

    // ---- one panel

    void add_block(int64_t i, int64_t block) {
        panel_.stored_keys[i] = address(a_.key_cache, block);
        panel_.stored_values[i] = address(a_.value_cache, block);
        panel_.keys[i] = readable<Kind::keys>(block, i, &panel_.key_scales[i]);
        panel_.values[i] = readable<Kind::values>(block, Panel::kBlocks + i, &panel_.value_scales[i]);
    }

    // Where the block, or most of its tokens, is.
    const uint8_t* address(uint8_t* cache, int64_t block) const {
        return cache_block(a_, cache, greater<int64_t>(task_.blocks[block].cache_row, 0), task_.kv_head, block);
    }

    template <Kind kKind>
    const Element* readable(int64_t block, int64_t index, const float** scales) {
        constexpr bool kIsKey = kKind == Kind::keys;
        uint8_t* gathered = memory_.gathered + index * cache_block_bytes(a_.cache_precision, head_dim_);
        uint8_t* data = stored_block<kKind>(a_, task_, block, gathered);
        const bool is_int8 = a_.cache_precision == CachePrecision::i8;
        *scales = is_int8 ? Int8Block::scales(data, head_dim_) : nullptr;
        Element* target = memory_.converted + index * kBlockTokens * head_dim_;
        if constexpr (!kInt8) {
            using Integer = std::conditional_t<kIsKey, Int8Block::Key, Int8Block::Value>;
            const int64_t rows = kIsKey ? 2 * head_dim_ : kBlockTokens, count = kIsKey ? 16 : head_dim_;
            if (is_int8) {
                convert_block(reinterpret_cast<const Integer*>(data), rows, count, target);
                return target;
            }
            if constexpr (kF32) {
                if (a_.cache_precision == CachePrecision::bf16) {
                    convert_block(reinterpret_cast<const bf16*>(data), rows, count, target);
                    return target;
                }
            }
        }
        return reinterpret_cast<const Element*>(data);
    }

    // ---- one group of rows against the first `count` blocks of the panel

    void attend_rows(int64_t first, int64_t last, int64_t count) {
        const int64_t padded = round_up(last - first, Products::kRowMultiple);
        compute_scores(first, padded, count);
        float mean_factor = 0;
        if constexpr (kInt8) mean_factor = sum_values(count, rows_.limit(first));
        for (int64_t r = first; r < last; r++) {
            const float shrink =
                FlashSoftmax<Products, Vector>::weigh(panel_, count, rows_.limit(r), scale_, memory_.row(r, first));
            float* output = memory_.output + r * head_dim_;
            const Vector factor = Vector::all(shrink);
            if constexpr (kInt8) {
                const Vector rest = Vector::all(memory_.rests[r - first] * memory_.factors[r - first] * mean_factor);
                for (int64_t d = 0; d < head_dim_; d += Vector::kLanes)
                    Vector::multiply_add(rest, Vector::load(memory_.value_sum + d),
                                         Vector::multiply(Vector::load(output + d), factor))
                        .store(output + d);
            } else if (shrink != 1.0f) {
                for (int64_t d = 0; d < head_dim_; d += Vector::kLanes)
                    Vector::multiply(Vector::load(output + d), factor).store(output + d);
            }
        }
        for (int64_t r = last - first; r < padded; r++)
            std::memset(memory_.weights + r * Panel::kTokens, 0, Panel::kTokens * sizeof(Element));
        add_values(first, padded, count);
    }

    void compute_scores(int64_t first, int64_t rows, int64_t count) {
        const RowsView<const Element> query{memory_.query + first * head_dim_, head_dim_, rows};
        const RowsView<float> scores{memory_.scores, Panel::kTokens, rows};
        if (!few_queries_) return Products::scores(session_, query, {panel_.keys, count, head_dim_}, scores);
        // Values read directly are needed after the scores of this panel, converted ones with the next panel.
        const int64_t value_distance = reads_directly_ ? 0 : kStreamedBlocks;
        const int64_t bytes = cache_block_bytes(a_.cache_precision, head_dim_);
        for (int64_t b = 0; b < count; b++)
            Products::scores_ahead(
                session_, query, {panel_.keys + b, 1, head_dim_},
                {scores.data + b * kBlockTokens, scores.stride, rows},
                {{panel_.stored_keys[b] + kStreamedBlocks * bytes, panel_.stored_values[b] + value_distance * bytes},
                 bytes});
    }

    void add_values(int64_t first, int64_t rows, int64_t count) {
        const int64_t bytes = cache_block_bytes(a_.cache_precision, head_dim_);
        const int64_t step = few_queries_ && rows >= kStreamedRows ? kStreamedBlocks : count;
        for (int64_t b = 0; b < count; b += step) {
            for (int64_t next = b + step; next < lesser(b + 2 * step, count); next++)
                for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(panel_.stored_values[next] + i, 0, 3);
            Products::accumulate(session_, {memory_.weights + b * kBlockTokens, Panel::kTokens, rows}, memory_.factors,
                                 {panel_.values + b, lesser(step, count - b), head_dim_},
                                 memory_.output + first * head_dim_);
        }
    }

    // What weights lose by rounding goes to the mean of the values, or the many small weights beside a large one would
    // count for nothing. The mean is of values before `limit`, which every row of the group sees.
    // Sums those values; returns the inverse of their number, 0 if there is none.
    float sum_values(int64_t count, int64_t limit) {
        int64_t tokens = 0;
        for (int64_t b = 0; b < count; b++) {
            const uint32_t visible = panel_.visible_before(b, limit);
            for (int64_t j = 0; j < kBlockTokens; j++) memory_.weights[b * kBlockTokens + j] = visible >> j & 1;
            tokens += __builtin_popcount(visible);
        }
        const float one = 1.0f;
        fill(memory_.value_sum, memory_.value_sum + head_dim_, 0.0f);
        Products::accumulate(session_, {memory_.weights, Panel::kTokens, 1}, &one, {panel_.values, count, head_dim_},
                             memory_.value_sum);
        return tokens ? 1.0f / tokens : 0.0f;
    }

    // ---- the end

    void write_results() const {
        if (task_.partial_output) {
            std::memcpy(task_.partial_output, memory_.output, rows_.count * head_dim_ * 4);
            std::memcpy(task_.partial_max, memory_.row_max, rows_.count * 4);
            std::memcpy(task_.partial_sum, memory_.row_sum, rows_.count * 4);
            return;
        }
        for (int64_t r = 0; r < rows_.count; r++) {
            const float* source = memory_.output + r * head_dim_;
            const float inverse = memory_.row_sum[r] > 0 ? 1.0f / memory_.row_sum[r] : memory_.row_sum[r];
            if (a_.activation_type == ActivationType::f32) {
                float* __restrict target = static_cast<float*>(a_.output) + rows_.output_offset(r);
                for (int64_t d = 0; d < head_dim_; d++) target[d] = source[d] * inverse;
            } else {
                bf16* __restrict target = static_cast<bf16*>(a_.output) + rows_.output_offset(r);
                for (int64_t d = 0; d < head_dim_; d++) target[d] = to_bf16(source[d] * inverse);
            }
        }
    }

    const AttentionArguments& a_;
    const AttendTask& task_;
    const int64_t head_dim_;
    const TaskRows rows_;
    const bool few_queries_;
    const bool reads_directly_;  // the cache holds what the products read
    const float scale_;
    const Memory memory_;
    Panel panel_;
    typename Products::Session session_;
};

template <class Products, class Vector>
const AttentionKernels* make_attention_kernels() {
    using F = Flash<Products, Vector>;
    static const AttentionKernels kernels{append_tokens, F::scratch_bytes, F::attend, F::accepts, 256};
    return &kernels;
}

}  // namespace
}  // namespace optimum_chatglm_ov
