// SPDX-License-Identifier: Apache-2.0
#include "openvino/attention_op.hpp"

#include <vector>

#include "attention/attention.hpp"
#include "openvino/executor.hpp"

namespace optimum_chatglm_ov {
namespace {

CachePrecision parse(const ov::Node* node, const std::string& name) {
    if (name == "f32") return CachePrecision::f32;
    if (name == "bf16") return CachePrecision::bf16;
    NODE_VALIDATION_CHECK(node, name == "i8", "cache_precision must be f32, bf16 or i8, found ", name);
    return CachePrecision::i8;
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
    NODE_VALIDATION_CHECK(this, inputs == 11 || inputs == 13, "needs 11 inputs, or 13 with a prefix, found ", inputs);
    NODE_VALIDATION_CHECK(this, num_key_value_heads_ > 0 && num_attention_heads_ % num_key_value_heads_ == 0,
                          "num_attention_heads (", num_attention_heads_, ") must be a multiple of num_key_value_heads (",
                          num_key_value_heads_, ")");
    NODE_VALIDATION_CHECK(this, head_dim_ > 0 && head_dim_ % 16 == 0 && head_dim_ <= kMaxHeadDim,
                          "head_dim must be a multiple of 16 up to ", kMaxHeadDim, ", found ", head_dim_);
    const CachePrecision precision = parse(this, cache_precision_);
    const auto type = get_input_element_type(0);
    NODE_VALIDATION_CHECK(this, type.is_dynamic() || type == Type_t::f32 || type == Type_t::bf16,
                          "query must be f32 or bf16, found ", type);
    const auto require_type = [&](size_t input, const ov::element::Type& wanted) {
        const auto found = get_input_element_type(input);
        NODE_VALIDATION_CHECK(this, found.compatible(wanted), "input ", input, " must be ", wanted, ", found ", found);
    };
    const int64_t block_bytes = cache_block_bytes(precision, head_dim_);
    const auto require_shape = [&](size_t input, const ov::PartialShape& wanted) {
        const auto& found = get_input_partial_shape(input);
        NODE_VALIDATION_CHECK(this, found.compatible(wanted), "input ", input, " must have shape ", wanted, ", found ",
                              found);
    };
    const ov::Dimension any;
    for (size_t i : {1, 2}) require_type(i, type), require_shape(i, {any, any, num_key_value_heads_ * head_dim_});
    for (size_t i : {3, 4}) require_type(i, Type_t::f32);
    for (size_t i : {5, 6}) require_type(i, Type_t::u8), require_shape(i, {any, num_key_value_heads_, any, block_bytes});
    for (size_t i : {7, 8, 9, 10}) require_type(i, Type_t::i32);
    require_shape(0, {any, any, num_attention_heads_ * head_dim_});
    for (size_t i : {8, 9}) require_shape(i, {any, any});
    require_shape(10, {any});
    for (size_t i = 11; i < inputs; i++)
        require_type(i, Type_t::f32), require_shape(i, {any, num_key_value_heads_ * head_dim_});
    ov::PartialShape output = get_input_partial_shape(0);
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
    const ov::Shape query = inputs[0].get_shape(), cos = inputs[3].get_shape(), cache = inputs[5].get_shape();
    const size_t batch = query[0], length = query[1];
    outputs[0].set_shape(query);
    if (batch == 0 || length == 0) return true;
    OPENVINO_ASSERT(cos.size() >= 3 && inputs[7].get_size() == 1,
                    "ChatGLMAttention: cos must have 3 or 4 dimensions and past_length be one number, found ", cos,
                    " and ", inputs[7].get_shape());

    AttentionArguments a{};
    a.batch = batch;
    a.query_length = length;
    a.past_length = *inputs[7].data<int32_t>();
    a.num_attention_heads = num_attention_heads_;
    a.num_key_value_heads = num_key_value_heads_;
    a.head_dim = head_dim_;
    a.scale = scale_;
    a.cache_precision = parse(this, cache_precision_);
    a.activation_type = inputs[0].get_element_type() == ov::element::bf16 ? ActivationType::bf16 : ActivationType::f32;
    a.query_stride = num_attention_heads_ * head_dim_;
    a.key_stride = a.value_stride = num_key_value_heads_ * head_dim_;
    for (size_t i : {1, 2}) {
        const ov::Shape wanted{batch, length, static_cast<size_t>(a.key_stride)};
        OPENVINO_ASSERT(inputs[i].get_shape() == wanted && inputs[i].get_element_type() == inputs[0].get_element_type(),
                        "ChatGLMAttention: input ", i, " must be ", wanted, " ", inputs[0].get_element_type(),
                        ", found ", inputs[i].get_shape(), " ", inputs[i].get_element_type());
    }
    a.query = inputs[0].data();
    a.key = inputs[1].data();
    a.value = inputs[2].data();

    a.rotary_dim = cos.back();
    const size_t tables = a.rotary_dim ? inputs[3].get_size() / (length * a.rotary_dim) : 1;
    OPENVINO_ASSERT(inputs[4].get_shape() == cos && (a.rotary_dim == 0 || cos[cos.size() - 2] == length) &&
                        (tables == 1 || tables == batch) && cos.front() == tables,
                    "ChatGLMAttention: cos and sin must be [", batch, " or 1, ", length, ", rotary dim], found ", cos,
                    " and ", inputs[4].get_shape());
    a.cos = inputs[3].data<float>();
    a.sin = inputs[4].data<float>();
    a.rotary_batch_stride = tables == 1 ? 0 : length * a.rotary_dim;

    OPENVINO_ASSERT(cache == inputs[6].get_shape(), "ChatGLMAttention: key cache ", cache, " and value cache ",
                    inputs[6].get_shape(), " must have one shape");
    a.cache_rows = cache[0];
    a.cache_blocks = cache[2];
    // The caches are the caller's own memory: bound with set_tensor, written in place.
    a.key_cache = const_cast<uint8_t*>(static_cast<const uint8_t*>(inputs[5].data()));
    a.value_cache = const_cast<uint8_t*>(static_cast<const uint8_t*>(inputs[6].data()));

    const ov::Shape table = inputs[8].get_shape(), mask = inputs[9].get_shape();
    OPENVINO_ASSERT(table.size() == 2 && table[0] == batch && static_cast<int64_t>(table[1]) >= a.past_length,
                    "ChatGLMAttention: beam_table must be [", batch, ", at least ", a.past_length, "], found ", table);
    OPENVINO_ASSERT(mask.size() == 2 && mask[0] == batch &&
                        static_cast<int64_t>(mask[1]) == a.past_length + a.query_length,
                    "ChatGLMAttention: attention_mask must be [", batch, ", ", a.past_length + a.query_length,
                    "] (past and new tokens), found ", mask);
    OPENVINO_ASSERT(inputs[10].get_size() == batch, "ChatGLMAttention: context_length must be [", batch, "], found ",
                    inputs[10].get_shape());
    a.beam_table = inputs[8].data<int32_t>();
    a.beam_table_stride = table[1];
    a.attention_mask = inputs[9].data<int32_t>();
    a.attention_mask_stride = mask[1];
    a.context_length = inputs[10].data<int32_t>();
    a.output = outputs[0].data();

    if (inputs.size() == 13) append_prefix(a, inputs[11], inputs[12]);
    fused_attention(a, ArenaExecutor());
    return true;
}

}  // namespace optimum_chatglm_ov
