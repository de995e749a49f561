// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <openvino/op/op.hpp>

namespace optimum_chatglm_ov {

// Cosines and sines of rotary embedding (Su et al. 2021), computed once for all layers. As ordinary operations
// OpenVINO would compute the angles in bf16, which has no odd numbers beyond 256.
//
// Inputs:
//    0 positions  i32 [P, B, L]; ChatGLM has P = 2 positions for each token, later generations one
//    1 inv_freq   f32 [P * N], the frequencies of all pairs of channels; the first N turn with the first position. An
//                 input, because attributes are written to an IR with six digits
// Outputs: cos and sin, f32 [B, L, 2 * P * N], the angle of pair j in channels j and j + P * N.
class ChatGLMRotary : public ov::op::Op {
public:
    OPENVINO_OP("ChatGLMRotary", "optimum_chatglm_ov");

    ChatGLMRotary() = default;
    explicit ChatGLMRotary(const ov::OutputVector& inputs);

    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool visit_attributes(ov::AttributeVisitor&) override { return true; }
    bool has_evaluate() const override { return true; }
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;
};

}  // namespace optimum_chatglm_ov
