// SPDX-License-Identifier: Apache-2.0
#include "common/cpu_features.hpp"

#if defined(__x86_64__)
#    include <cpuid.h>
#endif
#if defined(__linux__)
#    include <sys/syscall.h>
#    include <unistd.h>
#endif

namespace optimum_chatglm_ov {
namespace {

#if defined(__x86_64__)
struct Registers {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
    Registers r;
    if (__get_cpuid_max(leaf & 0x80000000u, nullptr) >= leaf) __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
    return r;
}

// Register states that the operating system saves.
uint64_t enabled_states() {
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

bool is_amd() {
    const Registers r = cpuid(0, 0);
    return r.ebx == 0x68747541 && r.edx == 0x69746e65 && r.ecx == 0x444d4163;  // "Auth", "enti", "cAMD"
}

// The kernel grants a process the use of tile data on request, once for all its threads.
bool request_tiles() {
#    if defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#    else
    return false;
#    endif
}
#endif

CpuFeatures detect() {
    CpuFeatures f{};
    f.l2_bytes = 512 * 1024;
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
    const long l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (l2 > 0) f.l2_bytes = l2;
#endif
#if defined(__x86_64__)
    const auto bit = [](uint32_t value, int index) { return (value >> index & 1) != 0; };
    const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
    if (!bit(one.ecx, 27)) return f;  // no xgetbv
    const uint64_t states = enabled_states();
    const bool ymm = (states & 0x6) == 0x6, zmm = (states & 0xe6) == 0xe6, tiles = (states & 0x60000) == 0x60000;
    f.avx2 = ymm && bit(one.ecx, 12) && bit(one.ecx, 29) && bit(seven.ebx, 5);                     // FMA, F16C, AVX2
    f.avx512 = f.avx2 && zmm && bit(seven.ebx, 16) && bit(seven.ebx, 17) && bit(seven.ebx, 30) &&  // F, DQ, BW
               bit(seven.ebx, 31);                                                                 // VL
    f.avx2_vnni = f.avx2 && bit(seven_one.eax, 4);
    f.avx512_vnni = f.avx512 && bit(seven.ecx, 11);
    f.avx512_bf16 = f.avx512 && bit(seven_one.eax, 5);
    f.avx512_fp16 = f.avx512 && bit(seven.edx, 23);
    const bool may_use_tiles = tiles && bit(seven.edx, 24) && request_tiles();
    f.amx_int8 = f.avx512_bf16 && may_use_tiles && bit(seven.edx, 25);
    f.amx_bf16 = f.avx512_bf16 && may_use_tiles && bit(seven.edx, 22);
    f.bf16_dot_is_fast = f.avx512_bf16 && is_amd();
#endif
    return f;
}

}  // namespace

const CpuFeatures& cpu_features() {
    static const CpuFeatures features = detect();
    return features;
}

}  // namespace optimum_chatglm_ov
