// SPDX-License-Identifier: Apache-2.0
// What the drivers (byte_driver.cpp, tile_driver.cpp) ask of the kernels of one instruction set.
#pragma once

#include "linear/linear.hpp"

namespace optimum_chatglm_ov {

// Products are summed in segments of a row: weights that share a scale, but no more than the first-level caches like.
constexpr int64_t kMaxSegment = 4096;

static constexpr int64_t segment_size(const LinearFormat& f) {
    return f.group_size < kMaxSegment ? f.group_size : kMaxSegment;
}
static constexpr int64_t segment_count(const LinearFormat& f) {
    return (f.in_features + segment_size(f) - 1) / segment_size(f);
}

// A few rows of quantised activations: x = scale * integer, or the sum of two rows of these: high and low bytes.
//   integers [in_features / 4][rows][4], scales [in_features / activation_group_size][rows],
//   sums [segments][rows / digits]: of x over a segment
struct ActivationPanel {
    int64_t rows;
    int64_t digits;  // 1, or 2 rows for each of the activations
    int8_t* integers;
    float* scales;
    float* sums;
};

// How the activations come: input, or the activation function of one or two layers' outputs; rows `stride` apart.
struct ActivationSource {
    Activation activation;
    const float* input;  // or the gate
    const float* up;     // silu: what the gate is multiplied with
    int64_t stride;
};

// Output columns of one panel of weights for one panel of activations, segments [first_segment, last_segment). The
// first segment starts from the bias, others add to what output holds.
struct LinearTask {
    const LinearFormat* format;
    ActivationPanel activations;
    const uint8_t* weights;
    int64_t first_segment, last_segment;
    float* output;
    int64_t stride;
    bool reads_ahead;  // the weights come from memory, not from a cache
};

// What the driver of byte products (byte_driver.cpp) asks of an instruction set.
struct ByteKernels {
    int64_t rows;       // of a full activation panel
    int64_t wide_rows;  // so many, or fewer, are as fast in 16 bits
    // scratch: 8 bytes for each input feature
    void (*quantize)(const LinearFormat&, const ActivationSource&, const ActivationPanel&, void* scratch);
    void (*multiply)(const LinearTask&);
};

// A few rows of activations as tiles hold them; what `sums` and `scales` are is the way's own business.
struct RowBlock {
    void* values;
    void* sums;
    float* scales;
};

// Products of rows with panels of weights, which need not lie together.
struct TileTask {
    const LinearFormat* format;
    const RowBlock* blocks;
    int64_t rows, panels;
    const uint8_t* const* weights;
    // results of panel i at outputs[i], rows `stride` apart; silu: the first half of the panels are gates, and only
    // the outputs of the others are written, with gate * sigmoid(gate) * up
    Activation activation;
    float* const* outputs;
    int64_t stride;
    bool streams;  // outputs are written past the caches; never those of a single block
};

// A way to multiply with tiles: in bf16, or as bytes.
struct TileWay {
    int64_t block_rows;
    int64_t task_blocks, task_panels;  // of one task, at most
    // Bytes of the values, and of the sums, of a block.
    int64_t (*value_bytes)(const LinearFormat&);
    int64_t (*sum_bytes)(const LinearFormat&);
    // Rows [first, last) of a block from f32 rows `stride` apart. What those that are never packed hold does not
    // matter.
    void (*pack)(const LinearFormat&, const float* input, int64_t stride, int64_t first, int64_t last,
                 const RowBlock& block);
    size_t (*scratch_bytes)(const TileTask&);
    void (*multiply)(const TileTask&, void* scratch);
};

// The largest magnitude of a row, and the sum of squares; NaN if one of the numbers is NaN or infinite.
struct RowSize {
    float largest, squares;
};

struct TileKernels {
    TileWay bf16;    // every format
    TileWay halves;  // 4 bits in groups, few rows: activations of 16 bits, as two bytes
    TileWay wide;    // 8 bits with one scale a row: activations of 16 bits, as two bytes
    TileWay bytes;   // the same: activations of 8 bits
    bool (*takes_halves)(const LinearFormat&, int64_t rows);
    RowSize (*measure)(const float* row, int64_t count);
};

constexpr int64_t kMostPanels = 16;  // of a task, at most

struct LinearKernels {
    const ByteKernels* bytes;
    const TileKernels* tiles;  // or null
};

// Whether tiles multiply weights as they are stored.
bool tiles_take_stored(const LinearFormat&);

// The drivers: see linear() and mlp().
void byte_linear(const ByteKernels&, const LinearLayers&, const RowsView<const float>& input, float* const* outputs,
                 const Executor&);
void byte_mlp(const ByteKernels&, const MLPLayers&, const RowsView<const float>& input, float* output,
              const Executor&);
void tile_linear(const TileKernels&, const LinearLayers&, const RowsView<const float>& input, float* const* outputs,
                 const Executor&);
void tile_mlp(const TileKernels&, const MLPLayers&, const RowsView<const float>& input, float* output,
              const Executor&);

}  // namespace optimum_chatglm_ov
