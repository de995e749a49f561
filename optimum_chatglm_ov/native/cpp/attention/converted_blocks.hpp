// SPDX-License-Identifier: Apache-2.0
// Blocks of the cache in other elements than they are stored in, but for scales without loss.
#pragma once

#include "attention/cache_layout.hpp"

namespace optimum_chatglm_ov {
namespace {

inline float to_float(uint8_t key) {
    return static_cast<float>(static_cast<int>(key) - Int8Block::kKeyOffset);
}
inline float to_float(int8_t value) {
    return static_cast<float>(value);
}

// The same in f32, each in a row of its own: what lies together here, n of them, lies n rows apart there.
template <class Stored>
void convert_block(const Stored* source, int64_t rows, int64_t count, float* __restrict target) {
    constexpr int64_t n = 4 / sizeof(Stored);
    for (int64_t r = 0; r < rows; r += n, source += n * count, target += n * count)
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < n; j++) target[j * count + i] = to_float(source[n * i + j]);
}

// From fours to pairs. Exact: bf16 has 8 significant bits.
template <class Stored>
void convert_block(const Stored* source, int64_t rows, int64_t count, bf16* __restrict target) {
    for (int64_t r = 0; r < rows; r += 4, source += 4 * count, target += 4 * count)
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < 4; j++)
                target[j / 2 * 2 * count + 2 * i + j % 2] = {
                    static_cast<uint16_t>(as_bits(to_float(source[4 * i + j])) >> 16)};
}

}  // namespace
}  // namespace optimum_chatglm_ov
