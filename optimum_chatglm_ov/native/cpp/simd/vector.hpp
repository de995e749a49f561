// SPDX-License-Identifier: Apache-2.0
// f32 vectors of one instruction set each. Included by one source file per instruction set, compiled with its own
// flags: everything has internal linkage, so that the linker never merges code of different instruction sets.
#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#include "common/elements.hpp"

#if defined(__AVX2__)
#    include <immintrin.h>
#endif

namespace optimum_chatglm_ov {

// What kernels ask of a class `Vector`, of kLanes f32:
//   load(p), all(x), store(p); load_integers(p): of i32 at p
//   add, subtract, multiply, divide (a, b), multiply_add(a, b, c) = a * b + c
//   maximum(a, b), minimum(a, b): a NaN of a stays in a minimum, one of b in a maximum
//   max_lane(), sum_lanes()
//   exp2<Polynomial>(x): 2^x for x below 127, to the polynomial's error, exactly 0 below -126.5; a NaN stays
//   round(x); store_bytes(p), store_signed_bytes(p): whole numbers as the nearest bytes, a NaN as some byte
template <class Vector, class = void>
struct IsVector : std::false_type {};
template <class Vector>
struct IsVector<
    Vector,
    decltype(void(Vector::kLanes), void(Vector::load(std::declval<const float*>()).store(std::declval<float*>())),
             void(Vector::all(0.0f)), void(Vector::load_integers(std::declval<const float*>())),
             void(Vector::add(std::declval<Vector>(),
                              Vector::subtract(std::declval<Vector>(), std::declval<Vector>()))),
             void(Vector::multiply(std::declval<Vector>(),
                                   Vector::divide(std::declval<Vector>(), std::declval<Vector>()))),
             void(Vector::multiply_add(std::declval<Vector>(), std::declval<Vector>(), std::declval<Vector>())),
             void(Vector::maximum(std::declval<Vector>(),
                                  Vector::minimum(std::declval<Vector>(), std::declval<Vector>()))),
             void(std::declval<Vector>().max_lane() + std::declval<Vector>().sum_lanes()),
             void(Vector::round(std::declval<Vector>()).store_bytes(std::declval<uint8_t*>())),
             void(std::declval<Vector>().store_signed_bytes(std::declval<int8_t*>())))> : std::true_type {};

// What kernels on bf16 tiles ask besides:
//   store_bf16(p); weight(x): 2^x for any x, to what bf16 holds; all_below(limit): whether all lanes are, NaNs are not
//   stream(p): as store, past the caches, p being a multiple of the vector's bytes; end_streams(): before another thread may read it
template <class Vector, class = void>
struct IsTileVector : std::false_type {};
template <class Vector>
struct IsTileVector<Vector, decltype(void(std::declval<Vector>().store_bf16(std::declval<bf16*>())),
                                     void(std::declval<Vector>().stream(std::declval<float*>())),
                                     void(Vector::end_streams()), void(Vector::weight(std::declval<Vector>())),
                                     void(std::declval<Vector>().all_below(0.0f)))> : IsVector<Vector> {};

namespace {

// Polynomials of least relative error for 2^f, |f| <= 1/2: 7e-8 (f32 arithmetic) and 7e-5 (what bf16 weights hold).
template <bool kF32>
struct Exp2;
template <>
struct Exp2<true> {
    static constexpr int kDegree = 5;
    static constexpr float kTerms[] = {1.00000007f,   0.693146932f,   0.240221347f,
                                       0.0555079955f, 0.00967505134f, 0.00132480495f};
};
template <>
struct Exp2<false> {
    static constexpr int kDegree = 3;
    static constexpr float kTerms[] = {0.999928073f, 0.693260985f, 0.242611125f, 0.0551716703f};
};

struct PortableVector {
    static constexpr int kLanes = 8;
    float lane[kLanes];

    static PortableVector load(const float* p) {
        PortableVector r;
        std::memcpy(r.lane, p, sizeof(r.lane));
        return r;
    }
    static PortableVector all(float x) {
        PortableVector r;
        for (float& v : r.lane) v = x;
        return r;
    }
    void store(float* p) const { std::memcpy(p, lane, sizeof(lane)); }
    static PortableVector multiply(PortableVector a, PortableVector b) {
        for (int i = 0; i < kLanes; i++) a.lane[i] *= b.lane[i];
        return a;
    }
    static PortableVector add(PortableVector a, PortableVector b) {
        for (int i = 0; i < kLanes; i++) a.lane[i] += b.lane[i];
        return a;
    }
    static PortableVector subtract(PortableVector a, PortableVector b) {
        for (int i = 0; i < kLanes; i++) a.lane[i] -= b.lane[i];
        return a;
    }
    static PortableVector multiply_add(PortableVector a, PortableVector b, PortableVector c) {
        for (int i = 0; i < kLanes; i++) c.lane[i] += a.lane[i] * b.lane[i];
        return c;
    }
    static PortableVector maximum(PortableVector a, PortableVector b) {
        for (int i = 0; i < kLanes; i++) a.lane[i] = a.lane[i] < b.lane[i] ? b.lane[i] : a.lane[i];
        return a;
    }
    static PortableVector minimum(PortableVector a, PortableVector b) {
        for (int i = 0; i < kLanes; i++) a.lane[i] = b.lane[i] < a.lane[i] ? b.lane[i] : a.lane[i];
        return a;
    }
    static PortableVector divide(PortableVector a, PortableVector b) {
        for (int i = 0; i < kLanes; i++) a.lane[i] /= b.lane[i];
        return a;
    }
    float max_lane() const {
        float m = lane[0];
        for (float v : lane) m = m < v ? v : m;
        return m;
    }
    float sum_lanes() const {
        float s = 0;
        for (float v : lane) s += v;
        return s;
    }
    bool all_below(float limit) const {
        bool all = true;
        for (float v : lane) all = all && v < limit;
        return all;
    }
    template <class Polynomial>
    static PortableVector exp2(PortableVector x) {
        for (float& v : x.lane) {
            const float clamped = v < -127.0f ? -127.0f : v > 128.0f ? 128.0f : v;
            const float whole = clamped == clamped ? std::nearbyint(clamped) : 0.0f;
            const float f = clamped - whole;
            float p = Polynomial::kTerms[Polynomial::kDegree];
            for (int i = Polynomial::kDegree - 1; i >= 0; i--) p = p * f + Polynomial::kTerms[i];
            v = p * as_float(static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23);
        }
        return x;
    }
    static PortableVector weight(PortableVector x) { return exp2<Exp2<false>>(x); }
    void stream(float* p) const { store(p); }
    static void end_streams() {}
    void store_bf16(bf16* p) const {
        for (int i = 0; i < kLanes; i++) p[i] = to_bf16(lane[i]);
    }
    static PortableVector round(PortableVector x) {
        for (float& v : x.lane) v = std::nearbyint(v);
        return x;
    }
    static PortableVector load_integers(const float* p) {
        PortableVector r;
        for (int i = 0; i < kLanes; i++) r.lane[i] = static_cast<float>(static_cast<int32_t>(as_bits(p[i])));
        return r;
    }
    // Whole numbers as bytes, the nearest of 0 .. 255; of a NaN some byte.
    void store_bytes(uint8_t* p) const {
        for (int i = 0; i < kLanes; i++)
            p[i] = lane[i] > 0.0f ? static_cast<uint8_t>(lane[i] < 255.0f ? lane[i] : 255.0f) : 0;
    }
    // Whole numbers -128 .. 127; of others some byte.
    void store_signed_bytes(int8_t* p) const {
        for (int i = 0; i < kLanes; i++) p[i] = lane[i] == lane[i] ? static_cast<int8_t>(lane[i]) : 0;
    }
};

static_assert(IsVector<PortableVector>::value && IsTileVector<PortableVector>::value);

#if defined(__AVX2__) && defined(__FMA__)
struct Avx2Vector {
    static constexpr int kLanes = 8;
    __m256 v;

    static Avx2Vector load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static Avx2Vector all(float x) { return {_mm256_set1_ps(x)}; }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    static Avx2Vector multiply(Avx2Vector a, Avx2Vector b) { return {_mm256_mul_ps(a.v, b.v)}; }
    static Avx2Vector add(Avx2Vector a, Avx2Vector b) { return {_mm256_add_ps(a.v, b.v)}; }
    static Avx2Vector subtract(Avx2Vector a, Avx2Vector b) { return {_mm256_sub_ps(a.v, b.v)}; }
    static Avx2Vector multiply_add(Avx2Vector a, Avx2Vector b, Avx2Vector c) {
        return {_mm256_fmadd_ps(a.v, b.v, c.v)};
    }
    static Avx2Vector maximum(Avx2Vector a, Avx2Vector b) { return {_mm256_max_ps(a.v, b.v)}; }
    static Avx2Vector minimum(Avx2Vector a, Avx2Vector b) { return {_mm256_min_ps(b.v, a.v)}; }  // a NaN in a stays
    static Avx2Vector divide(Avx2Vector a, Avx2Vector b) { return {_mm256_div_ps(a.v, b.v)}; }
    float max_lane() const {
        __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        m = _mm_max_ps(m, _mm_movehl_ps(m, m));
        return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
    }
    float sum_lanes() const {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
    }
    template <class Polynomial>
    static Avx2Vector exp2(Avx2Vector x) {
        const __m256 clamped = _mm256_max_ps(_mm256_set1_ps(-127.0f), x.v);  // in this order a NaN stays
        const __m256 whole = _mm256_round_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m256 f = _mm256_sub_ps(clamped, whole);
        __m256 p = _mm256_set1_ps(Polynomial::kTerms[Polynomial::kDegree]);
        for (int i = Polynomial::kDegree - 1; i >= 0; i--)
            p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(Polynomial::kTerms[i]));
        const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
        return {_mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
    }
    // i32 at `p`
    static Avx2Vector load_integers(const float* p) {
        return {_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    static Avx2Vector round(Avx2Vector x) {
        return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    }
    // Whole numbers as bytes, the nearest of 0 .. 255.
    void store_bytes(uint8_t* p) const {
        const __m256i whole = _mm256_cvtps_epi32(v);
        const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
    }
    // Whole numbers -128 .. 127; of others some byte.
    void store_signed_bytes(int8_t* p) const {
        const __m256i whole = _mm256_cvtps_epi32(v);
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
    }
};
static_assert(IsVector<Avx2Vector>::value);
#endif

#if defined(__AVX512F__)
struct Avx512Vector {
    static constexpr int kLanes = 16;
    __m512 v;

    static Avx512Vector load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Avx512Vector all(float x) { return {_mm512_set1_ps(x)}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    static Avx512Vector multiply(Avx512Vector a, Avx512Vector b) { return {_mm512_mul_ps(a.v, b.v)}; }
    static Avx512Vector add(Avx512Vector a, Avx512Vector b) { return {_mm512_add_ps(a.v, b.v)}; }
    static Avx512Vector subtract(Avx512Vector a, Avx512Vector b) { return {_mm512_sub_ps(a.v, b.v)}; }
    static Avx512Vector multiply_add(Avx512Vector a, Avx512Vector b, Avx512Vector c) {
        return {_mm512_fmadd_ps(a.v, b.v, c.v)};
    }
    static Avx512Vector maximum(Avx512Vector a, Avx512Vector b) { return {_mm512_max_ps(a.v, b.v)}; }
    static Avx512Vector minimum(Avx512Vector a, Avx512Vector b) { return {_mm512_min_ps(b.v, a.v)}; }  // a NaN stays
    static Avx512Vector divide(Avx512Vector a, Avx512Vector b) { return {_mm512_div_ps(a.v, b.v)}; }
    float max_lane() const { return _mm512_reduce_max_ps(v); }
    float sum_lanes() const { return _mm512_reduce_add_ps(v); }
    bool all_below(float limit) const {  // not so if one is a NaN
        return _mm512_cmp_ps_mask(v, _mm512_set1_ps(limit), _CMP_NLT_UQ) == 0;
    }
    template <class Polynomial>
    static Avx512Vector exp2(Avx512Vector x) {
        // Below -126.5 to zero, as on the other instruction sets: no denormal weights. A NaN stays.
        const __mmask16 counts = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.5f), _CMP_NLT_UQ);
        const __m512 whole = round(x).v, f = _mm512_sub_ps(x.v, whole);
        __m512 p = _mm512_set1_ps(Polynomial::kTerms[Polynomial::kDegree]);
        for (int i = Polynomial::kDegree - 1; i >= 0; i--)
            p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(Polynomial::kTerms[i]));
        return {_mm512_maskz_scalef_ps(counts, p, whole)};
    }
    // 2^x to 7e-5 for any x, by the least relative error for 2^f, 0 <= f < 1: two instructions fewer than exp2, but
    // small ones end in denormals.
    static Avx512Vector weight(Avx512Vector x) {
        const __m512 f = _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        __m512 p = _mm512_set1_ps(0.0780245244f);
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.226067157f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.695833537f));
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.999925219f));
        return {_mm512_scalef_ps(p, x.v)};
    }
    static Avx512Vector load_integers(const float* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }
    static Avx512Vector round(Avx512Vector x) {
        return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    }
    void store_bytes(uint8_t* p) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(v)));
    }
    // Whole numbers -128 .. 127; of others some byte.
    void store_signed_bytes(int8_t* p) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
    }
    void stream(float* p) const { _mm512_stream_ps(p, v); }
    static void end_streams() { _mm_sfence(); }
#    if defined(__AVX512BF16__)
    void store_bf16(bf16* p) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
    }
    static void store_bf16(bf16* p, Avx512Vector first, Avx512Vector second) {
        _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v));
    }
#    endif
};
static_assert(IsVector<Avx512Vector>::value);
#endif

}  // namespace
}  // namespace optimum_chatglm_ov
