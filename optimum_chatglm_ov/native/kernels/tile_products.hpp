// SPDX-License-Identifier: Apache-2.0
// The two matrix products of attention on bf16 tiles. The cache layouts are tile layouts already: 16 rows of 64 bytes
// hold 32 channels of 16 keys, or 32 keys of 16 channels.
#pragma once

#include "kernel.hpp"
#include "tiles.hpp"

namespace optimum_chatglm_ov {
namespace {

template <class Tiles>
struct TileProducts {
    static constexpr CachePrecision kStored = CachePrecision::bf16;
    using Element = uint16_t;
    static constexpr int kPanelBlocks = 8;
    static constexpr int kRowMultiple = 16;  // buffers of rows are padded to whole tiles

    static bool accepts(int64_t head_dim) { return head_dim % 32 == 0; }

    struct Session {
        Tiles tiles;
        Session() {
            TileConfiguration c;
            c.palette = 1;
            for (int t = 0; t < 8; t++) c.rows[t] = 16, c.row_bytes[t] = 64;
            tiles.configure(c);
        }
        ~Session() { tiles.release(); }
        Session(const Session&) = delete;
    };

    static void scores(Session& session, const Element* query, int64_t rows, const Element* const* keys,
                       int64_t blocks, int64_t head_dim, float* scores, int64_t stride) {
        for (int64_t r = 0; r < rows; r += 32)
            for (int64_t b = 0; b < blocks; b++) {
                const Element* q = query + r * head_dim;
                float* s = scores + r * stride + b * kBlockTokens;
                if (rows - r > 16)
                    score_tiles<2>(session.tiles, q, keys[b], head_dim, s, stride);
                else
                    score_tiles<1>(session.tiles, q, keys[b], head_dim, s, stride);
            }
    }

    static void scores_ahead(Session& session, const Element* query, int64_t rows, const Element* const* keys,
                             int64_t head_dim, float* scores_, int64_t stride, const uint8_t* const* ahead,
                             int64_t bytes) {
        for (int i = 0; i < 2; i++)
            for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(ahead[i] + at, 0, 2);
        scores(session, query, rows, keys, 1, head_dim, scores_, stride);
    }

    static void accumulate(Session& session, const Element* weights, int64_t weights_stride, int64_t rows,
                           const float*, const Element* const* values, int64_t blocks, int64_t head_dim,
                           float* output) {
        for (int64_t r = 0; r < rows; r += 32)
            for (int64_t c = 0; c < head_dim; c += 32) {
                const Element* w = weights + r * weights_stride;
                float* o = output + r * head_dim + c;
                if (rows - r > 16)
                    value_tiles<2>(session.tiles, w, weights_stride, values, blocks, head_dim, c, o);
                else
                    value_tiles<1>(session.tiles, w, weights_stride, values, blocks, head_dim, c, o);
            }
    }

private:
    // Tiles 0..3: sums [row tile][column tile]; 4, 5: left operand; 6, 7: right operand.
    template <int kRowTiles>
    static void score_tiles(Tiles& tiles, const Element* query, const Element* keys, int64_t head_dim, float* scores,
                            int64_t stride) {
        tiles.template zero<0>();
        tiles.template zero<1>();
        if constexpr (kRowTiles == 2) {
            tiles.template zero<2>();
            tiles.template zero<3>();
        }
        for (int64_t d = 0; d < head_dim; d += 32) {
            tiles.template load<4>(query + d, head_dim * 2);
            tiles.template load<6>(keys + d * 16, 64);
            tiles.template dot<0, 4, 6>();
            tiles.template load<7>(keys + (head_dim + d) * 16, 64);
            tiles.template dot<1, 4, 7>();
            if constexpr (kRowTiles == 2) {
                tiles.template load<5>(query + 16 * head_dim + d, head_dim * 2);
                tiles.template dot<2, 5, 6>();
                tiles.template dot<3, 5, 7>();
            }
        }
        tiles.template store<0>(scores, stride * 4);
        tiles.template store<1>(scores + 16, stride * 4);
        if constexpr (kRowTiles == 2) {
            tiles.template store<2>(scores + 16 * stride, stride * 4);
            tiles.template store<3>(scores + 16 * stride + 16, stride * 4);
        }
    }

    template <int kRowTiles>
    static void value_tiles(Tiles& tiles, const Element* weights, int64_t weights_stride,
                            const Element* const* values, int64_t blocks, int64_t head_dim, int64_t c, float* output) {
        tiles.template load<0>(output, head_dim * 4);
        tiles.template load<1>(output + 16, head_dim * 4);
        if constexpr (kRowTiles == 2) {
            tiles.template load<2>(output + 16 * head_dim, head_dim * 4);
            tiles.template load<3>(output + 16 * head_dim + 16, head_dim * 4);
        }
        for (int64_t b = 0; b < blocks; b++) {
            tiles.template load<4>(weights + b * kBlockTokens, weights_stride * 2);
            tiles.template load<6>(values[b] + c * 2, head_dim * 4);
            tiles.template dot<0, 4, 6>();
            tiles.template load<7>(values[b] + (c + 16) * 2, head_dim * 4);
            tiles.template dot<1, 4, 7>();
            if constexpr (kRowTiles == 2) {
                tiles.template load<5>(weights + 16 * weights_stride + b * kBlockTokens, weights_stride * 2);
                tiles.template dot<2, 5, 6>();
                tiles.template dot<3, 5, 7>();
            }
        }
        tiles.template store<0>(output, head_dim * 4);
        tiles.template store<1>(output + 16, head_dim * 4);
        if constexpr (kRowTiles == 2) {
            tiles.template store<2>(output + 16 * head_dim, head_dim * 4);
            tiles.template store<3>(output + 16 * head_dim + 16, head_dim * 4);
        }
    }
};

}  // namespace
}  // namespace optimum_chatglm_ov
