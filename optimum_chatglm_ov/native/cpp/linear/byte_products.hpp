// SPDX-License-Identifier: Apache-2.0
// Linear layers over the byte products of one instruction set.
//   Bytes   concepts.hpp
#pragma once

#include "linear/activation.hpp"
#include "linear/concepts.hpp"
#include "linear/linear_kernel.hpp"
#include "simd/vector.hpp"

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
        if (panel.digits == 2) return quantize_wide(f, source, panel, scratch);
        float* activated = static_cast<float*>(scratch);
        int8_t* integers = reinterpret_cast<int8_t*>(activated + f.in_features);
        const int64_t segment = segment_size(f), groups_of_segment = segment / f.activation_group_size;
        for (int64_t r = 0; r < panel.rows; r++) {
            const float* row = activated_row(f, source, r, activated);
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

    // Rows of 16 bits as two of 8, the high and the low bytes, which have one scale and sum.
    static void quantize_wide(const LinearFormat& f, const ActivationSource& source, const ActivationPanel& panel,
                              void* scratch) {
        float* activated = static_cast<float*>(scratch);
        const int64_t segment = segment_size(f), size = f.activation_group_size;
        for (int64_t r = 0; r < panel.rows; r += 2) {
            const float* row = activated_row(f, source, r / 2, activated);
            Vector largest = Vector::all(0.0f), none = largest;
            for (int64_t k = 0; k < f.in_features; k += kLanes) observe(Vector::load(row + k), largest, none);
            const float max = largest.max_lane(), steps = 32639.0f;  // 127 * 256 + 127
            const float inverse = max > kTiny ? steps / max : 0.0f;
            const float scale = (max > kTiny ? max / steps : 0.0f) + none.sum_lanes();
            for (int64_t k = 0; k < f.in_features; k += size) {
                panel.scales[k / size * panel.rows + r] = scale * 256.0f;
                panel.scales[k / size * panel.rows + r + 1] = scale;
            }
            int8_t *high = reinterpret_cast<int8_t*>(activated + f.in_features), *low = high + f.in_features;
            for (int64_t first = 0; first < f.in_features; first += segment) {
                Vector sum = Vector::all(0.0f);
                for (int64_t k = first; k < first + segment && k < f.in_features; k += kLanes) {
                    const Vector whole = Vector::round(Vector::multiply(Vector::load(row + k), Vector::all(inverse)));
                    // rounded up half way: the rest is a byte then, -128 .. 127
                    const Vector upper = Vector::round(
                        Vector::multiply_add(whole, Vector::all(1.0f / 256.0f), Vector::all(1.0f / 512.0f)));
                    upper.store_signed_bytes(high + k);
                    Vector::multiply_add(upper, Vector::all(-256.0f), whole).store_signed_bytes(low + k);
                    sum = Vector::add(sum, whole);
                }
                panel.sums[first / segment * (panel.rows / 2) + r / 2] = scale * sum.sum_lanes();
            }
            for (int64_t k = 0; k < f.in_features; k += 4) {
                std::memcpy(panel.integers + k * panel.rows + r * 4, high + k, 4);
                std::memcpy(panel.integers + k * panel.rows + r * 4 + 4, low + k, 4);
            }
        }
    }

    // Weights x activations ----------------------------------------------------------------------------------------

    static void multiply(const LinearTask& task) {
        if (task.activations.digits == 2)
            task.format->bits == 8 ? rows<kRows / 2 * 2, 8, 2>(task) : rows<kRows / 2 * 2, 4, 2>(task);
        else
            task.format->bits == 8 ? rows<kRows, 8, 1>(task) : rows<kRows, 4, 1>(task);
    }

private:
    static constexpr int64_t kAheadBytes = 4096;
    static constexpr float kTiny = 1e-30f;  // 127 / max must be finite

    static Vector activate(Activation activation, const float* input, const float* up) {
        const Vector x = Vector::load(input);
        return activation == Activation::gelu ? gelu(x) : Vector::multiply(silu(x), Vector::load(up));
    }

    // A row of the source, which may have to be put together in `activated`.
    static const float* activated_row(const LinearFormat& f, const ActivationSource& source, int64_t r,
                                      float* activated) {
        const float* row = source.input + r * source.stride;
        if (source.activation == Activation::none) return row;
        const float* up = source.up ? source.up + r * source.stride : nullptr;
        for (int64_t k = 0; k < f.in_features; k += kLanes)
            activate(source.activation, row + k, up ? up + k : nullptr).store(activated + k);
        return activated;
    }

    // The largest magnitude of each lane, and NaN where a number is NaN or infinite.
    static void observe(Vector v, Vector& largest, Vector& none) {
        largest = Vector::maximum(largest, Vector::maximum(v, Vector::multiply(v, Vector::all(-1.0f))));
        none = Vector::multiply_add(v, Vector::all(0.0f), none);
    }

    // Integers -127 .. 127 of a group, their sum, and the scale: NaN if one of the numbers is NaN or infinite.
    static float quantize_group(const float* x, int64_t size, int8_t* integers, float& total) {
        const Vector zero = Vector::all(0.0f);
        Vector largest = zero, none = zero;
        for (int64_t i = 0; i < size; i += kLanes) observe(Vector::load(x + i), largest, none);
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

    template <int kTaken, int kBits, int kDigits>
    static void rows(const LinearTask& task) {
        if (task.activations.rows == kTaken) {
            for (int64_t column = 0; column < kPanelColumns; column += kVectors * kLanes)
                tile<kTaken, kBits, kDigits>(task, column);
        } else if constexpr (kTaken > kDigits) {
            rows<kTaken - kDigits, kBits, kDigits>(task);
        }
    }

    template <int kTaken, int kBits, int kDigits>
    static void tile(const LinearTask& task, int64_t column) {
        constexpr int kResults = kTaken / kDigits;
        constexpr int64_t kGroupBytes = kActivationGroup * kPanelColumns * kBits / 8;
        const LinearFormat& f = *task.format;
        const int64_t groups = f.in_features / f.group_size, segment = segment_size(f);
        const int64_t first = task.first_segment * segment, group_size = f.activation_group_size;
        const float* bias = reinterpret_cast<const float*>(task.weights) + column;
        const float* multipliers = bias + kPanelColumns;
        const f16* scales = reinterpret_cast<const f16*>(task.weights + kPanelColumns * 8) + column;
        const uint8_t* zero_points = task.weights + kPanelColumns * (8 + groups * 2) + column;
        const uint8_t* integers =
            task.weights + panel_header_bytes(f) + first * kPanelColumns * kBits / 8 + column * 4;
        const int8_t* activations = task.activations.integers + first * kTaken;
        const float* factors = task.activations.scales + first / group_size * kTaken;
        int64_t left = f.in_features - first;
        for (int64_t s = task.first_segment; s < task.last_segment; s++) {
            const int64_t features = segment < left ? segment : left;
            left -= features;
            Vector sums[kResults][kVectors];
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
                        sums[r / kDigits][v] =
                            Vector::multiply_add(Bytes::to_float(products[r][v]), factor, sums[r / kDigits][v]);
                }
            }
            const int64_t g = segment == f.group_size ? s * kPanelColumns : 0;  // else one group for each row
            for (int v = 0; v < kVectors; v++) {
                const Vector scale = Vector::multiply(Bytes::from_half(scales + g + v * kLanes),
                                                      Vector::load(multipliers + v * kLanes));
                const Vector minus_zero =
                    Vector::multiply(Bytes::from_bytes(zero_points + g + v * kLanes), Vector::all(-1.0f));
                for (int r = 0; r < kResults; r++) {
                    float* output = task.output + r * task.stride + column + v * kLanes;
                    const Vector sum = Vector::multiply_add(
                        minus_zero, Vector::all(task.activations.sums[s * kResults + r]), sums[r][v]);
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
const LinearKernels* make_linear_kernels() {
    static_assert(IsBytes<Bytes>::value, "Bytes lacks what linear/concepts.hpp lists");
    using Products = ByteProducts<Bytes>;
    static const ByteKernels bytes = {Products::kRows, Bytes::kWideRows, Products::quantize, Products::multiply};
    static const LinearKernels kernels = {&bytes, nullptr};
    return &kernels;
}

}  // namespace
}  // namespace optimum_chatglm_ov
