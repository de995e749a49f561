// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <openvino/op/op.hpp>
#include <string>

#include "linear/linear.hpp"

namespace optimum_chatglm_ov {

// Linear layers of one input, with 8- or 4-bit weights and activations rounded to 8 bits in groups.
//
// Inputs:
//    0     hidden_states  f32 [..., in_features]
//    1 ..  weights        u8 [out_features / 32, panel bytes], one for each layer, all of one format; with the biases.
//                         linear/linear.hpp has their layout
// Outputs: for each layer f32 [..., out_features].
class ChatGLMLinear : public ov::op::Op {
public:
    OPENVINO_OP("ChatGLMLinear", "optimum_chatglm_ov");

    ChatGLMLinear() = default;
    ChatGLMLinear(const ov::OutputVector& inputs, const LinearFormat& format);

    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    bool has_evaluate() const override { return true; }
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

private:
    int64_t packing_ = kPacking;
    LinearFormat format_{};
};

// The MLP of a layer: down(silu(gate) * up) or down(gelu(up)), without the memory for what lies between.
//
// Inputs:
//    0  hidden_states  f32 [..., in_features]
//    .. weights as of ChatGLMLinear: gate (silu alone), up, and down, which may have another format
// Output: f32 [..., out_features of down].
class ChatGLMMLP : public ov::op::Op {
public:
    OPENVINO_OP("ChatGLMMLP", "optimum_chatglm_ov");

    ChatGLMMLP() = default;
    ChatGLMMLP(const ov::OutputVector& inputs, const LinearFormat& format, const LinearFormat& down_format,
               const std::string& activation);

    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    bool has_evaluate() const override { return true; }
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

private:
    int64_t packing_ = kPacking;
    LinearFormat format_{}, down_format_{};
    std::string activation_;
};

}  // namespace optimum_chatglm_ov
