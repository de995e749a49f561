// SPDX-License-Identifier: Apache-2.0
// What OpenVINO and Python find in the library.
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <thread>
#include <vector>

#include "attention/attention.hpp"
#include "bench/peaks.hpp"
#include "common/parallel.hpp"
#include "linear/linear.hpp"
#include "openvino/attention_op.hpp"
#include "openvino/linear_op.hpp"
#include "openvino/rotary_op.hpp"

// The inner parentheses make the list one argument of the macro.
OPENVINO_CREATE_EXTENSIONS((std::vector<ov::Extension::Ptr>{
    std::make_shared<ov::OpExtension<optimum_chatglm_ov::ChatGLMAttention>>(),
    std::make_shared<ov::OpExtension<optimum_chatglm_ov::ChatGLMLinear>>(),
    std::make_shared<ov::OpExtension<optimum_chatglm_ov::ChatGLMMLP>>(),
    std::make_shared<ov::OpExtension<optimum_chatglm_ov::ChatGLMRotary>>()}));

// For ctypes. Instruction sets are comma-separated names of those this CPU can run, best first.
#define CHATGLM_EXPORT extern "C" __attribute__((visibility("default")))

CHATGLM_EXPORT const char* chatglm_attention_instruction_sets() {
    return optimum_chatglm_ov::instruction_sets();
}

CHATGLM_EXPORT const char* chatglm_linear_instruction_sets() {
    return optimum_chatglm_ov::linear_instruction_sets();
}

CHATGLM_EXPORT int chatglm_linear_is_fast() {
    return optimum_chatglm_ov::linear_is_fast();
}

// Sizes that callers need, for them not to be stated twice.
CHATGLM_EXPORT int64_t chatglm_block_tokens() {
    return optimum_chatglm_ov::kBlockTokens;
}

CHATGLM_EXPORT int64_t chatglm_max_head_dim() {
    return optimum_chatglm_ov::kMaxHeadDim;
}

CHATGLM_EXPORT int64_t chatglm_panel_columns() {
    return optimum_chatglm_ov::kPanelColumns;
}

// Bytes of a cache block of one head, 0 for a precision that is none.
CHATGLM_EXPORT int64_t chatglm_cache_block_bytes(const char* cache_precision, int64_t head_dim) {
    using namespace optimum_chatglm_ov;
    CachePrecision precision;
    return parse_cache_precision(cache_precision, precision) ? cache_block_bytes(precision, head_dim) : 0;
}

// Copies the keys, or the values, of `count` tokens of one head, from token `source_token` of a row of blocks on, to
// token `target_token` of another.
CHATGLM_EXPORT void chatglm_copy_tokens(const char* cache_precision, int64_t head_dim, int is_keys,
                                        const uint8_t* source, int64_t source_token, uint8_t* target,
                                        int64_t target_token, int64_t count) {
    using namespace optimum_chatglm_ov;
    CachePrecision precision;
    if (parse_cache_precision(cache_precision, precision))
        copy_tokens(precision, head_dim, is_keys, {source, source_token}, {target, target_token}, count);
}

// Bytes of a panel of 32 output features, or 0 for a format that the operations do not take.
CHATGLM_EXPORT int64_t chatglm_linear_panel_bytes(int64_t in_features, int64_t out_features, int64_t bits,
                                                  int64_t group_size, int64_t activation_group_size) {
    const optimum_chatglm_ov::LinearFormat format{in_features, bits, group_size, activation_group_size};
    return optimum_chatglm_ov::linear_format_error(format, out_features) ? 0 : panel_bytes(format);
}

// See pack_linear. `packed` has not been touched yet: it is in huge pages then, where the system allows.
CHATGLM_EXPORT void chatglm_linear_pack(int64_t in_features, int64_t out_features, int64_t bits, int64_t group_size,
                                        const uint8_t* integers, uint8_t flip, const optimum_chatglm_ov::f16* scales,
                                        const uint8_t* zero_points, const float* bias, uint8_t* packed) {
    const optimum_chatglm_ov::LinearFormat format{in_features, bits, group_size, optimum_chatglm_ov::kActivationGroup};
    optimum_chatglm_ov::use_huge_pages(packed, out_features / optimum_chatglm_ov::kPanelColumns * panel_bytes(format));
    optimum_chatglm_ov::pack_linear(format, {out_features, integers, flip, scales, zero_points, bias}, packed);
}

namespace {

// New threads for each run: outside an inference OpenVINO's are not to be had.
class NewThreads final : public optimum_chatglm_ov::Executor {
public:
    explicit NewThreads(int64_t count) : count_(count) {}
    int64_t concurrency() const override { return count_; }
    void run(int64_t workers, void (*body)(void*), void* context) const override {
        std::vector<std::thread> threads;
        for (int64_t i = 1; i < workers; i++) threads.emplace_back(body, context);
        body(context);
        for (std::thread& thread : threads) thread.join();
    }

private:
    int64_t count_;
};

}  // namespace

// See peak_operations; on `threads` threads.
CHATGLM_EXPORT double chatglm_peak_operations(const char* kind, int64_t threads) {
    return optimum_chatglm_ov::peak_operations(kind, NewThreads(threads));
}
