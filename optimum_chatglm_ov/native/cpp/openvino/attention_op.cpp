// SPDX-License-Identifier: Apache-2.0
#include "openvino/attention_op.hpp"

#include <vector>

#include "attention/attention.hpp"
#include "openvino/executor.hpp"

namespace optimum_chatglm_ov {
namespace {

const char* const kInputNames[ChatGLMAttention::kInputs] = {
    "query",          "key",         "value",        "cos",        "sin",
    "key_cache",      "value_cache", "past_length",  "beam_table", "attention_mask",
    "context_length", "prefix keys", "prefix values"};

CachePrecision parse(const ov::Node* node, const std::string& name) {
    CachePrecision precision;
    NODE_VALIDATION_CHECK(node, parse_cache_precision(name.c_str(), precision),
                          "cache_precision must be f32, bf16 or i8, found ", name);
    return precision;
}

// Stores the prefix in every row when nothing comes after it yet.
void append_prefix(AttentionArguments a, const ov::Tensor& keys, const ov::Tensor& values) {
    const int64_t tokens = keys.get_shape()[0], width = a.num_key_value_heads * a.head_dim;
    OPENVINO_ASSERT(keys.get_shape() == values.get_shape() && a.past_length >= tokens,
                    "ChatGLMAttention: past_length must count the ", tokens, " tokens of the prefix, found ",
                    a.past_length);
    if (a.past_length > tokens) return;
    const auto repeat = [&](const ov::Tensor& source) {
        std::vector<float> rows;
        for (int64_t b = 0; b < a.batch; b++)
            rows.insert(rows.end(), source.data<float>(), source.data<float>() + tokens * width);
        return rows;
    };
    const std::vector<float> key = repeat(keys), value = repeat(values);
    a.query_length = tokens;
    a.past_length = 0;
    a.rotary_dim = 0;
    a.activation_type = ActivationType::f32;
    a.key = key.data();
    a.value = value.data();
    a.key_stride = a.value_stride = width;
    append_to_cache(a, ArenaExecutor());
}

}  // namespace

ChatGLMAttention::ChatGLMAttention(const ov::OutputVector& inputs, int64_t num_attention_heads,
                                   int64_t num_key_value_heads, int64_t head_dim, float scale,
                                   const std::string& cache_precision)
    : Op(inputs),
      num_attention_heads_(num_attention_heads),
      num_key_value_heads_(num_key_value_heads),
      head_dim_(head_dim),
      scale_(scale),
      cache_precision_(cache_precision) {
    constructor_validate_and_infer_types();
}

void ChatGLMAttention::validate_and_infer_types() {
    using ov::element::Type_t;
    const size_t inputs = get_input_size();
    NODE_VALIDATION_CHECK(this, inputs == kInputsWithoutPrefix || inputs == kInputs, "needs ",
                          static_cast<size_t>(kInputsWithoutPrefix), " inputs, or ", static_cast<size_t>(kInputs),
                          " with a prefix, found ", inputs);
    NODE_VALIDATION_CHECK(this, num_key_value_heads_ > 0 && num_attention_heads_ % num_key_value_heads_ == 0,
                          "num_attention_heads (", num_attention_heads_,
                          ") must be a multiple of num_key_value_heads (", num_key_value_heads_, ")");
    NODE_VALIDATION_CHECK(this, head_dim_ > 0 && head_dim_ % 16 == 0 && head_dim_ <= kMaxHeadDim,
                          "head_dim must be a multiple of 16 up to ", kMaxHeadDim, ", found ", head_dim_);
    const CachePrecision precision = parse(this, cache_precision_);
    const auto type = get_input_element_type(kQuery);
    NODE_VALIDATION_CHECK(this, type.is_dynamic() || type == Type_t::f32 || type == Type_t::bf16,
                          "query must be f32 or bf16, found ", type);
    const auto require_type = [&](size_t input, const ov::element::Type& wanted) {
        const auto found = get_input_element_type(input);
        NODE_VALIDATION_CHECK(this, found.compatible(wanted), kInputNames[input], " must be ", wanted, ", found ",
                              found);
    };
    const auto require_shape = [&](size_t input, const ov::PartialShape& wanted) {
        const auto& found = get_input_partial_shape(input);
        NODE_VALIDATION_CHECK(this, found.compatible(wanted), kInputNames[input], " must have shape ", wanted,
                              ", found ", found);
    };
    const ov::Dimension any;
    const int64_t width = num_key_value_heads_ * head_dim_;
    const ov::PartialShape cache{any, num_key_value_heads_, any, cache_block_bytes(precision, head_dim_)};
    require_shape(kQuery, {any, any, num_attention_heads_ * head_dim_});
    for (size_t i : {kKey, kValue}) require_type(i, type), require_shape(i, {any, any, width});
    for (size_t i : {kCos, kSin}) require_type(i, Type_t::f32);
    for (size_t i : {kKeyCache, kValueCache}) require_type(i, Type_t::u8), require_shape(i, cache);
    for (size_t i : {kPastLength, kBeamTable, kAttentionMask, kContextLength}) require_type(i, Type_t::i32);
    for (size_t i : {kBeamTable, kAttentionMask}) require_shape(i, {any, any});
    require_shape(kContextLength, {any});
    if (inputs == kInputs)
        for (size_t i : {kPrefixKeys, kPrefixValues}) require_type(i, Type_t::f32), require_shape(i, {any, width});
    ov::PartialShape output = get_input_partial_shape(kQuery);
    if (output.rank().is_dynamic()) output = {any, any, num_attention_heads_ * head_dim_};
    output[2] = num_attention_heads_ * head_dim_;
    set_output_type(0, type, output);
}

std::shared_ptr<ov::Node> ChatGLMAttention::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    return std::make_shared<ChatGLMAttention>(inputs, num_attention_heads_, num_key_value_heads_, head_dim_, scale_,
                                              cache_precision_);
}

bool ChatGLMAttention::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("num_attention_heads", num_attention_heads_);
    visitor.on_attribute("num_key_value_heads", num_key_value_heads_);
    visitor.on_attribute("head_dim", head_dim_);
    visitor.on_attribute("scale", scale_);
    visitor.on_attribute("cache_precision", cache_precision_);
    return true;
}

bool ChatGLMAttention::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const ov::Shape query = inputs[kQuery].get_shape(), cos = inputs[kCos].get_shape(),
                    cache = inputs[kKeyCache].get_shape();
    const size_t batch = query[0], length = query[1];
    outputs[0].set_shape(query);
    if (batch == 0 || length == 0) return true;
    OPENVINO_ASSERT(cos.size() >= 3 && inputs[kPastLength].get_size() == 1,
                    "ChatGLMAttention: cos must have 3 or 4 dimensions and past_length be one number, found ", cos,
                    " and ", inputs[kPastLength].get_shape());

    AttentionArguments a{};
    a.batch = batch;
    a.query_length = length;
    a.past_length = *inputs[kPastLength].data<int32_t>();
    a.num_attention_heads = num_attention_heads_;
    a.num_key_value_heads = num_key_value_heads_;
    a.head_dim = head_dim_;
    a.scale = scale_;
    a.cache_precision = parse(this, cache_precision_);
    a.activation_type =
        inputs[kQuery].get_element_type() == ov::element::bf16 ? ActivationType::bf16 : ActivationType::f32;
    a.query_stride = num_attention_heads_ * head_dim_;
    a.key_stride = a.value_stride = num_key_value_heads_ * head_dim_;
    for (size_t i : {kKey, kValue}) {
        const ov::Shape wanted{batch, length, static_cast<size_t>(a.key_stride)};
        OPENVINO_ASSERT(
            inputs[i].get_shape() == wanted && inputs[i].get_element_type() == inputs[kQuery].get_element_type(),
            "ChatGLMAttention: ", kInputNames[i], " must be ", wanted, " ", inputs[kQuery].get_element_type(),
            ", found ", inputs[i].get_shape(), " ", inputs[i].get_element_type());
    }
    a.query = inputs[kQuery].data();
    a.key = inputs[kKey].data();
    a.value = inputs[kValue].data();

    a.rotary_dim = cos.back();
    const size_t tables = a.rotary_dim ? inputs[kCos].get_size() / (length * a.rotary_dim) : 1;
    OPENVINO_ASSERT(inputs[kSin].get_shape() == cos && (a.rotary_dim == 0 || cos[cos.size() - 2] == length) &&
                        (tables == 1 || tables == batch) && cos.front() == tables,
                    "ChatGLMAttention: cos and sin must be [", batch, " or 1, ", length, ", rotary dim], found ", cos,
                    " and ", inputs[kSin].get_shape());
    a.cos = inputs[kCos].data<float>();
    a.sin = inputs[kSin].data<float>();
    a.rotary_batch_stride = tables == 1 ? 0 : length * a.rotary_dim;

    OPENVINO_ASSERT(cache == inputs[kValueCache].get_shape(), "ChatGLMAttention: key cache ", cache,
                    " and value cache ", inputs[kValueCache].get_shape(), " must have one shape");
    a.cache_rows = cache[0];
    a.cache_blocks = cache[2];
    // The caches are the caller's own memory: bound with set_tensor, written in place.
    a.key_cache = const_cast<uint8_t*>(static_cast<const uint8_t*>(inputs[kKeyCache].data()));
    a.value_cache = const_cast<uint8_t*>(static_cast<const uint8_t*>(inputs[kValueCache].data()));

    const ov::Shape table = inputs[kBeamTable].get_shape(), mask = inputs[kAttentionMask].get_shape();
    OPENVINO_ASSERT(table.size() == 2 && table[0] == batch && static_cast<int64_t>(table[1]) >= a.past_length,
                    "ChatGLMAttention: beam_table must be [", batch, ", at least ", a.past_length, "], found ", table);
    OPENVINO_ASSERT(
        mask.size() == 2 && mask[0] == batch && static_cast<int64_t>(mask[1]) == a.past_length + a.query_length,
        "ChatGLMAttention: attention_mask must be [", batch, ", ", a.past_length + a.query_length,
        "] (past and new tokens), found ", mask);
    OPENVINO_ASSERT(inputs[kContextLength].get_size() == batch, "ChatGLMAttention: context_length must be [", batch,
                    "], found ", inputs[kContextLength].get_shape());
    a.beam_table = inputs[kBeamTable].data<int32_t>();
    a.beam_table_stride = table[1];
    a.attention_mask = inputs[kAttentionMask].data<int32_t>();
    a.attention_mask_stride = mask[1];
    a.context_length = inputs[kContextLength].data<int32_t>();
    a.output = outputs[0].data();

    if (inputs.size() == kInputs) append_prefix(a, inputs[kPrefixKeys], inputs[kPrefixValues]);
    fused_attention(a, ArenaExecutor());
    return true;
}

}  // namespace optimum_chatglm_ov
