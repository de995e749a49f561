// SPDX-License-Identifier: Apache-2.0
// Linear layers over the byte products of one instruction set.
//   Bytes   Operand (kLanes x 4 bytes, or kLanes i32 sums), load, all, dot, low_halves, high_halves, to_float
//   Vector  the f32 vectors of as many lanes
#pragma once

#include "linear_kernel.hpp"
#include "vector.hpp"

namespace optimum_chatglm_ov {
namespace {

template <class Bytes>
struct ByteProducts {
    using Operand = typename Bytes::Operand;
    using Vector = typename Bytes::Vector;
    static constexpr int kLanes = Vector::kLanes;
    static constexpr int kRows = Bytes::kLinearRows;        // held in registers,
    static constexpr int kVectors = Bytes::kLinearVectors;  // against as many vectors of columns

    // Activations --------------------------------------------------------------------------------------------------

    static void quantize(const LinearFormat& f, const ActivationSource& source, const ActivationPanel& panel,
                         void* scratch) {
        float* activated = static_cast<float*>(scratch);
        int8_t* integers = reinterpret_cast<int8_t*>(activated + f.in_features);
        const int64_t segment = segment_size(f), groups_of_segment = segment / f.activation_group_size;
        for (int64_t r = 0; r < panel.rows; r++) {
            const float* row = source.input + r * source.stride;
            if (source.kind != Source::plain) {
                const float* up = source.up ? source.up + r * source.stride : nullptr;
                for (int64_t k = 0; k < f.in_features; k += kLanes)
                    activate(source.kind, row + k, up ? up + k : nullptr).store(activated + k);
                row = activated;
            }
            float sum = 0;
            for (int64_t g = 0; g < f.in_features / f.activation_group_size; g++) {
                const int64_t k = g * f.activation_group_size;
                float total;
                const float scale = quantize_group(row + k, f.activation_group_size, integers + k, total);
                panel.scales[g * panel.rows + r] = scale;
                sum = (g % groups_of_segment ? sum : 0.0f) + scale * total;
                panel.sums[g / groups_of_segment * panel.rows + r] = sum;
            }
            for (int64_t k = 0; k < f.in_features; k += 4)
                std::memcpy(panel.integers + k * panel.rows + r * 4, integers + k, 4);
        }
    }

    // Weights x activations ----------------------------------------------------------------------------------------

    static void multiply(const LinearTask& task) {
        if (task.format->bits == 8)
            rows<kRows, 8>(task);
        else
            rows<kRows, 4>(task);
    }

private:
    static constexpr int64_t kAheadBytes = 4096;
    static constexpr float kTiny = 1e-30f;  // 127 / max must be finite

    // x * sigmoid(x), times another layer's output; or gelu in its tanh form, which is x * sigmoid of a cubic.
    static Vector activate(Source kind, const float* input, const float* up) {
        const Vector x = Vector::load(input);
        Vector t = x;
        if (kind == Source::gelu) {
            const Vector squared = Vector::multiply(x, x);
            t = Vector::multiply(x, Vector::multiply_add(squared, Vector::all(0.0713548162726f),
                                                         Vector::all(1.59576912161f)));  // 2 sqrt(2 / pi)
        }
        // exp2 takes what is not positive: with e = exp(-|t|), sigmoid is 1 / (1 + e) or e / (1 + e).
        float values[kLanes], exponents[kLanes], e[kLanes];
        t.store(values);
        for (int i = 0; i < kLanes; i++) exponents[i] = -__builtin_fabsf(values[i]) * 1.44269504089f;
        Vector::template exp2<Exp2<true>>(Vector::load(exponents)).store(e);
        for (int i = 0; i < kLanes; i++) e[i] = (values[i] < 0 ? e[i] : 1.0f) / (1.0f + e[i]);
        const Vector y = Vector::multiply(x, Vector::load(e));
        return kind == Source::silu ? Vector::multiply(y, Vector::load(up)) : y;
    }

    // Integers -127 .. 127 of a group, their sum, and the scale: NaN if one of the numbers is none.
    static float quantize_group(const float* x, int64_t size, int8_t* integers, float& total) {
        const Vector zero = Vector::all(0.0f), minus_one = Vector::all(-1.0f);
        Vector largest = zero, none = zero;
        for (int64_t i = 0; i < size; i += kLanes) {
            const Vector v = Vector::load(x + i);
            largest = Vector::maximum(largest, Vector::maximum(v, Vector::multiply(v, minus_one)));
            none = Vector::multiply_add(v, zero, none);
        }
        const float max = largest.max_lane();
        const Vector inverse = Vector::all(max > kTiny ? 127.0f / max : 0.0f);
        Vector sum = zero;
        for (int64_t i = 0; i < size; i += kLanes) {
            const Vector whole = Vector::round(Vector::multiply(Vector::load(x + i), inverse));
            whole.store_signed_bytes(integers + i);
            sum = Vector::add(sum, whole);
        }
        total = sum.sum_lanes();
        return (max > kTiny ? max / 127.0f : 0.0f) + none.sum_lanes();
    }

    template <int kTaken, int kBits>
    static void rows(const LinearTask& task) {
        if (task.activations.rows == kTaken) {
            for (int64_t column = 0; column < kPanelColumns; column += kVectors * kLanes)
                tile<kTaken, kBits>(task, column);
        } else if constexpr (kTaken > 1) {
            rows<kTaken - 1, kBits>(task);
        }
    }

    template <int kTaken, int kBits>
    static void tile(const LinearTask& task, int64_t column) {
        constexpr int64_t kGroupBytes = kActivationGroup * kPanelColumns * kBits / 8;
        const LinearFormat& f = *task.format;
        const int64_t groups = f.in_features / f.group_size, segment = segment_size(f);
        const int64_t first = task.first_segment * segment, group_size = f.activation_group_size;
        const float* bias = reinterpret_cast<const float*>(task.weights) + column;
        const uint16_t* scales = reinterpret_cast<const uint16_t*>(task.weights + kPanelColumns * 4) + column;
        const uint8_t* zero_points = task.weights + kPanelColumns * (4 + groups * 2) + column;
        const uint8_t* integers =
            task.weights + panel_header_bytes(f) + first * kPanelColumns * kBits / 8 + column * 4;
        const int8_t* activations = task.activations.integers + first * kTaken;
        const float* factors = task.activations.scales + first / group_size * kTaken;
        int64_t left = f.in_features - first;
        for (int64_t s = task.first_segment; s < task.last_segment; s++) {
            const int64_t features = segment < left ? segment : left;
            left -= features;
            Vector sums[kTaken][kVectors];
            for (auto& row : sums)
                for (Vector& sum : row) sum = Vector::all(0.0f);
            for (int64_t k = 0; k < features; k += group_size) {
                Operand products[kTaken][kVectors];
                for (auto& row : products)
                    for (Operand& product : row) product = Bytes::all(0);
                for (int64_t i = 0; i < group_size; i += kActivationGroup) {
                    if (task.reads_ahead)
                        for (int64_t byte = 0; byte < kGroupBytes; byte += 64)
                            __builtin_prefetch(integers + kAheadBytes + byte);
                    multiply_group<kTaken, kBits>(integers, activations, products);
                    integers += kGroupBytes;
                    activations += kActivationGroup * kTaken;
                }
                for (int r = 0; r < kTaken; r++) {
                    const Vector factor = Vector::all(*factors++);
                    for (int v = 0; v < kVectors; v++)
                        sums[r][v] = Vector::multiply_add(Bytes::to_float(products[r][v]), factor, sums[r][v]);
                }
            }
            const int64_t g = segment == f.group_size ? s * kPanelColumns : 0;  // else one group for each row
            for (int v = 0; v < kVectors; v++) {
                const Vector scale = Bytes::from_half(scales + g + v * kLanes);
                const Vector minus_zero =
                    Vector::multiply(Bytes::from_bytes(zero_points + g + v * kLanes), Vector::all(-1.0f));
                for (int r = 0; r < kTaken; r++) {
                    float* output = task.output + r * task.stride + column + v * kLanes;
                    const Vector sum = Vector::multiply_add(
                        minus_zero, Vector::all(task.activations.sums[s * kTaken + r]), sums[r][v]);
                    const Vector before = Vector::load(s ? output : bias + v * kLanes);
                    Vector::multiply_add(scale, sum, before).store(output);
                }
            }
        }
    }

    // 32 input features.
    template <int kTaken, int kBits>
    static inline __attribute__((always_inline)) void multiply_group(const uint8_t* weights, const int8_t* activations,
                                                                     Operand (&products)[kTaken][kVectors]) {
        constexpr int kQuads = 8 / kBits;  // of a vector of weights
#pragma GCC unroll 8
        for (int k = 0; k < kActivationGroup; k += 4 * kQuads) {
            Operand weight[kQuads][kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; v++) {
                const Operand stored = Bytes::load(weights + k / kQuads * kPanelColumns + v * kLanes * 4);
                if constexpr (kBits == 8) {
                    weight[0][v] = stored;
                } else {
                    weight[0][v] = Bytes::low_halves(stored);
                    weight[1][v] = Bytes::high_halves(stored);
                }
            }
#pragma GCC unroll 2
            for (int q = 0; q < kQuads; q++)
#pragma GCC unroll 8
                for (int r = 0; r < kTaken; r++) {
                    int32_t four;
                    std::memcpy(&four, activations + (k + 4 * q) * kTaken + r * 4, 4);
                    const Operand activation = Bytes::all(four);
#pragma GCC unroll 4
                    for (int v = 0; v < kVectors; v++)
                        products[r][v] = Bytes::dot(weight[q][v], activation, products[r][v]);
                }
        }
    }
};

template <class Bytes>
const LinearKernels* make_linear_kernels(const char* name) {
    using Products = ByteProducts<Bytes>;
    static const LinearKernels kernels = {name, Products::kRows, Products::quantize, Products::multiply};
    return &kernels;
}

}  // namespace
}  // namespace optimum_chatglm_ov
