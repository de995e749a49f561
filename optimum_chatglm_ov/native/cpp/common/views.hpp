// SPDX-License-Identifier: Apache-2.0
// Rows of numbers that another owns.
#pragma once

#include <cstdint>

namespace optimum_chatglm_ov {

// `count` rows of numbers, `stride` elements apart.
template <class Element>
struct RowsView {
    Element* data;
    int64_t stride, count;

    RowsView part(int64_t first, int64_t rows) const { return {data + first * stride, stride, rows}; }
};

}  // namespace optimum_chatglm_ov
