// SPDX-License-Identifier: Apache-2.0
// The driver of linear layers: packs weights, picks the instruction set, divides the work among threads.
#include "linear.hpp"

#include <cstring>
#include <stdexcept>
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

const LinearKernels& choose_kernels(const char* name) {
    if (!name) name = std::getenv("CHATGLM_OV_ISA");
    for (const LinearKernels* k : all_kernels())
        if (name && std::strcmp(name, k->name) == 0) return *k;
    return *all_kernels().front();  // other names are those of attention kernels
}

// Rows [0, rows) of activations, in panels of as many rows as the kernels take.
class Activations {
public:
    Activations(const LinearFormat& format, const LinearKernels& kernels, int64_t rows)
        : format_(format), kernels_(kernels) {
        const int64_t groups = format.in_features / format.activation_group_size;
        const size_t scales = rows * groups, sums = rows * segment_count(format);
        scales_ = static_cast<float*>(memory_.reserve((scales + sums) * 4 + rows * format.in_features));
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

    // outputs[i] [rows, out_features], behind one another in memory from row to row
    void multiply(const LinearWeights* weights, int64_t count, float* const* outputs, const Executor& executor) const {
        // The activations of a task take three quarters of the second-level cache.
        const int64_t together = std::min(format_.in_features, kMaxSegment);
        const int64_t cached = cpu_features().l2_bytes * 3 / 4 / (together * kernels_.rows);
        const int64_t height = std::min(std::max<int64_t>(cached, 1), panels());
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
                                           outputs[i] + r * kernels_.rows * stride + column * kPanelColumns, stride});
                    }
                }
        });
    }

    // Rows that two tasks one above the other take.
    static int64_t chunk(const LinearFormat& format, const LinearKernels& kernels) {
        const int64_t cached = cpu_features().l2_bytes * 3 / 4 / (std::min(format.in_features, kMaxSegment) * kernels.rows);
        return std::max<int64_t>(cached, 1) * kernels.rows * 2;
    }

private:
    LinearFormat format_;
    const LinearKernels& kernels_;
    Buffer memory_;
    int64_t rows_ = 0;
    float *scales_, *sums_;
    int8_t* integers_;
};

}  // namespace

const char* linear_format_error(const LinearFormat& f, int64_t out_features) {
    if (f.bits != 8 && f.bits != 4) return "weights must have 8 or 4 bits";
    if (f.in_features <= 0 || f.activation_group_size <= 0 || f.group_size <= 0) return "sizes must be positive";
    if (f.activation_group_size % kActivationGroup) return "activation groups must be multiples of 32";
    if (f.in_features % f.group_size || segment_size(f) % f.activation_group_size ||
        f.in_features % f.activation_group_size)
        return "groups must divide the input features, and activation groups those of the weights";
    if (out_features <= 0 || out_features % kPanelColumns) return "output features must be a multiple of 32";
    return nullptr;
}

void pack_linear(const LinearFormat& f, int64_t out_features, const uint8_t* integers, uint8_t flip,
                 const uint16_t* scales, const uint8_t* zero_points, const float* bias, uint8_t* packed) {
    const int64_t groups = f.in_features / f.group_size, row_bytes = f.in_features * f.bits / 8;
    for (int64_t first = 0; first < out_features; first += kPanelColumns) {
        uint8_t* panel = packed + first / kPanelColumns * panel_bytes(f);
        std::memset(panel, 0, panel_header_bytes(f));
        auto* panel_scales = reinterpret_cast<uint16_t*>(panel + kPanelColumns * 4);
        uint8_t *panel_zeros = panel + kPanelColumns * (4 + groups * 2), *rows = panel + panel_header_bytes(f);
        if (bias) std::memcpy(panel, bias + first, kPanelColumns * 4);
        for (int64_t c = 0; c < kPanelColumns; c++) {
            for (int64_t g = 0; g < groups; g++) {
                panel_scales[g * kPanelColumns + c] = scales[(first + c) * groups + g];
                panel_zeros[g * kPanelColumns + c] = zero_points[(first + c) * groups + g];
            }
            const uint8_t* row = integers + (first + c) * row_bytes;
            for (int64_t k = 0; k < row_bytes; k += 4) {
                uint8_t four[4];
                for (int i = 0; i < 4; i++) {
                    if (f.bits == 8) {
                        four[i] = row[k + i] ^ flip;
                    } else {  // features 0 .. 3 and 4 .. 7, side by side in the row, are below each other here
                        const int shift = i % 2 * 4;
                        const int low = (row[k + i / 2] ^ flip) >> shift & 15;
                        const int high = (row[k + 2 + i / 2] ^ flip) >> shift & 15;
                        four[i] = static_cast<uint8_t>(low | high << 4);
                    }
                }
                std::memcpy(rows + (k / 4 * kPanelColumns + c) * 4, four, 4);
            }
        }
    }
}

void linear(const LinearFormat& format, const LinearWeights* weights, int64_t count, int64_t rows, const float* input,
            float* const* outputs, const Executor& executor, const char* instruction_set) {
    const LinearKernels& kernels = choose_kernels(instruction_set);
    const int64_t chunk = std::min(rows, 4 * Activations::chunk(format, kernels));
    if (rows <= 0) return;
    Activations activations(format, kernels, chunk);
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
    const int64_t chunk = std::min(rows, Activations::chunk(first_format, kernels));
    if (rows <= 0) return;
    const int64_t count = activation == Activation::silu ? 2 : 1, width = down_format.in_features;
    Activations hidden(first_format, kernels, chunk), activated(down_format, kernels, chunk);
    Buffer memory;
    float* up = static_cast<float*>(memory.reserve(count * chunk * width * 4));
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
    return !cpu_features().amx && (cpu_features().avx512_vnni || cpu_features().avx2_vnni);
}

}  // namespace optimum_chatglm_ov
