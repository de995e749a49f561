// SPDX-License-Identifier: Apache-2.0
// The arithmetic of the products of attention on vectors, one class for each element.
#pragma once

#include <type_traits>
#include <utility>

#include "attention/cache_layout.hpp"
#include "simd/vector.hpp"

namespace optimum_chatglm_ov {

// What DotProducts asks of a class `Dot`:
//   kStored              the cache precision whose blocks are read as they are
//   Element, kPair       what queries, weights and blocks hold; how many of them one multiply-add reduces
//   Accumulator, kLanes  vector of f32 or i32 sums; Operand: kLanes x kPair elements
//   kRegisters           of the instruction set
//   kScoreRows           rows of queries held in registers against the 32 keys of a block
//   kValueVectors, kValueRows   vectors of channels, and rows, held in registers for weights x values
//   kPanelBlocks         cache blocks worked on at a time
//   zero(), load(elements), broadcast(kPair elements), add(sum, sum), store(scores, sum)
//   multiply_add_key(query, key, sum), multiply_add(weight, value, sum)
//   begin(output), end(output, sum, factor): before and after the sums of weights x values
template <class Dot, class = void>
struct IsDot : std::false_type {};
template <class Dot>
struct IsDot<Dot,
             decltype(void(Dot::kStored == CachePrecision::f32),
                      void(Dot::kPair + Dot::kLanes + Dot::kRegisters + Dot::kPanelBlocks),
                      void(Dot::kScoreRows + Dot::kValueVectors + Dot::kValueRows),
                      void(typename Dot::Accumulator(Dot::add(Dot::zero(), Dot::zero()))),
                      void(Dot::store(std::declval<float*>(),
                                      Dot::multiply_add_key(
                                          Dot::broadcast(std::declval<const typename Dot::Element*>()),
                                          Dot::load(std::declval<const typename Dot::Element*>()), Dot::zero()))),
                      void(Dot::end(std::declval<float*>(),
                                    Dot::multiply_add(Dot::broadcast(std::declval<const typename Dot::Element*>()),
                                                      Dot::load(std::declval<const typename Dot::Element*>()),
                                                      Dot::begin(std::declval<const float*>())),
                                    1.0f)))> : std::true_type {};

namespace {

// f32 multiply-adds over any vector type.
template <class Vector>
struct F32Dot {
    static constexpr CachePrecision kStored = CachePrecision::f32;
    using Element = float;
    using Accumulator = Vector;
    using Operand = Vector;
    static constexpr int kPair = 1;
    static constexpr int kLanes = Vector::kLanes;
    static constexpr int kPanelBlocks = 4;
    static constexpr int kRegisters = kLanes == 16 ? 32 : 16;
    static constexpr int kScoreRows = kLanes == 16 ? 8 : 3;
    static constexpr int kValueVectors = 2;
    static constexpr int kValueRows = kLanes == 16 ? 8 : 6;

    static Vector zero() { return Vector::all(0.0f); }
    static Vector load(const float* p) { return Vector::load(p); }
    static Vector broadcast(const float* p) { return Vector::all(*p); }
    static Vector multiply_add(Vector a, Vector b, Vector c) { return Vector::multiply_add(a, b, c); }
    static Vector multiply_add_key(Vector a, Vector b, Vector c) { return Vector::multiply_add(a, b, c); }
    static Vector add(Vector a, Vector b) { return Vector::add(a, b); }
    static void store(float* p, Vector v) { v.store(p); }
    static Vector begin(const float* output) { return Vector::load(output); }
    static void end(float* output, Vector sum, float) { sum.store(output); }
};

#if defined(__AVX512BF16__)
// vdpbf16ps: 16 sums of two bf16 products, accumulated in f32.
struct Bf16Dot {
    static constexpr CachePrecision kStored = CachePrecision::bf16;
    using Element = bf16;
    using Accumulator = __m512;
    using Operand = __m512bh;
    static constexpr int kPair = 2;
    static constexpr int kLanes = 16;
    static constexpr int kPanelBlocks = 8;
    static constexpr int kRegisters = 32;
    static constexpr int kScoreRows = 8;
    static constexpr int kValueVectors = 2;
    static constexpr int kValueRows = 8;

    static __m512 zero() { return _mm512_setzero_ps(); }
    static __m512bh load(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static __m512bh broadcast(const bf16* p) {
        int pair;
        std::memcpy(&pair, p, 4);
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    static __m512 multiply_add(__m512bh a, __m512bh b, __m512 c) { return _mm512_dpbf16_ps(c, a, b); }
    static __m512 multiply_add_key(__m512bh a, __m512bh b, __m512 c) { return _mm512_dpbf16_ps(c, a, b); }
    static __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
    static void store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
    static __m512 begin(const float* output) { return _mm512_loadu_ps(output); }
    static void end(float* output, __m512 sum, float) { _mm512_storeu_ps(output, sum); }
};
#endif

// vpdpbusd: sums of four products of unsigned and signed bytes, exact. Queries are signed and keys unsigned, weights
// unsigned and values signed.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
struct Int8Dot {
    static constexpr CachePrecision kStored = CachePrecision::i8;
    using Element = uint8_t;
    static constexpr int kPair = 4;
    static constexpr int kPanelBlocks = 4;
#    if defined(__AVX512VNNI__)
    using Vector = Avx512Vector;
    using Operand = __m512i;
    static constexpr int kRegisters = 32;
    static constexpr int kScoreRows = 8;
    static constexpr int kValueVectors = 2;
    static constexpr int kValueRows = 8;
    static constexpr int kLinearRows = 6;
    static constexpr int kWideRows = 2;
    static constexpr int kLinearVectors = 2;

    static Operand zero() { return _mm512_setzero_si512(); }
    static Operand load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static Operand all(int32_t x) { return _mm512_set1_epi32(x); }
    static Operand dot(Operand bytes, Operand signed_bytes, Operand c) {
        asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(bytes), "v"(signed_bytes));  // GCC 12 spills the intrinsic's sums
        return c;
    }
    static Operand add(Operand a, Operand b) { return _mm512_add_epi32(a, b); }
    static void store(float* p, Operand v) { _mm512_storeu_si512(p, v); }
    static Vector to_float(Operand v) { return {_mm512_cvtepi32_ps(v)}; }
    static Operand low_halves(Operand v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
    static Operand high_halves(Operand v) { return low_halves(_mm512_srli_epi16(v, 4)); }
    static Vector from_half(const f16* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    static Vector from_bytes(const uint8_t* p) {
        return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
    }
#    else
    using Vector = Avx2Vector;
    using Operand = __m256i;
    static constexpr int kRegisters = 16;
    static constexpr int kScoreRows = 3;
    static constexpr int kValueVectors = 2;
    static constexpr int kValueRows = 6;
    static constexpr int kLinearRows = 3;
    static constexpr int kWideRows = 1;
    static constexpr int kLinearVectors = 2;

    static Operand zero() { return _mm256_setzero_si256(); }
    static Operand load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static Operand all(int32_t x) { return _mm256_set1_epi32(x); }
    static Operand dot(Operand bytes, Operand signed_bytes, Operand c) {
        return _mm256_dpbusd_avx_epi32(c, bytes, signed_bytes);
    }
    static Operand add(Operand a, Operand b) { return _mm256_add_epi32(a, b); }
    static void store(float* p, Operand v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
    static Vector to_float(Operand v) { return {_mm256_cvtepi32_ps(v)}; }
    static Operand low_halves(Operand v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
    static Operand high_halves(Operand v) { return low_halves(_mm256_srli_epi16(v, 4)); }
    static Vector from_half(const f16* p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
    }
    static Vector from_bytes(const uint8_t* p) {
        return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
    }
#    endif
    using Accumulator = Operand;
    static constexpr int kLanes = Vector::kLanes;

    static Operand broadcast(const uint8_t* p) {
        int32_t four;
        std::memcpy(&four, p, 4);
        return all(four);
    }
    static Operand multiply_add(Operand weight, Operand value, Operand c) { return dot(weight, value, c); }
    static Operand multiply_add_key(Operand query, Operand key, Operand c) { return dot(key, query, c); }
    static Operand begin(const float*) { return zero(); }
    static void end(float* output, Operand sum, float factor) {
        Vector::multiply_add(to_float(sum), Vector::all(factor), Vector::load(output)).store(output);
    }
};
#endif

}  // namespace
}  // namespace optimum_chatglm_ov
