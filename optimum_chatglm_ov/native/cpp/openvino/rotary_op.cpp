// SPDX-License-Identifier: Apache-2.0
#include "openvino/rotary_op.hpp"

#include <oneapi/tbb/parallel_for.h>

#include <cmath>

namespace optimum_chatglm_ov {

ChatGLMRotary::ChatGLMRotary(const ov::OutputVector& inputs) : Op(inputs) {
    constructor_validate_and_infer_types();
}

void ChatGLMRotary::validate_and_infer_types() {
    const auto &positions = get_input_partial_shape(0), &inv_freq = get_input_partial_shape(1);
    NODE_VALIDATION_CHECK(
        this,
        get_input_element_type(0).compatible(ov::element::i32) && positions.compatible(ov::PartialShape::dynamic(3)),
        "positions must be i32 [P, B, L], found ", get_input_element_type(0), " ", positions);
    NODE_VALIDATION_CHECK(this,
                          get_input_element_type(1).compatible(ov::element::f32) && inv_freq.is_static() &&
                              inv_freq.size() == 1 && inv_freq[0].get_length() > 0,
                          "inv_freq must be f32 [pairs], found ", get_input_element_type(1), " ", inv_freq);
    const int64_t pairs = inv_freq[0].get_length();
    ov::PartialShape output{ov::Dimension(), ov::Dimension(), 2 * pairs};
    if (positions.rank().is_static()) {
        NODE_VALIDATION_CHECK(
            this, positions[0].is_static() && positions[0].get_length() > 0 && pairs % positions[0].get_length() == 0,
            "the ", pairs, " frequencies must be shared evenly by the positions ", positions);
        output[0] = positions[1];
        output[1] = positions[2];
    }
    for (size_t i : {0, 1}) set_output_type(i, ov::element::f32, output);
}

std::shared_ptr<ov::Node> ChatGLMRotary::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    return std::make_shared<ChatGLMRotary>(inputs);
}

bool ChatGLMRotary::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const ov::Shape shape = inputs[0].get_shape();
    const size_t pairs = inputs[1].get_size(), tokens = shape[1] * shape[2], each = pairs / shape[0];
    for (ov::Tensor& output : outputs) output.set_shape({shape[1], shape[2], 2 * pairs});
    const int32_t* positions = inputs[0].data<int32_t>();
    const float* inv_freq = inputs[1].data<float>();
    float *cos = outputs[0].data<float>(), *sin = outputs[1].data<float>();
    tbb::parallel_for(size_t(0), tokens, [&](size_t t) {
        for (size_t j = 0; j < pairs; j++) {
            const float angle = static_cast<float>(positions[j / each * tokens + t]) * inv_freq[j];
            float *c = cos + t * 2 * pairs + j, *s = sin + t * 2 * pairs + j;
            c[0] = c[pairs] = std::cos(angle);
            s[0] = s[pairs] = std::sin(angle);
        }
    });
    return true;
}

}  // namespace optimum_chatglm_ov
