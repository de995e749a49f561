// SPDX-License-Identifier: Apache-2.0
// The instruction sets that there are kernels for, each in a source file of its own, and which of them computes.
//
// A new one is a file here, compiled for it alone (CMakeLists.txt), with functions that kernels.hpp declares, and a
// row of the table in instruction_sets.cpp: attention and linear layers find it there by its name and place.
#pragma once

#include <string>
#include <vector>

namespace optimum_chatglm_ov {

struct AttentionKernels;
struct LinearKernels;

struct InstructionSet {
    const char* name;
    const AttentionKernels* attention;  // null: it has none
    const LinearKernels* linear;        // likewise
};

// Those of this CPU, best first; the software model of AMX tiles is the last.
const std::vector<InstructionSet>& instruction_sets_of_cpu();

// What was asked for: `name`, else the environment variable CHATGLM_OV_ISA; null if neither names one. Throws
// std::invalid_argument, with the names there are, for one that this CPU does not have.
const InstructionSet* asked_instruction_set(const char* name);

// Names of those for which `has` is true, comma-separated.
template <class Has>
std::string names_of_instruction_sets(const Has& has) {
    std::string joined;
    for (const InstructionSet& set : instruction_sets_of_cpu())
        if (has(set)) joined += (joined.empty() ? "" : ",") + std::string(set.name);
    return joined;
}

}  // namespace optimum_chatglm_ov
