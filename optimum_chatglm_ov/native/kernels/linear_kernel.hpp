// SPDX-License-Identifier: Apache-2.0
// What the driver (linear.cpp) asks of the kernels of one instruction set.
#pragma once

#include "linear.hpp"

namespace optimum_chatglm_ov {

// Products are summed in segments of a row: weights that share a scale, but no more than the first-level caches like.
constexpr int64_t kMaxSegment = 4096;

static constexpr int64_t segment_size(const LinearFormat& f) {
    return f.group_size < kMaxSegment ? f.group_size : kMaxSegment;
}
static constexpr int64_t segment_count(const LinearFormat& f) {
    return (f.in_features + segment_size(f) - 1) / segment_size(f);
}

// A few rows of quantised activations: x = scale * integer.
//   integers [in_features / 4][rows][4], scales [in_features / activation_group_size][rows],
//   sums [segments][rows]: of x over a segment
struct ActivationPanel {
    int64_t rows;
    int8_t* integers;
    float* scales;
    float* sums;
};

// How the activations come: input, or the activation function of one or two layers' outputs. Row strides in elements.
enum class Source { plain, silu, gelu };
struct ActivationSource {
    Source kind;
    const float* input;  // or the gate
    const float* up;     // silu: what the gate is multiplied with
    int64_t stride;
};

// Output columns of one panel of weights for one panel of activations, segments [first_segment, last_segment). The
// first segment starts from the bias, others add to what output holds.
struct LinearTask {
    const LinearFormat* format;
    ActivationPanel activations;
    const uint8_t* weights;
    int64_t first_segment, last_segment;
    float* output;
    int64_t stride;
    bool reads_ahead;  // the weights come from memory, not from a cache
};

struct LinearKernels {
    const char* name;
    int64_t rows;  // of a full activation panel
    // scratch: 8 bytes for each input feature
    void (*quantize)(const LinearFormat&, const ActivationSource&, const ActivationPanel&, void* scratch);
    void (*multiply)(const LinearTask&);
};

// Null where the build's target has no such instructions; whether the CPU has them is the caller's check.
const LinearKernels* portable_linear_kernels();
const LinearKernels* avx2_vnni_linear_kernels();
const LinearKernels* avx512_vnni_linear_kernels();

}  // namespace optimum_chatglm_ov
