// SPDX-License-Identifier: Apache-2.0
// The two matrix products of attention on bf16 tiles, kRowTiles tiles of 16 rows each. Tiles 0..3: sums
// [row tile][column tile]; 4, 5: left operand; 6, 7: right operand. After each step of up to four products comes a
// call of `between`, whose vector instructions run beside them.
#pragma once

#include "attention/products.hpp"
#include "attention/tile_memory.hpp"
#include "simd/tiles.hpp"

namespace optimum_chatglm_ov {
namespace {

// Scores of a block: query [kRowTiles][head_dim / 32] tiles, scores [kRowTiles][2] tiles.
template <int kRowTiles, class Tiles, class Between>
inline __attribute__((always_inline)) void score_tiles(Tiles& tiles, const bf16* query, const bf16* keys,
                                                       int64_t head_dim, float* scores, const Between& between) {
    tiles.template zero<0>();
    tiles.template zero<1>();
    if constexpr (kRowTiles == 2) {
        tiles.template zero<2>();
        tiles.template zero<3>();
    }
    for (int64_t d = 0; d < head_dim; d += 32) {
        tiles.template load<4>(query + d * 16, 64);
        tiles.template load_streamed<6>(keys + d * 16, 64);
        tiles.template dot<0, 4, 6>();
        tiles.template load_streamed<7>(keys + (head_dim + d) * 16, 64);
        tiles.template dot<1, 4, 7>();
        if constexpr (kRowTiles == 2) {
            tiles.template load<5>(query + (head_dim + d) * 16, 64);
            tiles.template dot<2, 5, 6>();
            tiles.template dot<3, 5, 7>();
        }
        between();
    }
    tiles.template store<0>(scores, 64);
    tiles.template store<1>(scores + kTileFloats, 64);
    if constexpr (kRowTiles == 2) {
        tiles.template store<2>(scores + 2 * kTileFloats, 64);
        tiles.template store<3>(scores + 3 * kTileFloats, 64);
    }
}

// Adds weights [blocks][2] tiles times values of 32 channels from `channel` on to output [kRowTiles][head_dim / 16]
// tiles, of which it begins at those channels.
template <int kRowTiles, class Tiles, class Between>
inline __attribute__((always_inline)) void value_tiles(Tiles& tiles, const bf16* weights,
                                                       const BlocksView<bf16>& values, int64_t channel, float* output,
                                                       const Between& between) {
    const int64_t head_dim = values.head_dim;
    float* second = output + head_dim * kTileRows;
    tiles.template load<0>(output, 64);
    tiles.template load<1>(output + kTileFloats, 64);
    if constexpr (kRowTiles == 2) {
        tiles.template load<2>(second, 64);
        tiles.template load<3>(second + kTileFloats, 64);
    }
    for (int64_t b = 0; b < values.count; b++, weights += kBlockScores) {
        const bf16* block = values.blocks[b] + channel * 2;
        tiles.template load<4>(weights, 64);
        tiles.template load_streamed<6>(block, head_dim * 4);
        tiles.template dot<0, 4, 6>();
        tiles.template load_streamed<7>(block + 32, head_dim * 4);
        tiles.template dot<1, 4, 7>();
        if constexpr (kRowTiles == 2) {
            tiles.template load<5>(weights + kTileElements, 64);
            tiles.template dot<2, 5, 6>();
            tiles.template dot<3, 5, 7>();
        }
        between();
    }
    tiles.template store<0>(output, 64);
    tiles.template store<1>(output + kTileFloats, 64);
    if constexpr (kRowTiles == 2) {
        tiles.template store<2>(second, 64);
        tiles.template store<3>(second + kTileFloats, 64);
    }
}

}  // namespace
}  // namespace optimum_chatglm_ov
