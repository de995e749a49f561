// SPDX-License-Identifier: Apache-2.0
// Linear layers with 8- or 4-bit weights on raw pointers. On byte products, activations are rounded to 8 bits, each
// group of a row with a scale of its own (dynamic quantisation); sums are exact within a group and f32 across. On
// tiles, activations are integers of 16 bits, or 8 if that was asked for, where weights are multiplied as integers
// (tile_driver.cpp says when); else they are rounded to bf16, weights of several groups a row, too; sums are f32.
// Nothing here knows OpenVINO.
#pragma once

#include "common/elements.hpp"
#include "common/views.hpp"

namespace optimum_chatglm_ov {

class Executor;  // parallel.hpp

constexpr int64_t kPanelColumns = 32;     // output features that are stored together
constexpr int64_t kActivationGroup = 32;  // activation groups are multiples of this many input features

// How the weights of a layer are stored: weight[n, k] = scale[n, k / group_size] * (integer[n, k] - zero_point[n, k /
// group_size]), integers of `bits` bits without sign.
struct LinearFormat {
    int64_t in_features;
    int64_t bits;                   // 8 or 4
    int64_t group_size;             // input features that share a scale and zero point; divides in_features
    int64_t activation_group_size;  // divides group_size
};

// Packed weights, panels of 32 output features:
//   bias f32 [32], multipliers f32 [32], scales f16 [groups, 32], zero points u8 [groups, 32], zeros up to a multiple
//   of 64 bytes; a scale is that of the format divided by its column's multiplier, a power of two, so that the largest
//   of a column is at least 1 and less than 2,
//   integers [in_features / 4, 32, 4]; of 4 bits [in_features / 8, 32, 4], the first 4 of 8 input features in the low
//   halves of the bytes.
// The same on every CPU. A model that is saved with packed weights says in which form they are; raise the number
// when the form changes.
constexpr int64_t kPacking = 1;

static constexpr int64_t panel_header_bytes(const LinearFormat& f) {
    return (kPanelColumns * (8 + f.in_features / f.group_size * 3) + 63) / 64 * 64;
}
static constexpr int64_t panel_bytes(const LinearFormat& f) {
    return panel_header_bytes(f) + kPanelColumns * f.in_features * f.bits / 8;
}

// Nothing if the kernels take the format and number of output features, else what is wrong.
const char* linear_format_error(const LinearFormat& format, int64_t out_features);

// A layer as OpenVINO stores it: integers [out_features, in_features] (of 4 bits the low half of a byte first), every
// byte to be combined with `flip` by exclusive or (0x80 or 0x88 make signed integers unsigned); scales f16 and
// zero_points u8 [out_features, groups]; bias f32 [out_features] or null.
struct StoredLinear {
    int64_t out_features;
    const uint8_t* integers;
    uint8_t flip;
    const f16* scales;
    const uint8_t* zero_points;
    const float* bias;
};

// Writes out_features / 32 panels.
void pack_linear(const LinearFormat& format, const StoredLinear& layer, uint8_t* packed);

struct LinearWeights {
    int64_t out_features;
    const uint8_t* panels;
};

// Layers of one input, all of one format.
struct LinearLayers {
    const LinearFormat& format;
    const LinearWeights* weights;
    int64_t count;
};

// outputs[i] [rows, out_features of weights[i]] = input [rows, in_features] * weights[i]^T + bias; f32. NaN or infinity
// makes its row NaN. instruction_set: null for the best of this CPU, or a name from linear_instruction_sets().
void linear(const LinearLayers& layers, const RowsView<const float>& input, float* const* outputs,
            const Executor& executor, const char* instruction_set = nullptr);

// silu: gate(x) * sigmoid(gate(x)) * up(x), two layers (SwiGLU, Shazeer 2020); gelu: the tanh form of up(x), one; none:
// no MLP, but the outputs of layers as they are.
enum class Activation { none, silu, gelu };

struct MLPLayers {
    LinearLayers first;  // gate and up, or up
    Activation activation;
    LinearLayers down;  // one
};

// output [rows, out_features of down] = down(activation(first(input))), up to 2,048 rows at a time, which bounds
// the memory of what lies between.
void mlp(const MLPLayers& layers, const RowsView<const float>& input, float* output, const Executor& executor,
         const char* instruction_set = nullptr);

// Comma-separated names of the kernels that this CPU can run, best first. The best is used, unless the environment
// variable CHATGLM_OV_ISA names another of them.
const char* linear_instruction_sets();

// Whether these kernels are the fastest way on this CPU: it multiplies bytes.
bool linear_is_fast();

}  // namespace optimum_chatglm_ov
