// SPDX-License-Identifier: Apache-2.0
// All ways of linear layers on tiles, with the tile instructions or their model, and byte products for a row or two.
#pragma once

#include "linear/concepts.hpp"
#include "linear/lines.hpp"
#include "linear/tile_bytes.hpp"
#include "linear/tile_halves.hpp"
#include "linear/tile_linear.hpp"

namespace optimum_chatglm_ov {
namespace {

template <class Way>
constexpr TileWay tile_way() {
    static_assert(Way::kTaskPanels <= kMostPanels);
    return {Way::kRows,     Way::kTaskBlocks, Way::kTaskPanels,   Way::value_bytes,
            Way::sum_bytes, Way::pack,        Way::scratch_bytes, Way::multiply};
}

template <class Tiles, class Lines>
const LinearKernels* make_tile_linear_kernels(const LinearKernels* other) {
    static_assert(IsTiles<Tiles>::value, "Tiles lacks what simd/tiles.hpp lists");
    static_assert(IsLines<Lines>::value, "Lines lacks what linear/concepts.hpp lists");
    static_assert(IsTileVector<typename Lines::Vector>::value, "its Vector lacks what simd/vector.hpp lists");
    static const TileKernels tiles = {tile_way<TileLinear<Tiles, Lines>>(),
                                      tile_way<TileHalves<Tiles, Lines>>(),
                                      tile_way<TileBytes<Tiles, Lines, true>>(),
                                      tile_way<TileBytes<Tiles, Lines, false>>(),
                                      TileHalves<Tiles, Lines>::takes,
                                      [](const float* row, int64_t count) {
                                          return RowSize{Lines::largest(row, count), Lines::squares(row, count)};
                                      }};
    static const LinearKernels kernels = {other->bytes, &tiles};
    return &kernels;
}

}  // namespace
}  // namespace optimum_chatglm_ov
