// SPDX-License-Identifier: Apache-2.0
#include "rotary_op.hpp"

#include <oneapi/tbb/parallel_for.h>

#include <cmath>

namespace optimum_chatglm_ov {

ChatGLMRotary::ChatGLMRotary(const ov::OutputVector& inputs, const std::vector<float>& inv_freq)
    : Op(inputs), inv_freq_(inv_freq) {
    constructor_validate_and_infer_types();
}

void ChatGLMRotary::validate_and_infer_types() {
    const auto& positions = get_input_partial_shape(0);
    const auto type = get_input_element_type(0);
    const int64_t pairs = inv_freq_.size();
    NODE_VALIDATION_CHECK(this, type.compatible(ov::element::i32) && positions.compatible(ov::PartialShape::dynamic(3)),
                          "positions must be i32 [P, B, L], found ", type, " ", positions);
    NODE_VALIDATION_CHECK(this, pairs > 0, "inv_freq is empty");
    ov::PartialShape output{ov::Dimension(), ov::Dimension(), 2 * pairs};
    if (positions.rank().is_static()) {
        NODE_VALIDATION_CHECK(this, positions[0].is_static() && pairs % positions[0].get_length() == 0,
                              "the ", pairs, " frequencies must be shared evenly by the positions ", positions);
        output[0] = positions[1];
        output[1] = positions[2];
    }
    for (size_t i : {0, 1}) set_output_type(i, ov::element::f32, output);
}

std::shared_ptr<ov::Node> ChatGLMRotary::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    return std::make_shared<ChatGLMRotary>(inputs, inv_freq_);
}

bool ChatGLMRotary::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("inv_freq", inv_freq_);
    return true;
}

bool ChatGLMRotary::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const ov::Shape shape = inputs[0].get_shape();
    const size_t pairs = inv_freq_.size(), tokens = shape[1] * shape[2], each = pairs / shape[0];
    for (ov::Tensor& output : outputs) output.set_shape({shape[1], shape[2], 2 * pairs});
    const int32_t* positions = inputs[0].data<int32_t>();
    float *cos = outputs[0].data<float>(), *sin = outputs[1].data<float>();
    tbb::parallel_for(size_t(0), tokens, [&](size_t t) {
        for (size_t j = 0; j < pairs; j++) {
            const float angle = static_cast<float>(positions[j / each * tokens + t]) * inv_freq_[j];
            float *c = cos + t * 2 * pairs + j, *s = sin + t * 2 * pairs + j;
            c[0] = c[pairs] = std::cos(angle);
            s[0] = s[pairs] = std::sin(angle);
        }
    });
    return true;
}

}  // namespace optimum_chatglm_ov
