// SPDX-License-Identifier: Apache-2.0
#include "isa/instruction_sets.hpp"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "common/cpu_features.hpp"
#include "isa/kernels.hpp"

namespace optimum_chatglm_ov {
namespace {

struct Row {
    const char* name;
    bool (*runs_on)(const CpuFeatures&);
    const AttentionKernels* (*attention)();
    const LinearKernels* (*linear)();
};

bool runs_anywhere(const CpuFeatures&) {
    return true;
}

const LinearKernels* no_linear() {
    return nullptr;
}

// Best first. Where the order follows from the CPU, a name has two rows, of which one runs.
const Row kTable[] = {
    {"amx", [](const CpuFeatures& cpu) { return cpu.amx_bf16 && cpu.amx_int8; }, amx_attention_kernels,
     amx_linear_kernels},
    {"avx512-vnni", [](const CpuFeatures& cpu) { return cpu.avx512_vnni; }, avx512_vnni_attention_kernels,
     avx512_vnni_linear_kernels},
    {"avx512-bf16", [](const CpuFeatures& cpu) { return cpu.avx512_bf16 && cpu.bf16_dot_is_fast; },
     avx512_bf16_attention_kernels, no_linear},
    {"avx512", [](const CpuFeatures& cpu) { return cpu.avx512; }, avx512_attention_kernels, no_linear},
    {"avx512-bf16", [](const CpuFeatures& cpu) { return cpu.avx512_bf16 && !cpu.bf16_dot_is_fast; },
     avx512_bf16_attention_kernels, no_linear},
    {"avx2-vnni", [](const CpuFeatures& cpu) { return cpu.avx2_vnni; }, avx2_vnni_attention_kernels,
     avx2_vnni_linear_kernels},
    {"avx2", [](const CpuFeatures& cpu) { return cpu.avx2; }, avx2_attention_kernels, no_linear},
    {"portable", runs_anywhere, portable_attention_kernels, portable_linear_kernels},
    {"amx-model", runs_anywhere, amx_model_attention_kernels, amx_model_linear_kernels},
};

}  // namespace

const std::vector<InstructionSet>& instruction_sets_of_cpu() {
    static const std::vector<InstructionSet> sets = [] {
        std::vector<InstructionSet> found;
        for (const Row& row : kTable) {
            if (!row.runs_on(cpu_features())) continue;
            const InstructionSet set{row.name, row.attention(), row.linear()};
            if (set.attention || set.linear) found.push_back(set);
        }
        return found;
    }();
    return sets;
}

const InstructionSet* asked_instruction_set(const char* name) {
    if (!name || !*name) name = std::getenv("CHATGLM_OV_ISA");
    if (!name || !*name) return nullptr;
    for (const InstructionSet& set : instruction_sets_of_cpu())
        if (std::strcmp(name, set.name) == 0) return &set;
    throw std::invalid_argument(std::string("CHATGLM_OV_ISA: ") + name + " is not one of " +
                                names_of_instruction_sets([](const InstructionSet&) { return true; }));
}

}  // namespace optimum_chatglm_ov
