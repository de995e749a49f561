// SPDX-License-Identifier: Apache-2.0
// What kernels of all kinds need of a task: its rows, what they see, where their inputs and outputs are.
#pragma once

#include "attention/kernel.hpp"

namespace optimum_chatglm_ov {
namespace {

constexpr float kHidden = -__builtin_inff();  // score of a key that a query does not see

// Not the standard ones: the linker may merge those across instruction sets.
template <class T>
inline T greater(T a, T b) {
    return a < b ? b : a;
}
template <class T>
inline T lesser(T a, T b) {
    return b < a ? b : a;
}
inline void fill(float* begin, float* end, float value) {
    while (begin < end) *begin++ = value;
}
inline int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// head_dim activations of one token and head as f32, the first rotary_dim of them rotated if there are angles.
inline void load_rotated(const AttentionArguments& a, const void* base, int64_t offset, const float* cos,
                         const float* sin, float* __restrict row) {
    if (a.activation_type == ActivationType::f32) {
        std::memcpy(row, static_cast<const float*>(base) + offset, a.head_dim * 4);
    } else {
        const bf16* source = static_cast<const bf16*>(base) + offset;
        for (int64_t d = 0; d < a.head_dim; d++) row[d] = to_float(source[d]);
    }
    if (!cos) return;
    const int64_t half = a.rotary_dim / 2;
    float* __restrict second = row + half;
    for (int64_t d = 0; d < half; d++) {
        const float x1 = row[d], x2 = second[d];
        row[d] = x1 * cos[d] - x2 * sin[d];
        second[d] = x2 * cos[half + d] + x1 * sin[half + d];
    }
}

// A row of the table of cosines or sines; null: nothing is rotated.
inline const float* angles(const AttentionArguments& a, const float* table, int64_t batch, int64_t token) {
    return a.rotary_dim ? table + batch * a.rotary_batch_stride + token * a.rotary_dim : nullptr;
}

// Row r of a task is one query head of one token.
class TaskRows {
public:
    TaskRows(const AttentionArguments& a, const AttendTask& task)
        : group(a.num_attention_heads / a.num_key_value_heads),
          count((task.last_query - task.first_query) * group),
          a_(a),
          task_(task),
          context_length_(a.context_length ? a.context_length[task.batch] : 0) {}

    // First key that the query of row r does not see, counted from the start of the cache.
    int64_t limit(int64_t r) const {
        return greater(context_length_, a_.past_length + task_.first_query + r / group + 1);
    }

    // First block that no row sees.
    int64_t last_block() const {
        return lesser(task_.last_block, (limit(count - 1) + kBlockTokens - 1) / kBlockTokens);
    }

    void load_query(int64_t r, float* row) const {
        const int64_t token = this->token(r);
        load_rotated(a_, a_.query, (task_.batch * a_.query_length + token) * a_.query_stride + head(r) * a_.head_dim,
                     angles(a_, a_.cos, task_.batch, token), angles(a_, a_.sin, task_.batch, token), row);
    }

    // Of the row's first channel.
    int64_t output_offset(int64_t r) const {
        return ((task_.batch * a_.query_length + token(r)) * a_.num_attention_heads + head(r)) * a_.head_dim;
    }

    const int64_t group;  // query heads of a KV head
    const int64_t count;

private:
    int64_t token(int64_t r) const { return task_.first_query + r / group; }
    int64_t head(int64_t r) const { return task_.kv_head * group + r % group; }

    const AttentionArguments& a_;
    const AttendTask& task_;
    const int64_t context_length_;
};

// Bit j: token j of a block that begins at first_token is seen by a query that sees the keys before `limit`.
inline uint32_t visible_before(uint32_t visible, int64_t first_token, int64_t limit) {
    const int64_t before = lesser<int64_t>(greater<int64_t>(limit - first_token, 0), kBlockTokens);
    return visible & (before == kBlockTokens ? ~0u : (static_cast<uint32_t>(1) << before) - 1);
}

// Cache blocks that are worked on together: the next ones of which any token is visible.
template <int64_t kBlocks>
struct VisibleBlocks {
    int64_t count = 0;
    int64_t first_token[kBlocks];
    uint32_t visible[kBlocks];

    // Up to `size` of the blocks [block, end), for each of which it calls take(index, block). Returns the next block.
    template <class Take>
    int64_t collect(const AttendTask& task, int64_t block, int64_t end, int64_t size, const Take& take) {
        for (count = 0; block < end && count < size; block++) {
            if (task.blocks[block].visible == 0) continue;
            first_token[count] = block * kBlockTokens;
            visible[count] = task.blocks[block].visible;
            take(count, block);
            count++;
        }
        return block;
    }

    // Of the first blocks, those that hold keys before `limit`.
    int64_t count_before(int64_t limit) const {
        int64_t first = count;
        while (first > 0 && first_token[first - 1] >= limit) first--;
        return first;
    }

    uint32_t visible_before(int64_t i, int64_t limit) const {
        return optimum_chatglm_ov::visible_before(visible[i], first_token[i], limit);
    }
};

// Hands out parts of the scratch memory, each aligned to 64 bytes; of null, it counts the bytes alone.
class Parts {
public:
    explicit Parts(void* memory) : base_(static_cast<uint8_t*>(memory)) {}

    template <class Element>
    void take(Element*& part, int64_t count) {
        part = reinterpret_cast<Element*>(base_ + bytes_);
        bytes_ += round_up(count * sizeof(Element), 64);
    }
    size_t bytes() const { return bytes_; }

private:
    uint8_t* base_;
    size_t bytes_ = 0;
};

}  // namespace
}  // namespace optimum_chatglm_ov
