// SPDX-License-Identifier: Apache-2.0
// Fused attention of the ChatGLM family on raw pointers: rotary embedding, append to the KV cache in place, and
// flash-style attention. Nothing here knows OpenVINO, so the same sources build a stand-alone test driver.
#pragma once

#include "attention/cache_layout.hpp"

namespace optimum_chatglm_ov {

class Executor;  // parallel.hpp

enum class ActivationType { f32, bf16 };

// query_length new tokens per batch row, appended after past_length cached ones.
//   query [batch, query_length, num_attention_heads * head_dim], row stride query_stride elements
//   key, value [batch, query_length, num_key_value_heads * head_dim], row strides key_stride, value_stride
//   cos, sin [batch or 1, query_length, rotary_dim] f32; batch stride 0 when shared
//     rotated = x * cos + concat(-x2, x1) * sin over the first rotary_dim channels, the rest pass through
//   key_cache, value_cache [cache_rows, num_key_value_heads, cache_blocks, cache_block_bytes], written in place
//   beam_table [batch, at least past_length]: cache row that holds each past token of a batch row
//   attention_mask [batch, past_length + query_length]: 0 hides a key
//   context_length [batch] or null: keys below it are visible to every query (bidirectional prefix)
//   output [batch, query_length, num_attention_heads * head_dim]; a query that sees no key gives zeros
// New tokens of batch row b are written to cache row b.
struct AttentionArguments {
    int64_t batch, query_length, past_length;
    int64_t num_attention_heads, num_key_value_heads, head_dim, rotary_dim;
    float scale;
    CachePrecision cache_precision;
    ActivationType activation_type;
    const void* query;
    const void* key;
    const void* value;
    int64_t query_stride, key_stride, value_stride;
    const float* cos;
    const float* sin;
    int64_t rotary_batch_stride;
    uint8_t* key_cache;
    uint8_t* value_cache;
    int64_t cache_rows, cache_blocks;
    const int32_t* beam_table;
    int64_t beam_table_stride;
    const int32_t* attention_mask;
    int64_t attention_mask_stride;
    const int32_t* context_length;
    void* output;
};

// Safe to call from several threads on different caches. Throws std::invalid_argument when arguments contradict each
// other (cache too small, beam table entry that is no cache row, ...), before anything is written.
// instruction_set: nullptr for the best of this CPU, or a name from instruction_sets().
void fused_attention(const AttentionArguments& arguments, const Executor& executor,
                     const char* instruction_set = nullptr);

// Only rotates and stores the new keys and values; query, attention_mask, beam_table and output are not read.
void append_to_cache(const AttentionArguments& arguments, const Executor& executor);

// Comma-separated names of the kernels that this CPU can run, best first; the software model of AMX is the last. The
// first that takes the head_dim and cache precision is used, unless the environment variable CHATGLM_OV_ISA names one;
// a name that only linear layers know changes nothing here, one that neither knows is an error in both.
const char* instruction_sets();

// Whether the kernels of this name take the shape.
bool takes(const char* instruction_set, int64_t head_dim, CachePrecision precision);

}  // namespace optimum_chatglm_ov
