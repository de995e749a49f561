// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <openvino/op/op.hpp>
#include <string>

namespace optimum_chatglm_ov {

// Rotary embedding, append to the KV cache in place, and attention, as one operation.
//
// Inputs (B batch, L new tokens, P past tokens, H query heads, K key/value heads, D head_dim, R rotary dim):
//    0 query           f32 or bf16 [B, L, H * D]
//    1 key             same type   [B, L, K * D]
//    2 value           same type   [B, L, K * D]
//    3 cos             f32 [B or 1, L, R] or [B or 1, 1, L, R]; R = 0: no rotation
//    4 sin             same shape
//    5 key_cache       u8 [rows, K, blocks, block bytes], written in place: bind it with set_tensor
//    6 value_cache     same shape
//    7 past_length     i32 scalar or [1]: P
//    8 beam_table      i32 [B, at least P]: cache row of each past token
//    9 attention_mask  i32 [B, P + L]: 0 hides a key
//   10 context_length  i32 [B]: keys below it are visible to every query; 0 for causal attention
//   11, 12             optional: keys and values of a prefix (P-Tuning), f32 [prefix tokens, K * D], in the layout of
//                      a head of key and not rotated again. They are the first tokens of every row, counted in
//                      past_length, and stored by the call that finds nothing after them.
// Output: [B, L, H * D] in the type of query. A query that sees no key gives zeros.
//
// Blocks hold 32 tokens; attention/cache_layout.hpp has their layout and size for each cache_precision.
class ChatGLMAttention : public ov::op::Op {
public:
    OPENVINO_OP("ChatGLMAttention", "optimum_chatglm_ov");

    enum Input : size_t {
        kQuery,
        kKey,
        kValue,
        kCos,
        kSin,
        kKeyCache,
        kValueCache,
        kPastLength,
        kBeamTable,
        kAttentionMask,
        kContextLength,
        kPrefixKeys,
        kPrefixValues,
        kInputs,
        kInputsWithoutPrefix = kPrefixKeys
    };

    ChatGLMAttention() = default;
    ChatGLMAttention(const ov::OutputVector& inputs, int64_t num_attention_heads, int64_t num_key_value_heads,
                     int64_t head_dim, float scale, const std::string& cache_precision);

    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    bool has_evaluate() const override { return true; }
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

private:
    int64_t num_attention_heads_ = 0;
    int64_t num_key_value_heads_ = 0;
    int64_t head_dim_ = 0;
    float scale_ = 0;
    std::string cache_precision_ = "bf16";  // f32, bf16 or i8
};

}  // namespace optimum_chatglm_ov
