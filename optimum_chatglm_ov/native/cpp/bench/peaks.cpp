// SPDX-License-Identifier: Apache-2.0
#include "bench/peaks.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "common/cpu_features.hpp"
#include "common/parallel.hpp"
#include "simd/tiles.hpp"

namespace optimum_chatglm_ov {
namespace {

constexpr int kRuns = 20;  // each of a few milliseconds

struct Peak {
    PeakLoop loop = nullptr;
    double step_operations = 0;
    int64_t steps = 0;
};

#if defined(__x86_64__)
constexpr int64_t kVectorSteps = 2000000, kTileSteps = 200000, kTileSums = 4;

void avx2_loop(int64_t steps) {
    CHATGLM_PEAK_PRODUCTS(steps, "vfmadd231ps", "ymm");
}

void avx512_loop(int64_t steps) {
    CHATGLM_PEAK_PRODUCTS(steps, "vfmadd231ps", "zmm");
}

void avx512_vnni_loop(int64_t steps) {
    CHATGLM_PEAK_PRODUCTS(steps, "vpdpbusd", "zmm");
}

template <bool Bytes>
void tile_loop(int64_t steps) {
    TileInstructions tiles;
    TileConfiguration c;
    c.palette = 1;
    for (int t = 0; t < 8; t++) c.rows[t] = 16, c.row_bytes[t] = 64;
    tiles.configure(c);
    // Numbers near one, with other bits in each: CPUs multiply tiles of zeros with a fifth higher frequency.
    alignas(64) uint8_t numbers[1024];
    uint32_t state = 1;
    for (int i = 0; i < 1024; i += 2) {
        state = state * 1664525 + 1013904223;
        const uint32_t bits = 0x3f00 | (state >> 16 & 0x80ff);  // as bf16
        numbers[i] = static_cast<uint8_t>(bits), numbers[i + 1] = static_cast<uint8_t>(bits >> 8);
    }
    tiles.load<4>(numbers, 64), tiles.load<5>(numbers, 64), tiles.load<6>(numbers, 64), tiles.load<7>(numbers, 64);
    for (int64_t i = 0; i < steps; i++)
        if constexpr (Bytes) {
            tiles.dot_unsigned_signed<0, 4, 6>(), tiles.dot_unsigned_signed<1, 4, 7>();
            tiles.dot_unsigned_signed<2, 5, 6>(), tiles.dot_unsigned_signed<3, 5, 7>();
        } else {
            tiles.dot<0, 4, 6>(), tiles.dot<1, 4, 7>(), tiles.dot<2, 5, 6>(), tiles.dot<3, 5, 7>();
        }
    tiles.release();
}

Peak vector_peak(PeakLoop loop, int64_t products) {
    return {loop, 2.0 * kPeakSums * products, kVectorSteps};
}

Peak tile_peak(PeakLoop loop, int64_t products) {
    return {loop, 2.0 * kTileSums * products, kTileSteps};
}

Peak find_peak(const char* kind) {
    const CpuFeatures& cpu = cpu_features();
    const auto is = [&](const char* name) { return std::strcmp(kind, name) == 0; };
    if (is("tile-bf16") && cpu.amx_bf16) return tile_peak(tile_loop<false>, 16 * 16 * 32);
    if (is("tile-int8") && cpu.amx_int8) return tile_peak(tile_loop<true>, 16 * 16 * 64);
    if (is("vnni-int8") && cpu.avx512_vnni) return vector_peak(avx512_vnni_loop, 64);
    if (is("vnni-int8") && cpu.avx2_vnni) return vector_peak(avx2_vnni_peak_loop(), 32);
    if (is("f32") && cpu.avx512) return vector_peak(avx512_loop, 16);
    if (is("f32") && cpu.avx2) return vector_peak(avx2_loop, 8);
    return {};
}
#else
Peak find_peak(const char*) {
    return {};
}
#endif

}  // namespace

double peak_operations(const char* kind, const Executor& executor) {
    const Peak peak = find_peak(kind);
    if (!peak.loop) return 0;
    const int64_t threads = executor.concurrency();
    double best = 0;
    for (int run = 0; run < kRuns; run++) {
        const auto start = std::chrono::steady_clock::now();
        parallel_for(executor, threads, threads, [&](int64_t) { peak.loop(peak.steps); });
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        best = std::max(best, peak.step_operations * double(peak.steps * threads) / seconds.count());
    }
    return best;
}

}  // namespace optimum_chatglm_ov
