// SPDX-License-Identifier: Apache-2.0
// What OpenVINO and Python find in the library.
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>

#include "attention.hpp"
#include "attention_op.hpp"
#include "rotary_op.hpp"

// The inner parentheses make the list one argument of the macro.
OPENVINO_CREATE_EXTENSIONS((std::vector<ov::Extension::Ptr>{
    std::make_shared<ov::OpExtension<optimum_chatglm_ov::ChatGLMAttention>>(),
    std::make_shared<ov::OpExtension<optimum_chatglm_ov::ChatGLMRotary>>()}));

// For ctypes: comma-separated names of the instruction sets this CPU can run, best first.
extern "C" __attribute__((visibility("default"))) const char* chatglm_attention_instruction_sets() {
    return optimum_chatglm_ov::instruction_sets();
}
