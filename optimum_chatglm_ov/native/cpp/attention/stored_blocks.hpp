// SPDX-License-Identifier: Apache-2.0
// Blocks of the cache as they are stored, wherever their tokens lie.
#pragma once

#include "attention/kernel.hpp"

namespace optimum_chatglm_ov {
namespace {

inline uint8_t* cache_block(const AttentionArguments& a, uint8_t* cache, int64_t row, int64_t head, int64_t block) {
    return cache + ((row * a.num_key_value_heads + head) * a.cache_blocks + block) *
                       cache_block_bytes(a.cache_precision, a.head_dim);
}

enum class Kind { keys, values };

// A block whose tokens live in several cache rows, put together in `target` in the cache's own layout.
template <class Block, Kind kKind>
void gather_tokens(const AttentionArguments& a, const AttendTask& task, int64_t block, uint8_t* target) {
    constexpr bool kIsKey = kKind == Kind::keys;
    using Element = typename Block::Key;  // or one as large
    constexpr int64_t n = kIsKey ? Block::kTogether : 1;
    const int64_t head_dim = a.head_dim, total = a.past_length + a.query_length;
    std::memset(target, 0, Block::bytes(head_dim));
    for (int64_t t = 0; t < kBlockTokens && block * kBlockTokens + t < total; t++) {
        const int64_t slot = block * kBlockTokens + t;
        const int64_t row = slot < a.past_length ? a.beam_table[task.batch * a.beam_table_stride + slot] : task.batch;
        uint8_t* source = cache_block(a, kIsKey ? a.key_cache : a.value_cache, row, task.kv_head, block);
        for (int64_t d = 0; d < head_dim; d += n) {
            const int64_t at = kIsKey ? Block::key_offset(t, d, head_dim) : Block::value_offset(t, d, head_dim);
            std::memcpy(reinterpret_cast<Element*>(target) + at, reinterpret_cast<Element*>(source) + at,
                        sizeof(Element) * n);
        }
        if constexpr (Block::kHasScales) Block::scales(target, head_dim)[t] = Block::scales(source, head_dim)[t];
    }
}

// A block of the task's batch row and head: where it is, or put together in `gathered`.
template <Kind kKind>
uint8_t* stored_block(const AttentionArguments& a, const AttendTask& task, int64_t block, uint8_t* gathered) {
    const int64_t row = task.blocks[block].cache_row;
    if (row >= 0) return cache_block(a, kKind == Kind::keys ? a.key_cache : a.value_cache, row, task.kv_head, block);
    with_block(a.cache_precision,
               [&](auto layout) { gather_tokens<decltype(layout), kKind>(a, task, block, gathered); });
    return gathered;
}

}  // namespace
}  // namespace optimum_chatglm_ov
