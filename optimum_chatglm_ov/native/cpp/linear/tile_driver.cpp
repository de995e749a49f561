// SPDX-License-Identifier: Apache-2.0
// Linear layers on tiles: chooses the way, rounds activations, divides the work among threads.
#include <algorithm>
#include <vector>

#include "linear/linear_kernel.hpp"
#include "common/parallel.hpp"

namespace optimum_chatglm_ov {
namespace {

constexpr int64_t kTaskBlocks = 16;   // sums of a task take a quarter of the second-level cache
constexpr int64_t kTaskPanels = 8;
constexpr int64_t kChunkRows = 512;   // of activations that are held at a time: they stay in the last cache
constexpr int64_t kPackedRows = 4;    // that one task packs

// Of each thread that runs inferences: fresh memory would be cleared by the system, again for each layer.
struct Scratch {
    Buffer hidden, between, activated;
};

Scratch& thread_scratch() {
    thread_local Scratch scratch;
    return scratch;
}

Buffer& task_scratch() {
    thread_local Buffer buffer;
    return buffer;
}

// Rows of activations in blocks.
class PackedRows {
public:
    PackedRows(const TileKernels& kernels, const LinearFormat& format, int64_t rows, Buffer& memory)
        : way(choose_way(kernels, format)), format_(format) {
        const int64_t count = ceil_divide(rows, way.block_rows), values = way.value_bytes(format);
        const int64_t sums = ceil_divide(way.sum_bytes(format), 64) * 64, scales = 32 * 4;
        auto* memory_ = static_cast<uint8_t*>(memory.reserve(count * (values + sums + scales)));
        for (int64_t i = 0; i < count; i++)
            blocks_.push_back({memory_ + i * values, memory_ + count * values + i * sums,
                               reinterpret_cast<float*>(memory_ + count * (values + sums) + i * scales)});
    }

    void pack(const float* input, int64_t rows, const Executor& executor) {
        const int64_t parts = way.block_rows / kPackedRows, width = format_.in_features;
        const int64_t count = ceil_divide(rows, way.block_rows) * parts;
        // a few rows are ready before another thread has begun
        parallel_for(executor, count, rows * width < 16384 ? 1 : executor.concurrency(), [&](int64_t i) {
            const int64_t block = i / parts, row = block * way.block_rows, first = i % parts * kPackedRows;
            way.pack(format_, input + row * width, width, rows - row, first, first + kPackedRows, blocks_[block]);
        });
    }

    const RowBlock* blocks() const { return blocks_.data(); }

    const TileWay& way;

private:
    const LinearFormat& format_;
    std::vector<RowBlock> blocks_;
};

// Panels of several layers as one row of panels.
struct Panels {
    const LinearWeights* weights;
    int64_t count, panel_bytes;

    int64_t total() const {
        int64_t sum = 0;
        for (int64_t i = 0; i < count; i++) sum += weights[i].out_features / kPanelColumns;
        return sum;
    }
    // The layer of a panel; `panel` becomes its number there.
    int64_t layer(int64_t& panel) const {
        int64_t i = 0;
        while (panel >= weights[i].out_features / kPanelColumns) panel -= weights[i++].out_features / kPanelColumns;
        return i;
    }
    const uint8_t* at(int64_t layer, int64_t panel) const { return weights[layer].panels + panel * panel_bytes; }
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

// outputs[i] [rows, out_features of weights[i]], or the gated one of all layers
void multiply(const PackedRows& activations, const LinearFormat& format, const LinearWeights* weights, int64_t count,
              Gating gating, int64_t rows, float* const* outputs, const Executor& executor) {
    const TileWay& way = activations.way;
    const bool is_gated = gating != Gating::none;
    const int64_t layers = is_gated ? count : 1;  // whose panels a task takes together
    const Panels panels{weights, is_gated ? 1 : count, panel_bytes(format)};
    const int64_t total = panels.total(), blocks = ceil_divide(rows, way.block_rows);
    const int64_t row_parts = ceil_divide(blocks, kTaskBlocks);
    const int64_t width = task_panels(total, row_parts, executor.concurrency(), kTaskPanels / layers);
    const int64_t columns = ceil_divide(total, width);
    parallel_for(executor, row_parts * columns, executor.concurrency(), [&](int64_t i) {
        const int64_t first_block = i / columns * blocks / row_parts;
        const int64_t first_row = first_block * way.block_rows;
        const int64_t last_row = std::min((i / columns + 1) * blocks / row_parts * way.block_rows, rows);
        for (int64_t next = i % columns * total / columns, end = (i % columns + 1) * total / columns; next < end;) {
            int64_t panel = next;
            const int64_t layer = panels.layer(panel), stride = weights[layer].out_features;
            const int64_t some = std::min(end - next, stride / kPanelColumns - panel);
            const uint8_t* pointers[kTilePanels];
            float* targets[kTilePanels];
            for (int64_t j = 0; j < layers * some; j++) {
                pointers[j] = panels.at(layer + j / some, panel + j % some);
                targets[j] = outputs[layer] + first_row * stride + (panel + j % some) * kPanelColumns;
            }
            const TileTask task{&format,  activations.blocks() + first_block, last_row - first_row, layers * some,
                                pointers, gating,                             targets,              stride};
            way.multiply(task, task_scratch().reserve(way.scratch_bytes(task)));
            next += some;
        }
    });
}

}  // namespace

const TileWay& choose_way(const TileKernels& kernels, const LinearFormat& f) {
    constexpr int64_t kMostFeatures = 65536;  // sums of more could exceed 31 bits
    if (f.bits != 8 || f.group_size != f.in_features || f.in_features % 64 || f.in_features > kMostFeatures)
        return kernels.bf16;
    return f.activation_group_size == f.in_features ? kernels.bytes : kernels.wide;
}

void tile_linear(const TileKernels& kernels, const LinearFormat& format, const LinearWeights* weights, int64_t count,
                 int64_t rows, const float* input, float* const* outputs, const Executor& executor) {
    const int64_t chunk = std::min(rows, kChunkRows);
    PackedRows hidden(kernels, format, chunk, thread_scratch().hidden);
    std::vector<float*> parts(count);
    for (int64_t first = 0; first < rows; first += chunk) {
        const int64_t some = std::min(chunk, rows - first);
        hidden.pack(input + first * format.in_features, some, executor);
        for (int64_t i = 0; i < count; i++) parts[i] = outputs[i] + first * weights[i].out_features;
        multiply(hidden, format, weights, count, Gating::none, some, parts.data(), executor);
    }
}

void tile_mlp(const TileKernels& kernels, const LinearFormat& first_format, const LinearWeights* first,
              Activation activation, const LinearFormat& down_format, const LinearWeights& down, int64_t rows,
              const float* input, float* output, const Executor& executor) {
    const int64_t chunk = std::min(rows, kChunkRows), layers = activation == Activation::silu ? 2 : 1;
    const Gating gating = activation == Activation::silu ? Gating::silu : Gating::gelu;
    Scratch& scratch = thread_scratch();
    PackedRows hidden(kernels, first_format, chunk, scratch.hidden);
    PackedRows activated(kernels, down_format, chunk, scratch.activated);
    float* between = static_cast<float*>(scratch.between.reserve(chunk * down_format.in_features * 4));
    for (int64_t i = 0; i < rows; i += chunk) {
        const int64_t some = std::min(chunk, rows - i);
        hidden.pack(input + i * first_format.in_features, some, executor);
        multiply(hidden, first_format, first, layers, gating, some, &between, executor);
        activated.pack(between, some, executor);
        float* part = output + i * down.out_features;
        multiply(activated, down_format, &down, 1, Gating::none, some, &part, executor);
    }
}

}  // namespace optimum_chatglm_ov
