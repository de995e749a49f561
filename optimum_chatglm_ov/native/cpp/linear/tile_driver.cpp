// SPDX-License-Identifier: Apache-2.0
// Linear layers on tiles: chooses the way, rounds activations, divides the work among threads.
#include <algorithm>
#include <numeric>
#include <vector>

#include "linear/driver.hpp"

namespace optimum_chatglm_ov {
namespace {

constexpr int64_t kPackedRows = 4;    // that one task packs, if there are few blocks
constexpr int64_t kCached = 1 << 20;  // bytes of outputs of a thread that its second-level cache may still hold

Buffer& task_scratch() {
    thread_local Buffer buffer;
    return buffer;
}

// The numbers of a row that have one scale may be rounded to 8 bits if their largest square is, on average over the
// rows, no more than so many times their mean square: it is never more where each 32 numbers have a scale, as with
// OpenVINO's dynamic quantisation. The error is then at most 1.3 % of the norm, sqrt(32 / 12) / 127.
constexpr double kMostSpread = 32;

bool rounds_well(const TileKernels& kernels, const RowsView<const float>& input, int64_t width,
                 const Executor& executor) {
    const int64_t rows = input.count, parts = ceil_divide(rows, kPackedRows);
    std::vector<double> largest(parts), mean(parts);
    parallel_for(executor, parts, rows * width < 16384 ? 1 : executor.concurrency(), [&](int64_t i) {
        for (int64_t r = i * kPackedRows; r < std::min((i + 1) * kPackedRows, rows); r++) {
            const RowSize size = kernels.measure(input.data + r * input.stride, width);
            largest[i] += static_cast<double>(size.largest) * size.largest;
            mean[i] += size.squares / static_cast<double>(width);
        }
    });
    // false for what is no number
    return std::accumulate(largest.begin(), largest.end(), 0.0) <=
           kMostSpread * std::accumulate(mean.begin(), mean.end(), 0.0);
}

// Rows of activations in blocks.
class PackedRows {
public:
    PackedRows(const TileKernels& kernels, const LinearFormat& format, Buffer& memory)
        : kernels_(kernels), format_(format), memory_(memory) {}

    // For all rows of a call, or, where each is known only when it is computed, for the next ones.
    void choose_way(const RowsView<const float>& input, const Executor& executor) {
        const LinearFormat& f = format_;
        if (tiles_take_stored(f)) {
            const bool may_round = f.activation_group_size == f.in_features;
            // as many rows as one block has cost no more in 16 bits
            way_ = may_round && input.count > kernels_.wide.block_rows &&
                           rounds_well(kernels_, input, f.in_features, executor)
                       ? &kernels_.bytes
                       : &kernels_.wide;
        } else {
            way_ = kernels_.takes_halves(f, input.count) ? &kernels_.halves : &kernels_.bf16;
        }
    }

    void pack(const RowsView<const float>& input, const Executor& executor) {
        const int64_t rows = rows_ = input.count, width = format_.in_features;
        reserve(ceil_divide(rows, way_->block_rows));
        // a few rows are ready before another thread has begun
        const int64_t workers = rows * width < 16384 ? 1 : executor.concurrency();
        // Of a block that several threads write each takes lines from the caches of the others.
        const bool is_whole = ceil_divide(rows, way_->block_rows) >= std::max<int64_t>(executor.concurrency(), 2);
        const int64_t some = is_whole ? way_->block_rows : kPackedRows;
        parallel_for(executor, ceil_divide(rows, some), workers, [&](int64_t i) {
            const int64_t block = i * some / way_->block_rows, begin = block * way_->block_rows;
            const int64_t first = i * some - begin, last = std::min(first + some, rows - begin);
            way_->pack(format_, input.data + begin * input.stride, input.stride, first, last, blocks_[block]);
        });
    }

    const RowBlock* blocks() const { return blocks_.data(); }
    const TileWay& way() const { return *way_; }
    int64_t rows() const { return rows_; }

private:
    void reserve(int64_t count) {
        const int64_t values = way_->value_bytes(format_), scales = 32 * 4;
        const int64_t sums = ceil_divide(way_->sum_bytes(format_), 64) * 64;
        auto* memory = static_cast<uint8_t*>(memory_.reserve(count * (values + sums + scales)));
        blocks_.clear();
        for (int64_t i = 0; i < count; i++)
            blocks_.push_back({memory + i * values, memory + count * values + i * sums,
                               reinterpret_cast<float*>(memory + count * (values + sums) + i * scales)});
    }

    const TileKernels& kernels_;
    const LinearFormat& format_;
    Buffer& memory_;
    const TileWay* way_ = nullptr;
    int64_t rows_ = 0;
    std::vector<RowBlock> blocks_;
};

// Panels of one task: the threads shall finish together, but each task reads its activations once.
int64_t task_panels(int64_t panels, int64_t row_parts, int64_t concurrency, int64_t most) {
    int64_t best = 1, least = INT64_MAX;
    for (int64_t width = 1; width <= most; width++) {
        const int64_t rounds = ceil_divide(ceil_divide(panels, width) * row_parts, concurrency);
        if (rounds * (width + 1) <= least) best = width, least = rounds * (width + 1);
    }
    return best;
}

// outputs[i] [rows, out_features of weights[i]], or outputs[0] alone, of all layers through the activation function
void multiply(const PackedRows& activations, const LinearLayers& layers, Activation activation, float* const* outputs,
              const Executor& executor) {
    const TileWay& way = activations.way();
    const int64_t rows = activations.rows();
    const int64_t together = activation == Activation::none ? 1 : layers.count;  // layers of one task
    const LinearLayers row{layers.format, layers.weights, layers.count / together};
    const int64_t total = count_panels(row), blocks = ceil_divide(rows, way.block_rows);
    const int64_t row_parts = ceil_divide(blocks, way.task_blocks);
    const int64_t width = task_panels(total, row_parts, executor.concurrency(), way.task_panels / together);
    const int64_t columns = ceil_divide(total, width);
    // Outputs of these rows that would fill the caches need not be fetched into them first.
    const int64_t written = rows * total * kPanelColumns * 4;
    const bool streams = blocks > 1 && written > kCached * executor.concurrency();
    parallel_for(executor, row_parts * columns, executor.concurrency(), [&](int64_t i) {
        // Tasks of different rows and the same weights follow one another, which fetches the weights once.
        const int64_t row_part = i % row_parts, column = i / row_parts;
        const int64_t first_block = row_part * blocks / row_parts;
        const int64_t first_row = first_block * way.block_rows;
        const int64_t last_row = std::min((row_part + 1) * blocks / row_parts * way.block_rows, rows);
        for (int64_t next = column * total / columns, end = (column + 1) * total / columns; next < end;) {
            int64_t panel = next;
            const int64_t layer = layer_of(row, panel), stride = layers.weights[layer].out_features;
            const int64_t some = std::min(end - next, stride / kPanelColumns - panel);
            const uint8_t* pointers[kMostPanels];
            float* targets[kMostPanels];
            for (int64_t j = 0; j < together * some; j++) {
                pointers[j] = panel_at(layers, layer + j / some, panel + j % some);
                targets[j] = outputs[layer] + first_row * stride + (panel + j % some) * kPanelColumns;
            }
            const TileTask task{&layers.format,
                                activations.blocks() + first_block,
                                last_row - first_row,
                                together * some,
                                pointers,
                                activation,
                                targets,
                                stride,
                                streams && reinterpret_cast<uintptr_t>(outputs[layer]) % 64 == 0};
            way.multiply(task, task_scratch().reserve(way.scratch_bytes(task)));
            next += some;
        }
    });
}

}  // namespace

bool tiles_take_stored(const LinearFormat& f) {
    constexpr int64_t kMostFeatures = 65536;  // sums of more could exceed 31 bits
    return f.bits == 8 && f.group_size == f.in_features && f.in_features % 64 == 0 && f.in_features <= kMostFeatures;
}

void tile_linear(const TileKernels& kernels, const LinearLayers& layers, const RowsView<const float>& input,
                 float* const* outputs, const Executor& executor) {
    PackedRows hidden(kernels, layers.format, linear_scratch().hidden);
    hidden.choose_way(input, executor);
    const RowParts parts(input.count, most_rows(executor));
    for (int64_t i = 0; i < parts.count(); i++) {
        hidden.pack(input.part(parts.begin(i), parts.size(i)), executor);
        multiply(hidden, layers, Activation::none, outputs_from(layers, outputs, parts.begin(i)).data(), executor);
    }
}

void tile_mlp(const TileKernels& kernels, const MLPLayers& layers, const RowsView<const float>& input, float* output,
              const Executor& executor) {
    const auto& [first, activation, down] = layers;
    const RowParts parts(input.count, most_rows_of_mlp(executor));
    const int64_t width = down.format.in_features;
    LinearScratch& scratch = linear_scratch();
    PackedRows hidden(kernels, first.format, scratch.hidden);
    PackedRows activated(kernels, down.format, scratch.activated);
    float* between = static_cast<float*>(scratch.between.reserve(parts.largest() * width * 4));
    hidden.choose_way(input, executor);
    for (int64_t i = 0; i < parts.count(); i++) {
        const RowsView<const float> results{between, width, parts.size(i)};
        hidden.pack(input.part(parts.begin(i), parts.size(i)), executor);
        multiply(hidden, first, activation, &between, executor);
        activated.choose_way(results, executor);
        activated.pack(results, executor);
        multiply(activated, down, Activation::none, outputs_from(down, &output, parts.begin(i)).data(), executor);
    }
}

}  // namespace optimum_chatglm_ov
