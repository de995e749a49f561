// SPDX-License-Identifier: Apache-2.0
// The driver of linear layers: packs weights, picks the instruction set, divides the work among threads.
#include "linear.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "kernel.hpp"
#include "linear_kernel.hpp"
#include "parallel.hpp"

namespace optimum_chatglm_ov {
namespace {

constexpr int64_t kPanelsTogether = 4;  // panels of weights that meet the same activations in one task

const std::vector<const LinearKernels*>& all_kernels() {
    static const std::vector<const LinearKernels*> kernels = [] {
        std::vector<const LinearKernels*> found;
        if (cpu_features().avx512_vnni) found.push_back(avx512_vnni_linear_kernels());
        if (cpu_features().avx2_vnni) found.push_back(avx2_vnni_linear_kernels());
        found.push_back(portable_linear_kernels());
        found.erase(std::remove(found.begin(), found.end(), nullptr), found.end());
        return found;
    }();
    return kernels;
}

// The best, or the one that was asked for. A name that only attention knows asks for nothing here.
const LinearKernels& choose_kernels(const char* name) {
    if (!name || !*name) name = std::getenv("CHATGLM_OV_ISA");
    if (!name || !*name) return *all_kernels().front();
    for (const LinearKernels* k : all_kernels())
        if (std::strcmp(name, k->name) == 0) return *k;
    require_known_instruction_set(name);
    return *all_kernels().front();
}

// Of each thread that runs inferences: fresh memory would be cleared by the system, again for each layer.
struct Scratch {
    Buffer hidden, between, activated;
};

Scratch& thread_scratch() {
    thread_local Scratch scratch;
    return scratch;
}

// Rows [0, rows) of activations, in panels of as many rows as the kernels take.
class Activations {
public:
    Activations(const LinearFormat& format, const LinearKernels& kernels, int64_t rows, Buffer& memory)
        : format_(format), kernels_(kernels) {
        const int64_t groups = format.in_features / format.activation_group_size;
        const size_t scales = rows * groups, sums = rows * segment_count(format);
        scales_ = static_cast<float*>(memory.reserve((scales + sums) * 4 + rows * format.in_features));
        sums_ = scales_ + scales;
        integers_ = reinterpret_cast<int8_t*>(sums_ + sums);
    }

    void quantize(const ActivationSource& source, int64_t rows, const Executor& executor) {
        rows_ = rows;
        const int64_t workers = rows * format_.in_features < 16384 ? 1 : executor.concurrency();
        parallel_for(executor, panels(), workers, [&](int64_t i) {
            static thread_local Buffer scratch;
            ActivationSource part = source;
            part.input += i * kernels_.rows * source.stride;
            if (part.up) part.up += i * kernels_.rows * source.stride;
            kernels_.quantize(format_, part, panel(i), scratch.reserve(format_.in_features * 8));
        });
    }

    int64_t panels() const { return ceil_divide(rows_, kernels_.rows); }

    ActivationPanel panel(int64_t i) const {
        const int64_t first = i * kernels_.rows;
        return {std::min(kernels_.rows, rows_ - first), integers_ + first * format_.in_features,
                scales_ + first * (format_.in_features / format_.activation_group_size),
                sums_ + first * segment_count(format_)};
    }

    // outputs[i] [rows, out_features]
    void multiply(const LinearWeights* weights, int64_t count, float* const* outputs, const Executor& executor) const {
        const int64_t height = std::min(cached_panels(format_, kernels_), panels());
        int64_t columns = 0;
        for (int64_t i = 0; i < count; i++) columns += weights[i].out_features / kPanelColumns;
        const int64_t wanted = 8 * executor.concurrency(), vertical = ceil_divide(panels(), height);
        const int64_t width = std::min(std::max<int64_t>(columns * vertical / wanted, 1),
                                       panels() > 1 ? kPanelsTogether : columns);
        const int64_t horizontal = ceil_divide(columns, width);
        parallel_for(executor, vertical * horizontal, executor.concurrency(), [&](int64_t task) {
            const int64_t first_row = task / horizontal * height, first_column = task % horizontal * width;
            const int64_t last_row = std::min(first_row + height, panels());
            const int64_t last_column = std::min(first_column + width, columns);
            const int64_t step = std::max<int64_t>(kMaxSegment / segment_size(format_), 1);
            for (int64_t s = 0; s < segment_count(format_); s += step)
                for (int64_t c = first_column; c < last_column; c++) {
                    int64_t i = 0, column = c;
                    while (column >= weights[i].out_features / kPanelColumns)
                        column -= weights[i++].out_features / kPanelColumns;
                    for (int64_t r = first_row; r < last_row; r++) {
                        const int64_t stride = weights[i].out_features;
                        kernels_.multiply({&format_, panel(r), weights[i].panels + column * panel_bytes(format_), s,
                                           std::min(s + step, segment_count(format_)),
                                           outputs[i] + r * kernels_.rows * stride + column * kPanelColumns, stride,
                                           r == first_row});
                    }
                }
        });
    }

    // Panels of activations that take three quarters of the second-level cache.
    static int64_t cached_panels(const LinearFormat& format, const LinearKernels& kernels) {
        const int64_t bytes = std::min(format.in_features, kMaxSegment) * kernels.rows;
        return std::max<int64_t>(cpu_features().l2_bytes * 3 / 4 / bytes, 1);
    }

private:
    LinearFormat format_;
    const LinearKernels& kernels_;
    int64_t rows_ = 0;
    float *scales_, *sums_;
    int8_t* integers_;
};

// The four halves of two bytes, from the lowest, in the low halves of four bytes.
uint32_t one_to_a_byte(uint32_t halves) {
    return (halves & 0xf) | (halves & 0xf0) << 4 | (halves & 0xf00) << 8 | (halves & 0xf000) << 12;
}

}  // namespace

const char* linear_format_error(const LinearFormat& f, int64_t out_features) {
    if (f.bits != 8 && f.bits != 4) return "weights must have 8 or 4 bits";
    if (f.in_features <= 0 || f.activation_group_size <= 0 || f.group_size <= 0) return "sizes must be positive";
    if (f.activation_group_size % kActivationGroup) return "activation groups must be multiples of 32";
    if (f.in_features % f.group_size || segment_size(f) % f.activation_group_size ||
        f.in_features % f.activation_group_size)
        return "groups must divide the input features, and activation groups those of the weights";
    if (f.group_size > kMaxSegment && f.group_size != f.in_features)
        return "groups must have at most 4096 input features, or all";
    if (out_features <= 0 || out_features % kPanelColumns) return "output features must be a multiple of 32";
    return nullptr;
}

void pack_linear(const LinearFormat& f, int64_t out_features, const uint8_t* integers, uint8_t flip,
                 const uint16_t* scales, const uint8_t* zero_points, const float* bias, uint8_t* packed) {
    constexpr int64_t kLine = 64;  // bytes of a row that are taken at a time, while its cache line is there
    const int64_t groups = f.in_features / f.group_size, row_bytes = f.in_features * f.bits / 8;
    const uint32_t flips = flip * 0x01010101u;
    for (int64_t first = 0; first < out_features; first += kPanelColumns) {
        uint8_t* panel = packed + first / kPanelColumns * panel_bytes(f);
        std::memset(panel, 0, panel_header_bytes(f));
        if (bias) std::memcpy(panel, bias + first, kPanelColumns * 4);
        auto* panel_scales = reinterpret_cast<uint16_t*>(panel + kPanelColumns * 4);
        uint8_t* panel_zeros = panel + kPanelColumns * (4 + groups * 2);
        for (int64_t g = 0; g < groups; g++)
            for (int64_t c = 0; c < kPanelColumns; c++) {
                panel_scales[g * kPanelColumns + c] = scales[(first + c) * groups + g];
                panel_zeros[g * kPanelColumns + c] = zero_points[(first + c) * groups + g];
            }
        uint8_t* rows = panel + panel_header_bytes(f);
        for (int64_t line = 0; line < row_bytes; line += kLine)
            for (int64_t c = 0; c < kPanelColumns; c++)
                for (int64_t k = line; k < std::min(line + kLine, row_bytes); k += 4) {
                    uint32_t word;
                    std::memcpy(&word, integers + (first + c) * row_bytes + k, 4);
                    word ^= flips;
                    if (f.bits == 4) word = one_to_a_byte(word & 0xffff) | one_to_a_byte(word >> 16) << 4;
                    std::memcpy(rows + (k / 4 * kPanelColumns + c) * 4, &word, 4);
                }
    }
}

void linear(const LinearFormat& format, const LinearWeights* weights, int64_t count, int64_t rows, const float* input,
            float* const* outputs, const Executor& executor, const char* instruction_set) {
    const LinearKernels& kernels = choose_kernels(instruction_set);
    if (rows <= 0) return;
    const int64_t chunk = std::min(rows, 8 * Activations::cached_panels(format, kernels) * kernels.rows);
    Activations activations(format, kernels, chunk, thread_scratch().hidden);
    std::vector<float*> parts(count);
    for (int64_t first = 0; first < rows; first += chunk) {
        activations.quantize({Source::plain, input + first * format.in_features, nullptr, format.in_features},
                             std::min(chunk, rows - first), executor);
        for (int64_t i = 0; i < count; i++) parts[i] = outputs[i] + first * weights[i].out_features;
        activations.multiply(weights, count, parts.data(), executor);
    }
}

void mlp(const LinearFormat& first_format, const LinearWeights* first, Activation activation,
         const LinearFormat& down_format, const LinearWeights& down, int64_t rows, const float* input, float* output,
         const Executor& executor, const char* instruction_set) {
    const LinearKernels& kernels = choose_kernels(instruction_set);
    if (rows <= 0) return;
    const int64_t chunk = std::min(rows, 2 * Activations::cached_panels(first_format, kernels) * kernels.rows);
    const int64_t count = activation == Activation::silu ? 2 : 1, width = down_format.in_features;
    Scratch& scratch = thread_scratch();
    Activations hidden(first_format, kernels, chunk, scratch.hidden);
    Activations activated(down_format, kernels, chunk, scratch.activated);
    float* up = static_cast<float*>(scratch.between.reserve(count * chunk * width * 4));
    float* const between[] = {up, up + chunk * width};
    const ActivationSource source = activation == Activation::silu
                                        ? ActivationSource{Source::silu, between[0], between[1], width}
                                        : ActivationSource{Source::gelu, up, nullptr, width};
    for (int64_t i = 0; i < rows; i += chunk) {
        const int64_t some = std::min(chunk, rows - i);
        hidden.quantize({Source::plain, input + i * first_format.in_features, nullptr, first_format.in_features}, some,
                        executor);
        hidden.multiply(first, count, between, executor);
        activated.quantize(source, some, executor);
        float* part = output + i * down.out_features;
        activated.multiply(&down, 1, &part, executor);
    }
}

const char* linear_instruction_sets() {
    static const std::string names = [] {
        std::string joined;
        for (const LinearKernels* k : all_kernels()) joined += (joined.empty() ? "" : ",") + std::string(k->name);
        return joined;
    }();
    return names.c_str();
}

bool linear_is_fast() {
    return !cpu_features().amx && all_kernels().front() != portable_linear_kernels();
}

}  // namespace optimum_chatglm_ov
