// SPDX-License-Identifier: Apache-2.0
// Linear layers on tiles: chooses the way, rounds activations, divides the work among threads.
#include <algorithm>
#include <numeric>
#include <vector>

#include "common/parallel.hpp"
#include "linear/linear_kernel.hpp"

namespace optimum_chatglm_ov {
namespace {

constexpr int64_t kTaskBlocks = 16;  // sums of a task take a quarter of the second-level cache
constexpr int64_t kTaskPanels = 8;
constexpr int64_t kChunkRows = 512;  // of activations that are held at a time: they stay in the last cache
constexpr int64_t kPackedRows = 4;   // that one task packs

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

// The numbers of a row that have one scale may be rounded to 8 bits if their largest square is, on average over the
// rows, no more than so many times their mean square: it is never more where each 32 numbers have a scale, as with
// OpenVINO's dynamic quantisation. The error is then at most 1.3 % of the norm, sqrt(32 / 12) / 127.
constexpr double kMostSpread = 32;

bool rounds_well(const TileKernels& kernels, const float* input, int64_t rows, int64_t width,
                 const Executor& executor) {
    const int64_t parts = ceil_divide(rows, kPackedRows);
    std::vector<double> largest(parts), mean(parts);
    parallel_for(executor, parts, rows * width < 16384 ? 1 : executor.concurrency(), [&](int64_t i) {
        for (int64_t r = i * kPackedRows; r < std::min((i + 1) * kPackedRows, rows); r++) {
            const RowSize size = kernels.measure(input + r * width, width);
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

    void pack(const float* input, int64_t rows, const Executor& executor) {
        const int64_t width = format_.in_features;
        way_ = &choose_way(kernels_, format_);
        // as many rows as one block has cost no more in 16 bits
        if (way_ == &kernels_.bytes &&
            (rows <= kernels_.wide.block_rows || !rounds_well(kernels_, input, rows, width, executor)))
            way_ = &kernels_.wide;
        reserve(ceil_divide(rows, way_->block_rows));
        // a few rows are ready before another thread has begun
        const int64_t workers = rows * width < 16384 ? 1 : executor.concurrency();
        parallel_for(executor, ceil_divide(rows, kPackedRows), workers, [&](int64_t i) {
            const int64_t block = i * kPackedRows / way_->block_rows, begin = block * way_->block_rows;
            const int64_t first = i * kPackedRows - begin, last = std::min(first + kPackedRows, rows - begin);
            way_->pack(format_, input + begin * width, width, first, last, blocks_[block]);
        });
    }

    const RowBlock* blocks() const { return blocks_.data(); }
    const TileWay& way() const { return *way_; }

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
    const TileWay& way = activations.way();
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
            const TileTask task{&format,
                                activations.blocks() + first_block,
                                last_row - first_row,
                                layers * some,
                                pointers,
                                gating,
                                targets,
                                stride};
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
    PackedRows hidden(kernels, format, thread_scratch().hidden);
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
    PackedRows hidden(kernels, first_format, scratch.hidden);
    PackedRows activated(kernels, down_format, scratch.activated);
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
