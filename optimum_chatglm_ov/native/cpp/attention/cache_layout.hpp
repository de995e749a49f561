// SPDX-License-Identifier: Apache-2.0
// How keys and values lie in the cache: a cache is a sequence of blocks for each row and head.
#pragma once

#include <cstring>

#include "common/elements.hpp"

namespace optimum_chatglm_ov {

// Tokens of a block; one block is one reduction step of an AMX tile product.
constexpr int64_t kBlockTokens = 32;
constexpr int64_t kMaxHeadDim = 512;

enum class CachePrecision { f32, bf16, i8 };

// Its name; and the precision of a name, if it is one.
const char* name_of(CachePrecision precision);
bool parse_cache_precision(const char* name, CachePrecision& precision);

namespace {  // not merged across instruction sets

// A block of one head, `together` elements of which are four bytes:
//   keys    [2][head_dim / together][16 tokens][together channels]
//   values  [kBlockTokens / together][head_dim][together tokens]
template <class KeyElement, class ValueElement>
struct Block {
    using Key = KeyElement;
    using Value = ValueElement;
    static_assert(sizeof(Key) == sizeof(Value));
    static constexpr int64_t kTogether = 4 / sizeof(Key);

    // Element offset of a channel of a token.
    static constexpr int64_t key_offset(int64_t token, int64_t channel, int64_t head_dim) {
        return (token / 16) * 16 * head_dim + (channel / kTogether) * 16 * kTogether + (token % 16) * kTogether +
               channel % kTogether;
    }
    static constexpr int64_t value_offset(int64_t token, int64_t channel, int64_t head_dim) {
        return (token / kTogether) * kTogether * head_dim + channel * kTogether + token % kTogether;
    }
    static constexpr int64_t element_bytes(int64_t head_dim) { return kBlockTokens * head_dim * sizeof(Key); }
};

struct F32Block : Block<float, float> {
    static constexpr bool kHasScales = false;
    static constexpr int64_t bytes(int64_t head_dim) { return element_bytes(head_dim); }
};

struct Bf16Block : Block<bf16, bf16> {
    static constexpr bool kHasScales = false;
    static constexpr int64_t bytes(int64_t head_dim) { return element_bytes(head_dim); }
};

// After the elements one f32 scale for each token: value = scale * integer. Keys are stored as integer + kKeyOffset.
struct Int8Block : Block<uint8_t, int8_t> {
    static constexpr bool kHasScales = true;
    static constexpr int kKeyOffset = 128;
    static constexpr int64_t bytes(int64_t head_dim) { return element_bytes(head_dim) + kBlockTokens * 4; }
    static float* scales(uint8_t* block, int64_t head_dim) {
        return reinterpret_cast<float*>(block + element_bytes(head_dim));
    }
};

// call(F32Block(), Bf16Block() or Int8Block())
template <class Call>
constexpr auto with_block(CachePrecision precision, const Call& call) {
    switch (precision) {
        case CachePrecision::f32:
            return call(F32Block());
        case CachePrecision::bf16:
            return call(Bf16Block());
        default:
            return call(Int8Block());
    }
}

// Bytes of one block of one head, for keys and for values alike.
inline int64_t cache_block_bytes(CachePrecision precision, int64_t head_dim) {
    return with_block(precision, [&](auto block) { return decltype(block)::bytes(head_dim); });
}

// A token of a row of blocks of one head.
template <class Byte>
struct TokenPlace {
    Byte* blocks;
    int64_t token;
};

// Copies the keys, or the values, of `count` tokens.
inline void copy_tokens(CachePrecision precision, int64_t head_dim, bool is_keys, TokenPlace<const uint8_t> source,
                        TokenPlace<uint8_t> target, int64_t count) {
    with_block(precision, [&](auto block) {
        using Layout = decltype(block);
        constexpr int64_t size = sizeof(typename Layout::Key);
        const int64_t bytes = Layout::bytes(head_dim);
        for (int64_t i = 0; i < count; i++) {
            const int64_t from = (source.token + i) % kBlockTokens, to = (target.token + i) % kBlockTokens;
            const uint8_t* read = source.blocks + (source.token + i) / kBlockTokens * bytes;
            uint8_t* written = target.blocks + (target.token + i) / kBlockTokens * bytes;
            for (int64_t channel = 0; channel < head_dim; channel++) {
                const int64_t from_offset = is_keys ? Layout::key_offset(from, channel, head_dim)
                                                    : Layout::value_offset(from, channel, head_dim);
                const int64_t to_offset =
                    is_keys ? Layout::key_offset(to, channel, head_dim) : Layout::value_offset(to, channel, head_dim);
                std::memcpy(written + to_offset * size, read + from_offset * size, size);
            }
            if constexpr (Layout::kHasScales) {
                const int64_t scales = Layout::element_bytes(head_dim);
                std::memcpy(written + scales + to * 4, read + scales + from * 4, 4);
            }
        }
    });
}

}  // namespace
}  // namespace optimum_chatglm_ov
