// SPDX-License-Identifier: Apache-2.0
// Linear layers: packs weights and picks the instruction set.
#include "linear/linear.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "isa/instruction_sets.hpp"
#include "isa/kernels.hpp"
#include "linear/linear_kernel.hpp"

namespace optimum_chatglm_ov {
namespace {

const LinearKernels& best_kernels() {
    for (const InstructionSet& set : instruction_sets_of_cpu())
        if (set.linear) return *set.linear;
    return *portable_linear_kernels();
}

// The best, or the one that was asked for. A name that only attention knows asks for nothing here.
const LinearKernels& choose_kernels(const char* name) {
    const InstructionSet* asked = asked_instruction_set(name);
    return asked && asked->linear ? *asked->linear : best_kernels();
}

// Converting weights for tiles takes longer than reading them from memory; byte products of a row or two do not.
bool takes_tiles(const LinearKernels& kernels, const LinearFormat& format, int64_t rows) {
    return kernels.tiles && (rows > kernels.bytes->wide_rows || tiles_take_stored(format));
}

// The four halves of two bytes, from the lowest, in the low halves of four bytes.
uint32_t one_to_a_byte(uint32_t halves) {
    return (halves & 0xf) | (halves & 0xf0) << 4 | (halves & 0xf00) << 8 | (halves & 0xf000) << 12;
}

// f16: 1 bit of sign, 5 of exponent, 10 of fraction.
constexpr int kHalfBias = 15, kHalfInfinity = 31;

double half_magnitude(f16 half) {
    const int exponent = half.bits >> 10 & 31, fraction = half.bits & 1023;
    return exponent ? std::ldexp(1024 + fraction, exponent - kHalfBias - 10) : std::ldexp(fraction, -kHalfBias - 9);
}

// e with 2^e <= the largest magnitude < 2^(e + 1), or 0 if there is none or it is not finite.
int largest_exponent(const f16* halves, int64_t count) {
    f16 largest{0};  // the bits are ordered like the magnitudes
    for (int64_t i = 0; i < count; i++) largest.bits = std::max<uint16_t>(largest.bits, halves[i].bits & 0x7fff);
    return largest.bits == 0 || largest.bits >> 10 == kHalfInfinity ? 0 : std::ilogb(half_magnitude(largest));
}

// Exact, unless the result is below 2^-14, where f16 has fewer bits.
f16 half_times_power(f16 half, int power) {
    if (power == 0 || (half.bits & 0x7fff) == 0 || (half.bits >> 10 & 31) == kHalfInfinity) return half;
    const double magnitude = std::ldexp(half_magnitude(half), power);
    const int exponent = std::max(std::ilogb(magnitude), 1 - kHalfBias);
    // a fraction that rounds up to 1024, or up from a denormal, carries into the exponent as it should
    const auto fraction = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    return {static_cast<uint16_t>((half.bits & 0x8000) | (((exponent + kHalfBias - 1) << 10) + fraction))};
}

}  // namespace

const char* linear_format_error(const LinearFormat& f, int64_t out_features) {
    if (f.bits != 8 && f.bits != 4) return "weights must have 8 or 4 bits";
    if (f.in_features <= 0 || f.activation_group_size <= 0 || f.group_size <= 0) return "sizes must be positive";
    if (f.activation_group_size % kActivationGroup) return "activation groups must be multiples of 32";
    const bool is_whole = f.activation_group_size == f.in_features && f.group_size == f.in_features;
    if (f.in_features % f.group_size || f.in_features % f.activation_group_size ||
        (!is_whole && segment_size(f) % f.activation_group_size))
        return "groups must divide the input features, and activation groups those of the weights";
    if (f.group_size > kMaxSegment && f.group_size != f.in_features)
        return "groups must have at most 4096 input features, or all";
    if (out_features <= 0 || out_features % kPanelColumns) return "output features must be a multiple of 32";
    return nullptr;
}

void pack_linear(const LinearFormat& f, const StoredLinear& layer, uint8_t* packed) {
    constexpr int64_t kLine = 64;  // bytes of a row that are taken at a time, while its cache line is there
    const int64_t groups = f.in_features / f.group_size, row_bytes = f.in_features * f.bits / 8;
    const uint32_t flips = layer.flip * 0x01010101u;
    for (int64_t first = 0; first < layer.out_features; first += kPanelColumns) {
        uint8_t* panel = packed + first / kPanelColumns * panel_bytes(f);
        std::memset(panel, 0, panel_header_bytes(f));
        if (layer.bias) std::memcpy(panel, layer.bias + first, kPanelColumns * 4);
        auto* multipliers = reinterpret_cast<float*>(panel) + kPanelColumns;
        auto* panel_scales = reinterpret_cast<f16*>(multipliers + kPanelColumns);
        uint8_t* panel_zeros = panel + kPanelColumns * (8 + groups * 2);
        for (int64_t c = 0; c < kPanelColumns; c++) {
            const f16* column = layer.scales + (first + c) * groups;
            const int exponent = largest_exponent(column, groups);
            multipliers[c] = std::ldexp(1.0f, exponent);
            for (int64_t g = 0; g < groups; g++) {
                panel_scales[g * kPanelColumns + c] = half_times_power(column[g], -exponent);
                panel_zeros[g * kPanelColumns + c] = layer.zero_points[(first + c) * groups + g];
            }
        }
        uint8_t* rows = panel + panel_header_bytes(f);
        for (int64_t line = 0; line < row_bytes; line += kLine)
            for (int64_t c = 0; c < kPanelColumns; c++)
                for (int64_t k = line; k < std::min(line + kLine, row_bytes); k += 4) {
                    uint32_t word;
                    std::memcpy(&word, layer.integers + (first + c) * row_bytes + k, 4);
                    word ^= flips;
                    if (f.bits == 4) word = one_to_a_byte(word & 0xffff) | one_to_a_byte(word >> 16) << 4;
                    std::memcpy(rows + (k / 4 * kPanelColumns + c) * 4, &word, 4);
                }
    }
}

void linear(const LinearLayers& layers, const RowsView<const float>& input, float* const* outputs,
            const Executor& executor, const char* instruction_set) {
    const LinearKernels& kernels = choose_kernels(instruction_set);
    if (input.count <= 0) return;
    if (takes_tiles(kernels, layers.format, input.count))
        tile_linear(*kernels.tiles, layers, input, outputs, executor);
    else
        byte_linear(*kernels.bytes, layers, input, outputs, executor);
}

void mlp(const MLPLayers& layers, const RowsView<const float>& input, float* output, const Executor& executor,
         const char* instruction_set) {
    const LinearKernels& kernels = choose_kernels(instruction_set);
    if (input.count <= 0) return;
    if (takes_tiles(kernels, layers.down.format, input.count))
        tile_mlp(*kernels.tiles, layers, input, output, executor);
    else
        byte_mlp(*kernels.bytes, layers, input, output, executor);
}

const char* linear_instruction_sets() {
    static const std::string names = names_of_instruction_sets([](const auto& set) { return set.linear != nullptr; });
    return names.c_str();
}

bool linear_is_fast() {
    return &best_kernels() != portable_linear_kernels();
}

}  // namespace optimum_chatglm_ov
