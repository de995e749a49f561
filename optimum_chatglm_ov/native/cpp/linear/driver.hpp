// SPDX-License-Identifier: Apache-2.0
// What the drivers of linear layers (byte_driver.cpp, tile_driver.cpp) share.
#pragma once

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
