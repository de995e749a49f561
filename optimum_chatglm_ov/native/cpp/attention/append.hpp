// SPDX-License-Identifier: Apache-2.0
// New keys and values on their way into the cache.
#pragma once

#include "attention/stored_blocks.hpp"
#include "attention/task.hpp"

namespace optimum_chatglm_ov {
namespace {

// Integers and the scale of one row for the int8 cache. Written for the compiler to vectorise: the largest magnitude
// is found among bit patterns, and adding 1.5 * 2^23 leaves the rounded integer in the low bits of the sum.
inline float quantize(const float* row, int64_t head_dim, int8_t* __restrict integers) {
    int32_t bits = 0;
    for (int64_t d = 0; d < head_dim; d++) bits = greater(bits, static_cast<int32_t>(as_bits(row[d]) & 0x7fffffffu));
    const float largest = as_float(bits);
    const float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
    for (int64_t d = 0; d < head_dim; d++)
        integers[d] = static_cast<int8_t>(as_bits(row[d] * inverse + 12582912.0f) - 0x4b400000u);
    return largest / 127.0f;
}

// f32 -> what the cache holds. Returns the scale of an int8 row, 1 otherwise.
inline float encode(const float* row, int64_t head_dim, float* target) {
    std::memcpy(target, row, head_dim * 4);
    return 1.0f;
}
inline float encode(const float* row, int64_t head_dim, bf16* __restrict target) {
    for (int64_t d = 0; d < head_dim; d++) target[d] = to_bf16(row[d]);
    return 1.0f;
}
inline float encode(const float* row, int64_t head_dim, int8_t* target) {
    return quantize(row, head_dim, target);
}

// Tokens [first, last) of the new ones of a batch row and KV head.
struct NewTokens {
    int64_t batch, head, first, last;
};

template <class Block>
void append_keys(const AttentionArguments& a, const NewTokens& tokens) {
    constexpr int64_t n = Block::kTogether;
    alignas(64) float row[kMaxHeadDim];
    alignas(64) typename Block::Value encoded[kMaxHeadDim];
    for (int64_t t = tokens.first; t < tokens.last; t++) {
        const int64_t slot = a.past_length + t, token = slot % kBlockTokens;
        load_rotated(a, a.key, (tokens.batch * a.query_length + t) * a.key_stride + tokens.head * a.head_dim,
                     angles(a, a.cos, tokens.batch, t), angles(a, a.sin, tokens.batch, t), row);
        uint8_t* block = cache_block(a, a.key_cache, tokens.batch, tokens.head, slot / kBlockTokens);
        const float scale = encode(row, a.head_dim, encoded);
        if constexpr (Block::kHasScales) {
            Block::scales(block, a.head_dim)[token] = scale;
            for (int64_t d = 0; d < a.head_dim; d++) encoded[d] ^= Block::kKeyOffset;  // + 128, as unsigned bytes
        }
        auto* target = reinterpret_cast<typename Block::Key*>(block) + Block::key_offset(token, 0, a.head_dim);
        for (int64_t d = 0; d < a.head_dim; d += n) std::memcpy(target + d * 16, encoded + d, 4);
    }
}

template <class Block>
void append_values(const AttentionArguments& a, const NewTokens& tokens) {
    constexpr int64_t n = Block::kTogether;
    using Value = typename Block::Value;
    alignas(64) float row[kMaxHeadDim];
    alignas(64) Value encoded[n][kMaxHeadDim];
    for (int64_t t = tokens.first; t < tokens.last;) {
        const int64_t slot = a.past_length + t, token = slot % kBlockTokens;
        const int64_t count = token % n == 0 && t + n <= tokens.last ? n : 1;  // all that lie together, or one of them
        uint8_t* block = cache_block(a, a.value_cache, tokens.batch, tokens.head, slot / kBlockTokens);
        for (int64_t i = 0; i < count; i++) {
            load_rotated(a, a.value,
                         (tokens.batch * a.query_length + t + i) * a.value_stride + tokens.head * a.head_dim, nullptr,
                         nullptr, row);
            const float scale = encode(row, a.head_dim, encoded[i]);
            if constexpr (Block::kHasScales) Block::scales(block, a.head_dim)[token + i] = scale;
        }
        Value* __restrict target = reinterpret_cast<Value*>(block) + Block::value_offset(token, 0, a.head_dim);
        if (count == n)
            for (int64_t d = 0; d < a.head_dim; d++)
                for (int64_t i = 0; i < n; i++) target[d * n + i] = encoded[i][d];
        else
            for (int64_t d = 0; d < a.head_dim; d++) target[d * n] = encoded[0][d];
        t += count;
    }
}

// Values beyond the last token become zero, so that weight 0 times value is 0 whatever the memory held.
template <class Block>
void clear_values(uint8_t* block, int64_t from, int64_t head_dim) {
    constexpr int64_t n = Block::kTogether;
    auto* values = reinterpret_cast<typename Block::Value*>(block);
    const int64_t whole = round_up(from, n);
    for (int64_t t = from; t < whole; t++)
        for (int64_t d = 0; d < head_dim; d++) values[Block::value_offset(t, d, head_dim)] = {};
    std::memset(values + whole * head_dim, 0, (kBlockTokens - whole) * head_dim * sizeof(*values));
    if constexpr (Block::kHasScales) {
        float* scales = Block::scales(block, head_dim);
        fill(scales + from, scales + kBlockTokens, 0.0f);
    }
}

// See AttentionKernels.
inline void append_tokens(const AttentionArguments& a, int64_t batch, int64_t head, int64_t first, int64_t last) {
    with_block(a.cache_precision, [&](auto block) {
        using Block = decltype(block);
        const NewTokens tokens{batch, head, first, last};
        append_keys<Block>(a, tokens);
        append_values<Block>(a, tokens);
        const int64_t end = a.past_length + last, used = end % kBlockTokens;
        if (last == a.query_length && used > 0)
            clear_values<Block>(cache_block(a, a.value_cache, batch, head, end / kBlockTokens), used, a.head_dim);
    });
}

}  // namespace
}  // namespace optimum_chatglm_ov
