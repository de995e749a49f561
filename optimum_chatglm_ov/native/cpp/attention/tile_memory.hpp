// SPDX-License-Identifier: Apache-2.0
// What TileFlash holds in memory while it works on a task: everything but keys and values is whole tiles.
#pragma once

#include "attention/task.hpp"

namespace optimum_chatglm_ov {
namespace {

constexpr int64_t kTileRows = 16, kTileFloats = 256, kTileElements = 512;
constexpr int64_t kGroupRows = 32;  // rows that a task is worked on by: two row tiles
constexpr int64_t kTilePanelBlocks = 8;
constexpr int64_t kTilePanels = 3;  // that items in flight may be of
constexpr int64_t kRing = 3;        // blocks of scores that wait for their softmax
constexpr int64_t kBlockScores = kGroupRows * kBlockTokens;

struct TilePanel : VisibleBlocks<kTilePanelBlocks> {
    const bf16* keys[kTilePanelBlocks];
    const bf16* values[kTilePanelBlocks];
};

// Rows of one group against the first blocks of a panel.
struct TileItem {
    const TilePanel* panel;
    int64_t number, group, count, rows;
};

// State of a group: which of the sums are the ones so far, and whether every row has a reference.
constexpr uint8_t kSecondSums = 1, kHasReferences = 2;

struct TileMemory {
    int64_t head_dim;
    bf16* query;        // [row tiles][head_dim / 32] tiles
    float* output;      // [row tiles][head_dim / 16] tiles
    float* sums[2];     // [rows, 16], row sums by lane: before the item in work, and with it
    float* reference;   // [rows]
    float* shift;       // [rows], minus the reference, 0 while there is none
    uint8_t* state;     // [groups]
    float* ring;        // [kRing][2 row tiles][2] tiles
    float* scores;      // [kTilePanelBlocks] of the same
    bf16* weights;      // [2][kTilePanelBlocks][2 row tiles] tiles
    bf16* converted;    // [kTilePanels][2][kTilePanelBlocks] blocks
    uint8_t* gathered;  // the same in the cache's layout
    size_t bytes;

    TileMemory(const AttentionArguments& a, int64_t rows, void* memory) : head_dim(a.head_dim) {
        Parts parts(memory);
        rows = round_up(rows, kGroupRows);
        parts.take(ring, kRing * kBlockScores);
        parts.take(weights, 2 * kTilePanelBlocks * kBlockScores);
        parts.take(query, rows * a.head_dim);
        parts.take(output, rows * a.head_dim);
        for (float*& s : sums) parts.take(s, rows * 16);
        parts.take(reference, rows);
        parts.take(shift, rows);
        parts.take(state, rows / kGroupRows);
        parts.take(scores, kTilePanelBlocks * kBlockScores);
        const int64_t blocks = kTilePanels * 2 * kTilePanelBlocks;
        parts.take(converted, a.cache_precision == CachePrecision::i8 ? blocks * kBlockTokens * a.head_dim : 0);
        parts.take(gathered, blocks * cache_block_bytes(a.cache_precision, a.head_dim));
        bytes = parts.bytes();
    }

    float* output_at(int64_t row, int64_t channel) const {
        return output + row / kTileRows * kTileRows * head_dim + channel / 16 * kTileFloats + row % kTileRows * 16 +
               channel % 16;
    }

    // Where the weights of a block of an item are: two items have any.
    bf16* weights_of(const TileItem& item, int64_t b) const {
        return weights + (item.number % 2 * kTilePanelBlocks + b) * kBlockScores;
    }
};

}  // namespace
}  // namespace optimum_chatglm_ov
