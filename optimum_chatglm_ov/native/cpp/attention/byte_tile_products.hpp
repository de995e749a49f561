// SPDX-License-Identifier: Apache-2.0
// The two matrix products of attention on byte tiles, for few queries after an int8 cache: blocks are read as they
// are. A tile of keys is 64 channels of 16 keys, or the last 32; a tile of values is the block's 32 keys of 16
// channels.
#pragma once

#include "attention/products.hpp"
#include "simd/tiles.hpp"

namespace optimum_chatglm_ov {
namespace {

template <class Tiles, class Vector>
struct ByteTileProducts {
    static constexpr CachePrecision kStored = CachePrecision::i8;
    using Element = uint8_t;
    static constexpr int kPanelBlocks = 8;
    static constexpr int kRowMultiple = 16;  // buffers of rows are padded to whole tiles

    static bool accepts(int64_t head_dim) { return head_dim % 32 == 0; }

    // Tiles 0..3: sums; 4, 6: operands of 64 channels; 5, 7: of 32 channels or keys.
    struct Session {
        Tiles tiles;
        Session() {
            TileConfiguration c;
            c.palette = 1;
            for (int t = 0; t < 8; t++) c.rows[t] = 16, c.row_bytes[t] = 64;
            c.row_bytes[5] = 32, c.rows[7] = 8;
            tiles.configure(c);
        }
        ~Session() { tiles.release(); }
        Session(const Session&) = delete;
    };

    static void scores(Session& session, RowsView<const Element> query, BlocksView<Element> keys,
                       RowsView<float> scores) {
        for (int64_t r = 0; r < query.count; r += 16)
            for (int64_t b = 0; b < keys.count; b++)
                score_tiles(session.tiles, query.data + r * query.stride, keys.blocks[b], keys.head_dim,
                            scores.data + r * scores.stride + b * kBlockTokens, scores.stride);
    }

    static void scores_ahead(Session& session, RowsView<const Element> query, BlocksView<Element> keys,
                             RowsView<float> scores_, AheadView ahead) {
        for (const uint8_t* address : ahead.addresses)
            for (int64_t at = 0; at < ahead.bytes; at += 64) __builtin_prefetch(address + at, 0, 2);
        scores(session, query, keys, scores_);
    }

    static void accumulate(Session& session, RowsView<const Element> weights, const float* factors,
                           BlocksView<Element> values, float* output) {
        for (int64_t r = 0; r < weights.count; r += 16) {
            const int64_t left = weights.count - r;
            const RowsView<const Element> some{weights.data + r * weights.stride, weights.stride,
                                               left < 16 ? left : 16};
            float* target = output + r * values.head_dim;
            int64_t c = 0;
            for (; c + 64 <= values.head_dim; c += 64)
                value_tiles<4>(session.tiles, some, factors + r, values, c, target + c);
            if (c < values.head_dim) value_tiles<2>(session.tiles, some, factors + r, values, c, target + c);
        }
    }

private:
    static void score_tiles(Tiles& tiles, const Element* query, const Element* keys, int64_t head_dim, float* scores,
                            int64_t stride) {
        tiles.template zero<0>();
        tiles.template zero<1>();
        int64_t d = 0;
        for (; d + 64 <= head_dim; d += 64) {
            tiles.template load<4>(query + d, head_dim);
            tiles.template load<6>(keys + d * 16, 64);
            tiles.template dot_signed_unsigned<0, 4, 6>();
            tiles.template load<6>(keys + (head_dim + d) * 16, 64);
            tiles.template dot_signed_unsigned<1, 4, 6>();
        }
        if (d < head_dim) {
            tiles.template load<5>(query + d, head_dim);
            tiles.template load<7>(keys + d * 16, 64);
            tiles.template dot_signed_unsigned<0, 5, 7>();
            tiles.template load<7>(keys + (head_dim + d) * 16, 64);
            tiles.template dot_signed_unsigned<1, 5, 7>();
        }
        tiles.template store<0>(scores, stride * 4);
        tiles.template store<1>(scores + 16, stride * 4);
    }

    // 16 channels for each of kTiles tiles, from channel c on; 16 rows of weights are read, of which the view's count.
    template <int kTiles>
    static void value_tiles(Tiles& tiles, RowsView<const Element> weights, const float* factors,
                            BlocksView<Element> values, int64_t c, float* output) {
        const int64_t head_dim = values.head_dim;
        tiles.template zero<0>();
        tiles.template zero<1>();
        if constexpr (kTiles == 4) {
            tiles.template zero<2>();
            tiles.template zero<3>();
        }
        for (int64_t b = 0; b < values.count; b++) {
            const Element* value = values.blocks[b] + c * 4;
            tiles.template load<5>(weights.data + b * kBlockTokens, weights.stride);
            tiles.template load<7>(value, head_dim * 4);
            tiles.template dot_unsigned_signed<0, 5, 7>();
            tiles.template load<7>(value + 64, head_dim * 4);
            tiles.template dot_unsigned_signed<1, 5, 7>();
            if constexpr (kTiles == 4) {
                tiles.template load<7>(value + 128, head_dim * 4);
                tiles.template dot_unsigned_signed<2, 5, 7>();
                tiles.template load<7>(value + 192, head_dim * 4);
                tiles.template dot_unsigned_signed<3, 5, 7>();
            }
        }
        constexpr int64_t kColumns = 16 * kTiles;
        alignas(64) float sums[16 * kColumns];
        tiles.template store<0>(sums, kColumns * 4);
        tiles.template store<1>(sums + 16, kColumns * 4);
        if constexpr (kTiles == 4) {
            tiles.template store<2>(sums + 32, kColumns * 4);
            tiles.template store<3>(sums + 48, kColumns * 4);
        }
        for (int64_t r = 0; r < weights.count; r++) {
            const Vector factor = Vector::all(factors[r]);
            for (int64_t j = 0; j < kColumns; j += Vector::kLanes) {
                float* target = output + r * head_dim + j;
                Vector::multiply_add(Vector::load_integers(sums + r * kColumns + j), factor, Vector::load(target))
                    .store(target);
            }
        }
    }
};

}  // namespace
}  // namespace optimum_chatglm_ov
