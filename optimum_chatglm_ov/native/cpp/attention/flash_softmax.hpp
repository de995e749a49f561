// SPDX-License-Identifier: Apache-2.0
// From scores to weights: the softmax of one row over one panel.
#pragma once

#include "attention/flash_memory.hpp"
#include "simd/vector.hpp"

namespace optimum_chatglm_ov {
namespace {

constexpr float kWeightSteps = 255.0f;  // integer weights of a row are 0 .. kWeightSteps

template <class Vector>
void store_elements(float* target, Vector elements) {
    elements.store(target);
}
template <class Vector>
void store_elements(bf16* target, Vector elements) {
    elements.store_bf16(target);
}

template <class Products, class Vector>
class FlashSoftmax {
public:
    using Element = typename Products::Element;
    using Panel = FlashPanel<Products>;
    using Row = ScoreRow<Element>;

    // The first `count` blocks of the panel for a query that sees the keys before `limit`. Updates the running maximum
    // and sum, returns the factor by which what was summed before shrinks. Weights are 2^(score - maximum so far),
    // times the scale of the value. Integer ones are rounded relative to the largest of the row, which the row's
    // factor makes up for: what a row does not see changes nothing in it.
    static float weigh(const Panel& panel, int64_t count, int64_t limit, float scale, const Row& row) {
        float* const scores = row.scores;
        Element* const weights = row.weights;
        Vector largest = Vector::all(kHidden);
        uint32_t any_visible = 0;
        for (int64_t b = 0; b < count; b++) {
            const uint32_t visible = panel.visible_before(b, limit);
            any_visible |= visible;
            largest =
                finish_scores(scores + b * kBlockTokens, panel.key_scales[b], row.query_offset, visible, largest);
        }
        if (kInt8) scale *= row.query_scale;
        const float new_max = greater(row.max, largest.max_lane() * scale);
        const int64_t length = count * kBlockTokens;
        if (!any_visible) {
            std::memset(weights, 0, length * sizeof(Element));
            row.factor = row.rest = 0.0f;
            return 1.0f;
        }
        const Vector factor = Vector::all(scale), shift = Vector::all(-new_max);
        Vector sum = Vector::all(0.0f), largest_weight = sum;
        for (int64_t j = 0; j < length; j += kLanes) {
            const Vector w =
                Vector::template exp2<Exp2<kF32>>(Vector::multiply_add(Vector::load(scores + j), factor, shift));
            sum = Vector::add(sum, w);
            Vector scaled = w;
            if (kInt8 || panel.value_scales[0])
                scaled = Vector::multiply(w, Vector::load(panel.value_scales[j / kBlockTokens] + j % kBlockTokens));
            if constexpr (kInt8) {
                scaled.store(scores + j);
                largest_weight = Vector::maximum(largest_weight, scaled);
            } else {
                store_elements(weights + j, scaled);
            }
        }
        if constexpr (kInt8) round_weights(row, length, largest_weight.max_lane());
        const float shrink = row.max == new_max ? 1.0f : std::exp2(row.max - new_max);
        row.sum = row.sum * shrink + sum.sum_lanes();
        row.max = new_max;
        return shrink;
    }

private:
    static constexpr bool kF32 = Products::kStored == CachePrecision::f32;
    static constexpr bool kInt8 = Products::kStored == CachePrecision::i8;
    static constexpr int64_t kLanes = Vector::kLanes;

    // Scores of a block, with the scales of its keys, hidden ones at minus infinity; the largest so far of each lane.
    static Vector finish_scores(float* scores, const float* key_scales, float offset, uint32_t visible,
                                Vector largest) {
        if (kInt8 || key_scales)
            for (int64_t j = 0; j < kBlockTokens; j += kLanes) {
                Vector s;
                if constexpr (kInt8)
                    s = Vector::add(Vector::load_integers(scores + j), Vector::all(-offset));
                else
                    s = Vector::load(scores + j);
                Vector::multiply(s, Vector::load(key_scales + j)).store(scores + j);
            }
        if (visible != ~0u)
            for (int64_t j = 0; j < kBlockTokens; j++) scores[j] = (visible >> j & 1) ? scores[j] : kHidden;
        for (int64_t j = 0; j < kBlockTokens; j += kLanes)
            largest = Vector::maximum(largest, Vector::load(scores + j));
        return largest;
    }

    // Bytes in proportion to f32 weights, in the places of the scores, of which `largest` is the largest.
    static void round_weights(const Row& row, int64_t length, float largest) {
        const float* const exact = row.scores;
        Element* const weights = row.weights;
        const Vector steps = Vector::all(largest > 1e-30f ? kWeightSteps / largest : 0.0f);
        Vector rest = Vector::all(0.0f);
        for (int64_t j = 0; j < length; j += kLanes) {
            const Vector scaled = Vector::multiply(Vector::load(exact + j), steps), whole = Vector::round(scaled);
            whole.store_bytes(weights + j);
            rest = Vector::add(rest, Vector::subtract(scaled, whole));
        }
        row.factor = largest / kWeightSteps;
        row.rest = rest.sum_lanes();
    }
};

}  // namespace
}  // namespace optimum_chatglm_ov
