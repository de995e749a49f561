// SPDX-License-Identifier: Apache-2.0
// The two matrix products of attention, as Flash asks for them.
#pragma once

#include <type_traits>
#include <utility>

#include "attention/cache_layout.hpp"
#include "common/views.hpp"

namespace optimum_chatglm_ov {

// Blocks of the keys or of the values of one head, in the layout of the cache.
template <class Element>
struct BlocksView {
    const Element* const* blocks;
    int64_t count, head_dim;
};

// Memory that will be read soon, to be brought closer meanwhile: `bytes` at each address.
struct AheadView {
    const uint8_t* addresses[2];
    int64_t bytes;
};

// What Flash asks of a class `Products` (DotProducts, ByteTileProducts):
//   Element        what queries, weights, and blocks of keys and values hold: float, bf16 or uint8_t
//   kStored        the cache precision whose blocks hold just that
//   kPanelBlocks   cache blocks worked on at a time
//   kRowMultiple   to which rows are padded
//   Session        what is set up for a task
//   accepts(head_dim)
//   scores(session, query, keys, scores): scores[r, 32 b + j] = query[r] . key j of block b; sums of bytes are i32
//   scores_ahead(session, query, keys, scores, ahead): the same for one block, while memory comes closer
//   accumulate(session, weights, factors, values, output): output[r] += sum of weights[r, key] * value[key] over the
//     keys of the blocks, times factors[r] if they are bytes; rows of the output are head_dim apart
template <class Products, class = void>
struct IsProducts : std::false_type {};
template <class Products>
struct IsProducts<
    Products, decltype(void(Products::kStored == CachePrecision::f32),
                       void(Products::kPanelBlocks + Products::kRowMultiple), void(Products::accepts(int64_t())),
                       void(Products::scores(std::declval<typename Products::Session&>(),
                                             std::declval<RowsView<const typename Products::Element>>(),
                                             std::declval<BlocksView<typename Products::Element>>(),
                                             std::declval<RowsView<float>>())),
                       void(Products::scores_ahead(std::declval<typename Products::Session&>(),
                                                   std::declval<RowsView<const typename Products::Element>>(),
                                                   std::declval<BlocksView<typename Products::Element>>(),
                                                   std::declval<RowsView<float>>(), std::declval<AheadView>())),
                       void(Products::accumulate(
                           std::declval<typename Products::Session&>(),
                           std::declval<RowsView<const typename Products::Element>>(), std::declval<const float*>(),
                           std::declval<BlocksView<typename Products::Element>>(), std::declval<float*>())))>
    : std::true_type {};

}  // namespace optimum_chatglm_ov
