// SPDX-License-Identifier: Apache-2.0
// The 16-bit floating-point numbers, as types of their own: neither is taken for the other or for an integer.
#pragma once

#include <cstdint>
#include <cstring>

namespace optimum_chatglm_ov {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};
static_assert(sizeof(bf16) == 2 && sizeof(f16) == 2);

namespace {  // not merged across instruction sets

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// Round to nearest even; a NaN stays a NaN.
inline bf16 to_bf16(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded)};
}

inline float to_float(bf16 value) {
    return as_float(static_cast<uint32_t>(value.bits) << 16);
}

}  // namespace
}  // namespace optimum_chatglm_ov
