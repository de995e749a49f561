// SPDX-License-Identifier: Apache-2.0
// The two matrix products of attention on byte tiles, for few queries after an int8 cache: blocks are read as they are.
// A tile of keys is 64 channels of 16 keys, or the last 32; a tile of values is the block's 32 keys of 16 channels.
#pragma once

#include "attention/kernel.hpp"
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

    static void scores(Session& session, const Element* query, int64_t rows, const Element* const* keys,
                       int64_t blocks, int64_t head_dim, float* scores, int64_t stride) {
        for (int64_t r = 0; r < rows; r += 16)
            for (int64_t b = 0; b < blocks; b++)
                score_tiles(session.tiles, query + r * head_dim, keys[b], head_dim,
                            scores + r * stride + b * kBlockTokens, stride);
    }

    static void scores_ahead(Session& session, const Element* query, int64_t rows, const Element* const* keys,
                             int64_t head_dim, float* scores_, int64_t stride, const uint8_t* const* ahead,
                             int64_t bytes) {
        for (int i = 0; i < 2; i++)
            for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(ahead[i] + at, 0, 2);
        scores(session, query, rows, keys, 1, head_dim, scores_, stride);
    }

    static void accumulate(Session& session, const Element* weights, int64_t weights_stride, int64_t rows,
                           const float* factors, const Element* const* values, int64_t blocks, int64_t head_dim,
                           float* output) {
        for (int64_t r = 0; r < rows; r += 16) {
            const int64_t count = rows - r < 16 ? rows - r : 16;
            const Element* w = weights + r * weights_stride;
            int64_t c = 0;
            for (; c + 64 <= head_dim; c += 64)
                value_tiles<4>(session.tiles, w, weights_stride, factors + r, values, blocks, head_dim, c, count,
                               output + r * head_dim + c);
            if (c < head_dim)
                value_tiles<2>(session.tiles, w, weights_stride, factors + r, values, blocks, head_dim, c, count,
                               output + r * head_dim + c);
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

    // 16 channels for each of kTiles tiles; of the 16 rows of weights the first `rows` count.
    template <int kTiles>
    static void value_tiles(Tiles& tiles, const Element* weights, int64_t weights_stride, const float* factors,
                            const Element* const* values, int64_t blocks, int64_t head_dim, int64_t c, int64_t rows,
                            float* output) {
        tiles.template zero<0>();
        tiles.template zero<1>();
        if constexpr (kTiles == 4) {
            tiles.template zero<2>();
            tiles.template zero<3>();
        }
        for (int64_t b = 0; b < blocks; b++) {
            const Element* value = values[b] + c * 4;
            tiles.template load<5>(weights + b * kBlockTokens, weights_stride);
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
        for (int64_t r = 0; r < rows; r++) {
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
