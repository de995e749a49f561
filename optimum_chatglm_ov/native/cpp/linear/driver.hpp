// SPDX-License-Identifier: Apache-2.0
// What the drivers of linear layers (byte_driver.cpp, tile_driver.cpp) share.
#pragma once

#include <algorithm>
#include <vector>

#include "common/parallel.hpp"
#include "linear/linear_kernel.hpp"

namespace optimum_chatglm_ov {

// Of each thread that runs inferences: fresh memory would be cleared by the system, again for each layer.
struct LinearScratch {
    Buffer hidden, between, activated;
};

inline LinearScratch& linear_scratch() {
    thread_local LinearScratch scratch;
    return scratch;
}

// Rows that tiles take together: a few stay in the last cache, and with many the threads seldom wait for one another.
inline int64_t most_rows(const Executor& executor, int64_t limit = 4096) {
    constexpr int64_t kLeast = 512, kOfThread = 256;
    return std::min(std::max(kOfThread * executor.concurrency(), kLeast), limit);
}

// The results between the layers of an MLP take 4 bytes each, and then 2.
inline int64_t most_rows_of_mlp(const Executor& executor) {
    return most_rows(executor, 2048);
}

// Rows in parts of up to `most`, a multiple of 32, and of nearly one size: a last part of few rows would be computed in
// another way.
class RowParts {
public:
    RowParts(int64_t rows, int64_t most)
        : rows_(rows), blocks_(ceil_divide(rows, kBlock)), count_(ceil_divide(blocks_, most / kBlock)) {}

    int64_t count() const { return count_; }
    int64_t begin(int64_t i) const { return std::min(i * blocks_ / count_ * kBlock, rows_); }
    int64_t size(int64_t i) const { return begin(i + 1) - begin(i); }
    int64_t largest() const { return std::min(ceil_divide(blocks_, count_) * kBlock, rows_); }

private:
    static constexpr int64_t kBlock = 32;
    int64_t rows_, blocks_, count_;
};

// Panels of one layer after those of another.
inline int64_t count_panels(const LinearLayers& layers) {
    int64_t sum = 0;
    for (int64_t i = 0; i < layers.count; i++) sum += layers.weights[i].out_features / kPanelColumns;
    return sum;
}

// The layer of a panel among all; `panel` becomes its number there.
inline int64_t layer_of(const LinearLayers& layers, int64_t& panel) {
    int64_t i = 0;
    while (panel >= layers.weights[i].out_features / kPanelColumns)
        panel -= layers.weights[i++].out_features / kPanelColumns;
    return i;
}

inline const uint8_t* panel_at(const LinearLayers& layers, int64_t layer, int64_t panel) {
    return layers.weights[layer].panels + panel * panel_bytes(layers.format);
}

// The outputs of the layers from a row on.
inline std::vector<float*> outputs_from(const LinearLayers& layers, float* const* outputs, int64_t row) {
    std::vector<float*> parts(outputs, outputs + layers.count);
    for (int64_t i = 0; i < layers.count; i++) parts[i] += row * layers.weights[i].out_features;
    return parts;
}

}  // namespace optimum_chatglm_ov
