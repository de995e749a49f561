// SPDX-License-Identifier: Apache-2.0
// Without instructions of any CPU in particular.
#include "attention/dot_products.hpp"
#include "attention/flash.hpp"
#include "isa/kernels.hpp"
#include "linear/byte_products.hpp"
#include "linear/lines.hpp"

namespace optimum_chatglm_ov {
namespace {

// The byte products of Int8Dot without special instructions.
struct PortableBytes {
    using Vector = PortableVector;
    struct Operand {
        int32_t lane[Vector::kLanes];
    };
    static constexpr int kLinearRows = 2;
    static constexpr int kWideRows = 1;
    static constexpr int kLinearVectors = 1;

    static Operand load(const uint8_t* p) {
        Operand r;
        std::memcpy(r.lane, p, sizeof(r.lane));
        return r;
    }
    static Operand all(int32_t x) {
        Operand r;
        for (int32_t& v : r.lane) v = x;
        return r;
    }
    static Operand dot(const Operand& bytes, const Operand& signed_bytes, Operand c) {
        for (int i = 0; i < Vector::kLanes; i++)
            for (int shift = 0; shift < 32; shift += 8)
                c.lane[i] += static_cast<uint8_t>(static_cast<uint32_t>(bytes.lane[i]) >> shift) *
                             static_cast<int8_t>(static_cast<uint32_t>(signed_bytes.lane[i]) >> shift);
        return c;
    }
    static Operand low_halves(Operand v) {
        for (int32_t& lane : v.lane) lane &= 0x0f0f0f0f;
        return v;
    }
    static Operand high_halves(Operand v) {
        for (int32_t& lane : v.lane) lane = static_cast<int32_t>(static_cast<uint32_t>(lane) >> 4 & 0x0f0f0f0fu);
        return v;
    }
    static Vector to_float(const Operand& v) {
        Vector r;
        for (int i = 0; i < Vector::kLanes; i++) r.lane[i] = static_cast<float>(v.lane[i]);
        return r;
    }
    static Vector from_half(const f16* p) { return PortableLines::from_half(p); }
    static Vector from_bytes(const uint8_t* p) { return PortableLines::from_bytes(p); }
};

}  // namespace

const AttentionKernels* portable_attention_kernels() {
    return make_attention_kernels<DotProducts<F32Dot<PortableVector>>, PortableVector>();
}

const LinearKernels* portable_linear_kernels() {
    return make_linear_kernels<PortableBytes>();
}

}  // namespace optimum_chatglm_ov
