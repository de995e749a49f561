// SPDX-License-Identifier: Apache-2.0
// Linear layers on byte products: rounds activations to 8 bits, divides the work among threads.
#include <algorithm>
#include <numeric>
#include <vector>

#include "common/cpu_features.hpp"
#include "linear/driver.hpp"

namespace optimum_chatglm_ov {
namespace {

constexpr int64_t kPanelsTogether = 4;  // panels of weights that meet the same activations in one task

// Fewer rows than the kernels hold cost no more as 16 bits, high and low bytes apart, than as 8.
int64_t choose_digits(const ByteKernels& kernels, int64_t rows) {
    return rows <= kernels.wide_rows ? 2 : 1;
}

// The groups of activations that the kernels see: of 16 bits as large as they may be, they have one scale; whole rows
// of 8 bits as small as they may be, which costs little.
LinearFormat in_groups(LinearFormat f, int64_t digits) {
    if (digits == 2)
        f.activation_group_size = std::gcd(segment_size(f), f.in_features);
    else if (f.activation_group_size == f.in_features)
        f.activation_group_size = kActivationGroup;
    return f;
}

// Rows [0, rows) of activations, in panels of as many rows as the kernels take.
class Activations {
public:
    Activations(const LinearFormat& format, const ByteKernels& kernels, int64_t rows, Buffer& memory)
        : digits_(choose_digits(kernels, rows)), format_(in_groups(format, digits_)), kernels_(kernels) {
        rows *= digits_;
        const int64_t groups = format.in_features / format_.activation_group_size;
        const size_t scales = rows * groups, sums = rows * segment_count(format);
        scales_ = static_cast<float*>(memory.reserve((scales + sums) * 4 + rows * format.in_features));
        sums_ = scales_ + scales;
        integers_ = reinterpret_cast<int8_t*>(sums_ + sums);
    }

    void quantize(const RowsView<const float>& input, const Executor& executor) {
        quantize({Activation::none, input.data, nullptr, input.stride}, input.count, executor);
    }

    void quantize(const ActivationSource& source, int64_t rows, const Executor& executor) {
        rows_ = rows * digits_;
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
        return {std::min(kernels_.rows, rows_ - first), digits_, integers_ + first * format_.in_features,
                scales_ + first * (format_.in_features / format_.activation_group_size),
                sums_ + first * segment_count(format_)};
    }

    // outputs[i] [rows, out_features]
    void multiply(const LinearLayers& layers, float* const* outputs, const Executor& executor) const {
        const int64_t height = std::min(cached_panels(format_, kernels_), panels()), columns = count_panels(layers);
        const int64_t wanted = 8 * executor.concurrency(), vertical = ceil_divide(panels(), height);
        const int64_t width =
            std::min(std::max<int64_t>(columns * vertical / wanted, 1), panels() > 1 ? kPanelsTogether : columns);
        const int64_t horizontal = ceil_divide(columns, width);
        parallel_for(executor, vertical * horizontal, executor.concurrency(), [&](int64_t task) {
            const int64_t first_row = task / horizontal * height, first_column = task % horizontal * width;
            const int64_t last_row = std::min(first_row + height, panels());
            const int64_t last_column = std::min(first_column + width, columns);
            const int64_t step = std::max<int64_t>(kMaxSegment / segment_size(format_), 1);
            for (int64_t s = 0; s < segment_count(format_); s += step)
                for (int64_t c = first_column; c < last_column; c++) {
                    int64_t column = c;
                    const int64_t i = layer_of(layers, column), stride = layers.weights[i].out_features;
                    for (int64_t r = first_row; r < last_row; r++)
                        kernels_.multiply({&format_, panel(r), panel_at(layers, i, column), s,
                                           std::min(s + step, segment_count(format_)),
                                           outputs[i] + r * kernels_.rows * stride + column * kPanelColumns, stride,
                                           r == first_row});
                }
        });
    }

    // Panels of activations that take three quarters of the second-level cache.
    static int64_t cached_panels(const LinearFormat& format, const ByteKernels& kernels) {
        const int64_t bytes = std::min(format.in_features, kMaxSegment) * kernels.rows;
        return std::max<int64_t>(cpu_features().l2_bytes * 3 / 4 / bytes, 1);
    }

private:
    int64_t digits_;
    LinearFormat format_;
    const ByteKernels& kernels_;
    int64_t rows_ = 0;
    float *scales_, *sums_;
    int8_t* integers_;
};

}  // namespace

void byte_linear(const ByteKernels& kernels, const LinearLayers& layers, const RowsView<const float>& input,
                 float* const* outputs, const Executor& executor) {
    const int64_t most = 8 * Activations::cached_panels(layers.format, kernels) * kernels.rows;
    const int64_t chunk = std::min(input.count, most);
    Activations activations(layers.format, kernels, chunk, linear_scratch().hidden);
    for (int64_t first = 0; first < input.count; first += chunk) {
        activations.quantize(input.part(first, std::min(chunk, input.count - first)), executor);
        activations.multiply(layers, outputs_from(layers, outputs, first).data(), executor);
    }
}

void byte_mlp(const ByteKernels& kernels, const MLPLayers& layers, const RowsView<const float>& input, float* output,
              const Executor& executor) {
    const auto& [first, activation, down] = layers;
    const int64_t most = 2 * Activations::cached_panels(first.format, kernels) * kernels.rows;
    const int64_t chunk = std::min(input.count, most), width = down.format.in_features;
    LinearScratch& scratch = linear_scratch();
    Activations hidden(first.format, kernels, chunk, scratch.hidden);
    Activations activated(down.format, kernels, chunk, scratch.activated);
    float* between = static_cast<float*>(scratch.between.reserve(first.count * chunk * width * 4));
    float* const parts[] = {between, between + chunk * width};  // gate and up, or up alone
    const ActivationSource source{activation, parts[0], first.count == 2 ? parts[1] : nullptr, width};
    for (int64_t i = 0; i < input.count; i += chunk) {
        const int64_t some = std::min(chunk, input.count - i);
        hidden.quantize(input.part(i, some), executor);
        hidden.multiply(first, parts, executor);
        activated.quantize(source, some, executor);
        activated.multiply(down, outputs_from(down, &output, i).data(), executor);
    }
}

}  // namespace optimum_chatglm_ov
