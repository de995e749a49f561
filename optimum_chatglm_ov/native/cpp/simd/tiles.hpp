// SPDX-License-Identifier: Apache-2.0
// The thin tile interface of the AMX kernels and its two back ends.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "simd/vector.hpp"

namespace optimum_chatglm_ov {
namespace {

// The memory operand of ldtilecfg.
struct alignas(64) TileConfiguration {
    uint8_t palette = 0;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfiguration) == 64);

// What kernels ask of a class `Tiles`; T, A, B, C are tile numbers:
//   configure(configuration), release()
//   load<T>(base, stride), store<T>(base, stride), zero<T>(); load_streamed<T>(base, stride): what is read once leaves
//     the first-level cache to the rest
//   dot<C, A, B>() (tdpbf16ps), dot_signed_unsigned<C, A, B>() (tdpbsud), dot_unsigned_signed<C, A, B>() (tdpbusd)
template <class Tiles, class = void>
struct IsTiles : std::false_type {};
template <class Tiles>
struct IsTiles<Tiles,
               decltype(void(std::declval<Tiles&>().configure(std::declval<const TileConfiguration&>())),
                        void(std::declval<Tiles&>().release()), void(std::declval<Tiles&>().template zero<0>()),
                        void(std::declval<Tiles&>().template load<0>(std::declval<const void*>(), int64_t())),
                        void(std::declval<Tiles&>().template load_streamed<0>(std::declval<const void*>(), int64_t())),
                        void(std::declval<Tiles&>().template store<0>(std::declval<void*>(), int64_t())),
                        void(std::declval<Tiles&>().template dot<0, 1, 2>()),
                        void(std::declval<Tiles&>().template dot_signed_unsigned<0, 1, 2>()),
                        void(std::declval<Tiles&>().template dot_unsigned_signed<0, 1, 2>()))> : std::true_type {};

// A software model of the tile instructions, after the operation sections of the instruction reference: what a real
// CPU would refuse with #UD or #GP is a std::logic_error here.
class TileModel {
public:
    void configure(const TileConfiguration& c) {
        require(c.palette == 1, "palette");
        require(c.start_row == 0, "start_row");
        for (uint8_t byte : c.reserved) require(byte == 0, "reserved bytes");
        for (int t = 0; t < 16; t++) {
            require(t < kTiles || (c.rows[t] == 0 && c.row_bytes[t] == 0), "only 8 tiles");
            require(c.rows[t] <= kRows && c.row_bytes[t] <= kRowBytes, "rows or bytes of a row");
            require((c.rows[t] == 0) == (c.row_bytes[t] == 0), "rows without bytes");
        }
        configuration_ = c;
        std::memset(tiles_, 0, sizeof(tiles_));
    }

    void release() {
        configuration_ = TileConfiguration();
        std::memset(tiles_, 0, sizeof(tiles_));
    }

    template <int T>
    void load(const void* base, int64_t stride) {
        check(T);
        std::memset(tiles_[T], 0, sizeof(tiles_[T]));  // rows and bytes beyond the configuration read as zero
        for (int r = 0; r < configuration_.rows[T]; r++)
            std::memcpy(tiles_[T][r], static_cast<const uint8_t*>(base) + r * stride, configuration_.row_bytes[T]);
    }

    // For what will not be read again soon: it does not displace what the first-level cache holds.
    template <int T>
    void load_streamed(const void* base, int64_t stride) {
        load<T>(base, stride);
    }

    template <int T>
    void zero() {
        check(T);
        std::memset(tiles_[T], 0, sizeof(tiles_[T]));
    }

    template <int T>
    void store(void* base, int64_t stride) const {
        check(T);
        for (int r = 0; r < configuration_.rows[T]; r++)
            std::memcpy(static_cast<uint8_t*>(base) + r * stride, tiles_[T][r], configuration_.row_bytes[T]);
    }

    // Products of even and odd channels are summed apart with fused multiply-adds, added to each other, then to C.
    // Denormal inputs and results count as zero, rounding is to nearest even whatever MXCSR says.
    template <int C, int A, int B>
    void dot() {
        check_product<C, A, B>();
        const auto& k = configuration_;
        const int columns = k.row_bytes[C] / 4;
        for (int m = 0; m < k.rows[C]; m++) {
            float sums[2 * kRows] = {};
            for (int pair = 0; pair < k.row_bytes[A] / 4; pair++)
                for (int n = 0; n < columns; n++)
                    for (int odd = 0; odd < 2; odd++)
                        sums[2 * n + odd] =
                            flush(std::fma(flush(to_float(element(A, m, 2 * pair + odd))),
                                           flush(to_float(element(B, pair, 2 * n + odd))), sums[2 * n + odd]));
            for (int n = 0; n < columns; n++) {
                float c;
                std::memcpy(&c, tiles_[C][m] + 4 * n, 4);
                c = flush(flush(c) + flush(sums[2 * n] + sums[2 * n + 1]));
                std::memcpy(tiles_[C][m] + 4 * n, &c, 4);
            }
            std::memset(tiles_[C][m] + 4 * columns, 0, kRowBytes - 4 * columns);
        }
        for (int m = k.rows[C]; m < kRows; m++) std::memset(tiles_[C][m], 0, kRowBytes);
    }

    template <int C, int A, int B>
    void dot_signed_unsigned() {
        dot_bytes<C, A, B, int8_t, uint8_t>();
    }
    template <int C, int A, int B>
    void dot_unsigned_signed() {
        dot_bytes<C, A, B, uint8_t, int8_t>();
    }

private:
    static constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

    static void require(bool condition, const char* what) {
        if (!condition) throw std::logic_error(std::string("tile instruction refused: ") + what);
    }
    void check(int tile) const {
        require(configuration_.palette == 1, "tiles are not configured");
        require(configuration_.rows[tile] > 0, "tile is not configured");
    }
    template <int C, int A, int B>
    void check_product() const {
        static_assert(C != A && C != B && A != B, "a product needs three different tiles");
        check(A), check(B), check(C);
        const auto& k = configuration_;
        require(k.row_bytes[A] % 4 == 0 && k.row_bytes[B] % 4 == 0 && k.row_bytes[C] % 4 == 0, "bytes of a row");
        require(k.rows[C] == k.rows[A] && k.row_bytes[C] == k.row_bytes[B] && k.row_bytes[A] / 4 == k.rows[B],
                "shapes do not match");
    }

    // Sums of four products of bytes are added to i32 that wrap around.
    template <int C, int A, int B, class Left, class Right>
    void dot_bytes() {
        check_product<C, A, B>();
        const auto& k = configuration_;
        const int columns = k.row_bytes[C] / 4;
        for (int m = 0; m < k.rows[C]; m++) {
            for (int n = 0; n < columns; n++) {
                uint32_t c;
                std::memcpy(&c, tiles_[C][m] + 4 * n, 4);
                for (int i = 0; i < k.row_bytes[A]; i++)
                    c += static_cast<uint32_t>(static_cast<Left>(tiles_[A][m][i]) *
                                               static_cast<Right>(tiles_[B][i / 4][4 * n + i % 4]));
                std::memcpy(tiles_[C][m] + 4 * n, &c, 4);
            }
            std::memset(tiles_[C][m] + 4 * columns, 0, kRowBytes - 4 * columns);
        }
        for (int m = k.rows[C]; m < kRows; m++) std::memset(tiles_[C][m], 0, kRowBytes);
    }

    bf16 element(int tile, int row, int column) const {
        bf16 value;
        std::memcpy(&value, tiles_[tile][row] + 2 * column, 2);
        return value;
    }
    static float flush(float x) {
        const uint32_t bits = as_bits(x);
        return (bits & 0x7f800000u) == 0 ? as_float(bits & 0x80000000u) : x;
    }

    TileConfiguration configuration_;
    uint8_t tiles_[kTiles][kRows][kRowBytes] = {};
};
static_assert(IsTiles<TileModel>::value);

#if defined(__x86_64__)
// The instructions themselves, as assembly: no compiler flag is needed, and tile numbers can be template arguments.
class TileInstructions {
public:
    void configure(const TileConfiguration& c) { asm volatile("ldtilecfg %0" ::"m"(c)); }
    void release() { asm volatile("tilerelease" ::); }
    template <int T>
    void load(const void* base, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(base), "r"(stride), "i"(T) : "memory");
    }
    template <int T>
    void load_streamed(const void* base, int64_t stride) {
        asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(base), "r"(stride), "i"(T) : "memory");
    }
    template <int T>
    void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(T));
    }
    template <int T>
    void store(void* base, int64_t stride) const {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(base), "r"(stride), "i"(T) : "memory");
    }
    template <int C, int A, int B>
    void dot() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
    template <int C, int A, int B>
    void dot_signed_unsigned() {
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
    template <int C, int A, int B>
    void dot_unsigned_signed() {
        asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
};
static_assert(IsTiles<TileInstructions>::value);
#endif

}  // namespace
}  // namespace optimum_chatglm_ov
