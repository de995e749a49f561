// SPDX-License-Identifier: Apache-2.0
// Times linear layers below OpenVINO, each instruction set in turn,
// or that of the variable CHATGLM_OV_ISA:
//   bench_linear IN OUT BITS GROUP THREADS MEGABYTES ROWS [ROWS ...]
// GROUP 0: one scale a row. MEGABYTES of weights, at least, are read before a layer is used again: more than the last
// cache holds tells what memory allows. Each figure is the best of the runs; memory is read in order by as many
// threads just before, and the largest number of multiply-adds a second is that of tile products in registers.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "bench/peaks.hpp"
#include "fuzzing.hpp"
#include "linear/linear.hpp"
#include "timing.hpp"

using namespace optimum_chatglm_ov;

int main(int argc, char** argv) {
    if (argc < 8) return std::fprintf(stderr, "usage: %s IN OUT BITS GROUP THREADS MEGABYTES ROWS ...\n", argv[0]), 2;
    const int64_t in = std::atol(argv[1]), out = std::atol(argv[2]), bits = std::atol(argv[3]);
    const int64_t group = std::atol(argv[4]) ? std::atol(argv[4]) : in;
    const Pool pool(std::atol(argv[5]));
    const LinearFormat format{in, bits, group, 32};
    if (const char* error = linear_format_error(format, out)) return std::fprintf(stderr, "%s\n", error), 2;
    const int64_t bytes = out / kPanelColumns * panel_bytes(format);
    const int64_t layers = std::max<int64_t>(std::atol(argv[6]) * 1000000 / bytes, 1);
    uint8_t* memory = static_cast<uint8_t*>(allocate_weights(layers * bytes));
    {
        std::vector<uint8_t> integers(out * in * bits / 8), zeros(out * in / group, bits == 8 ? 128 : 8);
        for (uint8_t& v : integers) v = static_cast<uint8_t>(generator());
        const std::vector<f16> scales(out * in / group, f16{0x2000});
        for (int64_t i = 0; i < layers; i++)
            pack_linear(format, {out, integers.data(), 0, scales.data(), zeros.data(), nullptr}, memory + i * bytes);
    }
    std::printf("%ld x %ld, %ld bits, groups of %ld, %ld threads, %ld layers of %.1f MB\n", long(in), long(out),
                long(bits), long(group), long(pool.concurrency()), long(layers), bytes / 1e6);
    const char* only = std::getenv("CHATGLM_OV_ISA");
    std::vector<float> output;
    for (int i = 7; i < argc; i++) {
        const int64_t rows = std::atol(argv[i]);
        std::vector<float> input(rows * in);
        for (float& v : input) v = float(int64_t(generator()) - (1ll << 31)) / float(1ll << 31);
        output.resize(rows * out);
        const double peak = peak_operations("tile-bf16", pool), stream = stream_rate(pool, memory, layers * bytes);
        std::stringstream names(linear_instruction_sets());
        for (std::string name; std::getline(names, name, ',');) {
            if (only ? name != only : name == "portable" || name == "amx-model") continue;
            int64_t layer = 0;
            const double seconds = best_seconds(0.4, [&] {
                const LinearWeights weights{out, memory + layer++ % layers * bytes};
                float* target = output.data();
                linear({format, &weights, 1}, {input.data(), in, rows}, &target, pool, name.c_str());
            });
            const double flops = 2.0 * double(rows * in * out) / seconds;
            std::printf("%6ld rows  %-12s %9.3f ms  %6.2f TFLOP/s (%3.0f %% of %.2f)  %6.1f GB/s (%3.0f %% of %.1f)\n",
                        long(rows), name.c_str(), seconds * 1e3, flops / 1e12, 100 * flops / peak, peak / 1e12,
                        bytes / seconds / 1e9, 100 * bytes / seconds / stream, stream / 1e9);
        }
    }
}
