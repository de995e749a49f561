// SPDX-License-Identifier: Apache-2.0
// What the kernels of linear layers ask of the classes that compute.
#pragma once

#include <type_traits>
#include <utility>

#include "simd/vector.hpp"

namespace optimum_chatglm_ov {

// A class `Bytes`, of products of bytes, for ByteProducts:
//   Vector             f32 vectors; Operand: four bytes, or an i32 sum, in each of their lanes
//   kLinearRows, kLinearVectors   rows of activations held in registers, against as many vectors of columns
//   kWideRows          rows of 16-bit activations that cost no more than rows of 8 bits
//   load(bytes), all(four bytes), to_float(sums)
//   dot(bytes, signed bytes, sums): the sums with four products added to each
//   low_halves(bytes), high_halves(bytes)
//   from_half(numbers), from_bytes(integers): a vector of f16 numbers, or of bytes without sign
template <class Bytes, class = void>
struct IsBytes : std::false_type {};
template <class Bytes>
struct IsBytes<Bytes,
               decltype(void(Bytes::kLinearRows + Bytes::kLinearVectors + Bytes::kWideRows),
                        void(Bytes::to_float(Bytes::dot(Bytes::low_halves(Bytes::load(std::declval<const uint8_t*>())),
                                                        Bytes::high_halves(Bytes::all(0)), Bytes::all(0)))),
                        void(Bytes::from_half(std::declval<const f16*>())),
                        void(Bytes::from_bytes(std::declval<const uint8_t*>())))> : IsVector<typename Bytes::Vector> {
};

// Of the high and of the low bytes of some 16-bit integers.
struct WideSums {
    int32_t high, low;
};

// A class `Lines`, of conversions for tiles, 64 bytes at a time; what each does is said at PortableLines (lines.hpp):
//   Vector                                f32 vectors
//   from_half, from_bytes, difference, wide     to f32
//   pack, largest, squares, round_wide, round_bytes           activations
//   Totals, sums_of                       sums of the bytes that those two wrote, some in each lane
//   split_halves, convert_bytes, convert_halves, convert_scaled_bytes, convert_scaled_halves     weights
template <class Lines, class = void>
struct IsLines : std::false_type {};
template <class Lines>
struct IsLines<Lines,
               decltype(void(Lines::from_half(std::declval<const f16*>())),
                        void(Lines::from_bytes(std::declval<const uint8_t*>())),
                        void(Lines::difference(std::declval<const float*>(), int32_t())),
                        void(Lines::wide(std::declval<const float*>(), std::declval<const float*>())),
                        void(Lines::split_halves(std::declval<const uint8_t*>(), std::declval<uint8_t*>())),
                        void(Lines::pack(std::declval<const float*>(), std::declval<bf16*>(),
                                         std::declval<typename Lines::Vector&>())),
                        void(Lines::largest(std::declval<const float*>(), int64_t())),
                        void(Lines::squares(std::declval<const float*>(), int64_t())),
                        void(WideSums(Lines::sums_of(std::declval<typename Lines::Totals&>()))),
                        void(Lines::round_wide(std::declval<const float*>(), 1.0f, std::declval<int8_t*>(),
                                               std::declval<int8_t*>(), std::declval<typename Lines::Totals&>())),
                        void(Lines::round_bytes(std::declval<const float*>(), 1.0f, std::declval<int8_t*>(),
                                                std::declval<typename Lines::Totals&>())),
                        void(Lines::convert_bytes(std::declval<const uint8_t*>(), std::declval<const uint8_t*>(),
                                                  std::declval<bf16*>())),
                        void(Lines::convert_halves(std::declval<const uint8_t*>(), std::declval<bf16*>())),
                        void(Lines::convert_scaled_bytes(std::declval<const uint8_t*>(),
                                                         std::declval<const uint8_t*>(), std::declval<const f16*>(),
                                                         std::declval<const uint8_t*>(), std::declval<bf16*>())),
                        void(Lines::convert_scaled_halves(std::declval<const uint8_t*>(), std::declval<const f16*>(),
                                                          std::declval<const uint8_t*>(), std::declval<bf16*>())))>
    : IsVector<typename Lines::Vector> {};

}  // namespace optimum_chatglm_ov
