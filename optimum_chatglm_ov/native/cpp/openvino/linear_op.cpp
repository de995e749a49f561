// SPDX-License-Identifier: Apache-2.0
#include "openvino/linear_op.hpp"

#include <vector>

#include "openvino/executor.hpp"

namespace optimum_chatglm_ov {
namespace {

void visit_format(ov::AttributeVisitor& visitor, const std::string& prefix, LinearFormat& format) {
    visitor.on_attribute(prefix + "in_features", format.in_features);
    visitor.on_attribute(prefix + "bits", format.bits);
    visitor.on_attribute(prefix + "group_size", format.group_size);
    visitor.on_attribute(prefix + "activation_group_size", format.activation_group_size);
}

// Checks the weights of one layer and returns its output features.
int64_t check_weights(const ov::Node* node, size_t input, const LinearFormat& format) {
    const auto& shape = node->get_input_partial_shape(input);
    NODE_VALIDATION_CHECK(
        node,
        node->get_input_element_type(input).compatible(ov::element::u8) && shape.is_static() && shape.size() == 2,
        "input ", input, " must be u8 [out_features / 32, panel bytes], found ", node->get_input_element_type(input),
        " ", shape);
    const int64_t out_features = shape[0].get_length() * kPanelColumns;
    const char* error = linear_format_error(format, out_features);
    NODE_VALIDATION_CHECK(node, error == nullptr, error);
    NODE_VALIDATION_CHECK(node, shape[1] == panel_bytes(format), "input ", input, " must have panels of ",
                          panel_bytes(format), " bytes, found ", shape[1]);
    return out_features;
}

// An IR keeps packed weights, and may be read by another version of this library.
void check_packing(const ov::Node* node, int64_t packing) {
    NODE_VALIDATION_CHECK(node, packing == kPacking, "the weights of this model are packed in form ", packing,
                          ", and this library of optimum-chatglm-ov reads form ", kPacking,
                          ": export the model again with the version of the package that the library is from");
}

// The shape of an output with this many features, after a check of the hidden states.
ov::PartialShape output_shape(const ov::Node* node, const LinearFormat& format, int64_t out_features) {
    ov::PartialShape shape = node->get_input_partial_shape(0);
    NODE_VALIDATION_CHECK(node, node->get_input_element_type(0).compatible(ov::element::f32),
                          "hidden_states must be f32, found ", node->get_input_element_type(0));
    if (shape.rank().is_dynamic()) return shape;
    NODE_VALIDATION_CHECK(node, shape.size() > 0 && shape[shape.size() - 1].compatible(format.in_features),
                          "hidden_states must have ", format.in_features, " features, found ", shape);
    shape[shape.size() - 1] = out_features;
    return shape;
}

LinearWeights weights_of(const ov::Tensor& tensor) {
    return {static_cast<int64_t>(tensor.get_shape()[0]) * kPanelColumns, static_cast<const uint8_t*>(tensor.data())};
}

RowsView<const float> rows_of(const ov::Tensor& hidden_states, const LinearFormat& format) {
    const auto count = static_cast<int64_t>(hidden_states.get_size()) / format.in_features;
    return {hidden_states.data<float>(), format.in_features, count};
}

ov::Shape with_features(ov::Shape shape, int64_t features) {
    shape.back() = features;
    return shape;
}

}  // namespace

ChatGLMLinear::ChatGLMLinear(const ov::OutputVector& inputs, const LinearFormat& format)
    : Op(inputs), format_(format) {
    constructor_validate_and_infer_types();
}

void ChatGLMLinear::validate_and_infer_types() {
    check_packing(this, packing_);
    NODE_VALIDATION_CHECK(this, get_input_size() > 1, "needs hidden_states and the weights of at least one layer");
    set_output_size(get_input_size() - 1);
    for (size_t i = 1; i < get_input_size(); i++)
        set_output_type(i - 1, ov::element::f32, output_shape(this, format_, check_weights(this, i, format_)));
}

std::shared_ptr<ov::Node> ChatGLMLinear::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    return std::make_shared<ChatGLMLinear>(inputs, format_);
}

bool ChatGLMLinear::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("packing", packing_);
    visit_format(visitor, "", format_);
    return true;
}

bool ChatGLMLinear::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    std::vector<LinearWeights> weights;
    std::vector<float*> pointers;
    for (size_t i = 1; i < inputs.size(); i++) {
        weights.push_back(weights_of(inputs[i]));
        outputs[i - 1].set_shape(with_features(inputs[0].get_shape(), weights.back().out_features));
        pointers.push_back(outputs[i - 1].data<float>());
    }
    linear({format_, weights.data(), static_cast<int64_t>(weights.size())}, rows_of(inputs[0], format_),
           pointers.data(), ArenaExecutor());
    return true;
}

ChatGLMMLP::ChatGLMMLP(const ov::OutputVector& inputs, const LinearFormat& format, const LinearFormat& down_format,
                       const std::string& activation)
    : Op(inputs), format_(format), down_format_(down_format), activation_(activation) {
    constructor_validate_and_infer_types();
}

void ChatGLMMLP::validate_and_infer_types() {
    check_packing(this, packing_);
    NODE_VALIDATION_CHECK(this, activation_ == "silu" || activation_ == "gelu",
                          "activation must be silu or gelu, found ", activation_);
    const size_t layers = activation_ == "silu" ? 2 : 1;
    NODE_VALIDATION_CHECK(this, get_input_size() == layers + 2, "needs hidden_states and the weights of ", layers + 1,
                          " layers, found ", get_input_size(), " inputs");
    for (size_t i = 1; i <= layers; i++) {
        const int64_t features = check_weights(this, i, format_);
        NODE_VALIDATION_CHECK(this, features == down_format_.in_features, "input ", i, " must have ",
                              down_format_.in_features, " output features, found ", features);
    }
    const int64_t out_features = check_weights(this, layers + 1, down_format_);
    set_output_type(0, ov::element::f32, output_shape(this, format_, out_features));
}

std::shared_ptr<ov::Node> ChatGLMMLP::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    return std::make_shared<ChatGLMMLP>(inputs, format_, down_format_, activation_);
}

bool ChatGLMMLP::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("packing", packing_);
    visit_format(visitor, "", format_);
    visit_format(visitor, "down_", down_format_);
    visitor.on_attribute("activation", activation_);
    return true;
}

bool ChatGLMMLP::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    std::vector<LinearWeights> weights;
    for (size_t i = 1; i < inputs.size(); i++) weights.push_back(weights_of(inputs[i]));
    outputs[0].set_shape(with_features(inputs[0].get_shape(), weights.back().out_features));
    const MLPLayers layers{{format_, weights.data(), static_cast<int64_t>(weights.size()) - 1},
                           activation_ == "silu" ? Activation::silu : Activation::gelu,
                           {down_format_, &weights.back(), 1}};
    mlp(layers, rows_of(inputs[0], format_), outputs[0].data<float>(), ArenaExecutor());
    return true;
}

}  // namespace optimum_chatglm_ov
