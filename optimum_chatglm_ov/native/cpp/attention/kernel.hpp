// SPDX-License-Identifier: Apache-2.0
// What the driver (attention.cpp) asks of the kernels of one instruction set.
#pragma once

#include <cstddef>

#include "attention/attention.hpp"
#include "common/cpu_features.hpp"

namespace optimum_chatglm_ov {

// What one batch row sees of one cache block.
struct BlockView {
    uint32_t visible;   // bit j: attention_mask keeps token j of the block; bits beyond the last token are 0
    int32_t cache_row;  // the row that holds the whole block, or -1: look each token up in the beam table
};

// Queries [first_query, last_query) of one batch row, for all query heads of one KV head, over the cache blocks
// [first_block, last_block). Row r of the task is query first_query + r / group, head r % group of the KV head.
struct AttendTask {
    int64_t batch, kv_head;
    int64_t first_query, last_query;
    int64_t first_block, last_block;
    const BlockView* blocks;  // of this batch row, indexed by absolute block number
    // Partial results over a part of the keys; null: normalise and write to the output.
    float* partial_output;  // [rows, head_dim]
    float* partial_max;     // [rows], base-2 logarithm scale
    float* partial_sum;     // [rows]
};

struct AttentionKernels {
    // Rotates and stores tokens [first, last) of a batch row and KV head, and clears the rest of the last value block.
    void (*append)(const AttentionArguments&, int64_t batch, int64_t kv_head, int64_t first, int64_t last);
    // Bytes of scratch, 64-byte aligned, that attend needs for tasks of up to `rows` rows.
    size_t (*scratch_bytes)(const AttentionArguments&, int64_t rows);
    void (*attend)(const AttentionArguments&, const AttendTask&, void* scratch);
    bool (*accepts)(int64_t head_dim, CachePrecision);
    int64_t max_rows;  // of a task; more would gain nothing
};

}  // namespace optimum_chatglm_ov
