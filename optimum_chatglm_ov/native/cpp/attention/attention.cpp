// SPDX-License-Identifier: Apache-2.0
// The driver: checks arguments, picks the instruction set, divides the work among threads, merges partial results.
#include "attention/attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/kernel.hpp"
#include "common/parallel.hpp"
#include "isa/instruction_sets.hpp"
#include "isa/kernels.hpp"

namespace optimum_chatglm_ov {
namespace {

constexpr int64_t kMinBlocksPerSplit = 8;

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument("ChatGLMAttention: " + message);
}

void check_shapes(const AttentionArguments& a) {
    require(a.batch >= 1 && a.query_length >= 1 && a.past_length >= 0,
            "batch and query length must be at least 1 and the past length at least 0, found " +
                std::to_string(a.batch) + ", " + std::to_string(a.query_length) + ", " +
                std::to_string(a.past_length));
    require(
        a.num_key_value_heads >= 1 && a.num_attention_heads >= 1 && a.num_attention_heads % a.num_key_value_heads == 0,
        "num_attention_heads must be a multiple of num_key_value_heads");
    require(a.head_dim >= 16 && a.head_dim % 16 == 0 && a.head_dim <= kMaxHeadDim,
            "head_dim must be a multiple of 16 up to " + std::to_string(kMaxHeadDim) + ", found " +
                std::to_string(a.head_dim));
    require(a.rotary_dim >= 0 && a.rotary_dim % 2 == 0 && a.rotary_dim <= a.head_dim,
            "rotary_dim must be even and at most head_dim");
    const int64_t total = a.past_length + a.query_length, capacity = a.cache_blocks * kBlockTokens;
    require(total <= capacity, "the cache holds " + std::to_string(capacity) + " tokens, " + std::to_string(total) +
                                   " are needed: grow it before the inference");
    require(a.batch <= a.cache_rows,
            "the cache has " + std::to_string(a.cache_rows) + " rows, the batch " + std::to_string(a.batch));
}

void check_beam_table(const AttentionArguments& a) {
    // Negative where an entry is, or is beyond the last row; without a branch, for vectors.
    constexpr int32_t kLargest = std::numeric_limits<int32_t>::max();
    const int32_t last = static_cast<int32_t>(a.cache_rows - 1);
    for (int64_t b = 0; b < a.batch; b++) {
        const int32_t* rows = a.beam_table + b * a.beam_table_stride;
        int32_t signs = 0;
        for (int64_t t = 0; t < a.past_length; t++) signs |= rows[t] | (last - (rows[t] & kLargest));
        if (signs >= 0) continue;
        int64_t t = 0;
        while (rows[t] >= 0 && rows[t] <= last) t++;
        require(false, "beam_table[" + std::to_string(b) + ", " + std::to_string(t) + "] is " +
                           std::to_string(rows[t]) + ", the cache has rows 0 to " + std::to_string(last));
    }
}

bool accepts(const InstructionSet& set, const AttentionArguments& a) {
    return set.attention && set.attention->accepts(a.head_dim, a.cache_precision);
}

// The best, or the one that was asked for. A name that only linear layers know asks for nothing here.
const AttentionKernels& choose_kernels(const AttentionArguments& a, const char* name) {
    const InstructionSet* asked = asked_instruction_set(name);
    if (asked && asked->attention) {
        if (accepts(*asked, a)) return *asked->attention;
        const auto others = names_of_instruction_sets([&](const auto& set) { return accepts(set, a); });
        require(false, std::string("CHATGLM_OV_ISA: instruction set ") + asked->name + " does not take head_dim " +
                           std::to_string(a.head_dim) + " with a cache of " + name_of(a.cache_precision) +
                           "; these do: " + others);
    }
    for (const InstructionSet& set : instruction_sets_of_cpu())
        if (accepts(set, a)) return *set.attention;
    return *portable_attention_kernels();
}

// Of each thread: for a task, and, where it runs an inference, for the partial results of all tasks.
struct AttentionScratch {
    Buffer task, partials;
};

AttentionScratch& attention_scratch() {
    thread_local AttentionScratch scratch;
    return scratch;
}

bool is_constant(const int32_t* numbers, int64_t count) {
    return std::memcmp(numbers, numbers + 1, (count - 1) * sizeof(*numbers)) == 0;
}

// What each batch row sees of each cache block.
std::vector<BlockView> view_blocks(const AttentionArguments& a, int64_t blocks) {
    std::vector<BlockView> views(a.batch * blocks);
    const int64_t total = a.past_length + a.query_length;
    for (int64_t b = 0; b < a.batch; b++) {
        const int32_t* mask = a.attention_mask + b * a.attention_mask_stride;
        const int32_t* rows = a.beam_table + b * a.beam_table_stride;
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t first = block * kBlockTokens;
            const int64_t count = std::min(kBlockTokens, total - first);
            const int64_t past = std::min(std::max<int64_t>(a.past_length - first, 0), kBlockTokens);
            uint32_t visible = 0;
            if (count == kBlockTokens && is_constant(mask + first, count))
                visible = mask[first] ? ~0u : 0u;
            else
                for (int64_t j = 0; j < count; j++) visible |= static_cast<uint32_t>(mask[first + j] != 0) << j;
            const int32_t row = past > 0 ? rows[first] : static_cast<int32_t>(b);
            const bool in_one_row = (past == count || row == b) && (past == 0 || is_constant(rows + first, past));
            views[b * blocks + block] = {visible, in_one_row ? row : -1};
        }
    }
    return views;
}

void append(const AttentionArguments& a, const AttentionKernels& kernels, const Executor& executor) {
    // Parts end at block borders, so that no two threads write one cache line.
    const int64_t first_block = a.past_length / kBlockTokens;
    const int64_t parts = (a.past_length + a.query_length - 1) / kBlockTokens - first_block + 1;
    const int64_t heads = a.num_key_value_heads;
    const int64_t values = a.batch * a.query_length * heads * a.head_dim;
    const int64_t workers = values < 32768 ? 1 : executor.concurrency();
    parallel_for(executor, a.batch * heads * parts, workers, [&](int64_t i) {
        const int64_t block = first_block + i % parts;
        const int64_t first = std::max<int64_t>(block * kBlockTokens - a.past_length, 0);
        const int64_t last = std::min((block + 1) * kBlockTokens - a.past_length, a.query_length);
        kernels.append(a, i / parts / heads, i / parts % heads, first, last);
    });
}

// How the work is cut: queries of one task and number of parts of the keys.
struct Division {
    int64_t queries, query_parts, key_parts, blocks_per_part;
};

Division divide(const AttentionArguments& a, const AttentionKernels& kernels, int64_t blocks, int64_t concurrency) {
    const int64_t group = a.num_attention_heads / a.num_key_value_heads;
    // A task's queries and sums take a quarter of the second-level cache, beside a panel of keys and values.
    const int64_t cached_rows = cpu_features().l2_bytes / 4 / (a.head_dim * 6);
    const int64_t rows = std::min<int64_t>(std::max<int64_t>(cached_rows / 32 * 32, 32), kernels.max_rows);
    const int64_t heads = a.batch * a.num_key_value_heads, wanted = 4 * concurrency;
    Division d;
    d.queries = std::max<int64_t>(rows / group, 1);
    // Too few tasks: first fewer queries in each, down to the rows worked on at a time, then parts of the keys.
    const int64_t smallest = std::max<int64_t>(32 / group, 1);
    d.queries = std::max(std::min(d.queries, a.query_length * heads / wanted), smallest);
    d.queries = std::min(d.queries, a.query_length);
    d.query_parts = ceil_divide(a.query_length, d.queries);
    d.key_parts = 1;
    if (heads * d.query_parts < wanted && concurrency > 1)
        d.key_parts =
            std::max<int64_t>(std::min(ceil_divide(wanted, heads * d.query_parts), blocks / kMinBlocksPerSplit), 1);
    d.blocks_per_part = ceil_divide(blocks, d.key_parts);
    d.key_parts = ceil_divide(blocks, d.blocks_per_part);
    return d;
}

// What a task found in its part of the keys, for each of its rows.
struct Partial {
    float* output;  // [rows, head_dim]
    float* max;
    float* sum;
};

// The partial results of all tasks, those of a unit behind one another.
class Partials {
public:
    Partials(Buffer& memory, const Division& d, int64_t units, int64_t rows, int64_t head_dim)
        : parts_(d.key_parts), rows_(rows), head_dim_(head_dim) {
        if (parts_ > 1) memory_ = static_cast<float*>(memory.reserve(units * parts_ * rows * (head_dim + 2) * 4));
    }

    int64_t parts() const { return parts_; }
    Partial of(int64_t unit, int64_t part) const {
        float* output = memory_ + (unit * parts_ + part) * rows_ * (head_dim_ + 2);
        return {output, output + rows_ * head_dim_, output + rows_ * (head_dim_ + 1)};
    }

private:
    int64_t parts_, rows_, head_dim_;
    float* memory_ = nullptr;
};

// Sums of a row over the parts of the keys -> the row of the output.
void merge_row(const AttentionArguments& a, const Partials& partials, int64_t unit, int64_t row,
               int64_t output_offset) {
    float max = -std::numeric_limits<float>::infinity(), sum = 0;
    for (int64_t i = 0; i < partials.parts(); i++) max = std::max(max, partials.of(unit, i).max[row]);
    float merged[kMaxHeadDim] = {};
    for (int64_t i = 0; i < partials.parts(); i++) {
        const Partial p = partials.of(unit, i);
        if (p.max[row] == -std::numeric_limits<float>::infinity() && p.sum[row] == 0) continue;  // saw nothing
        const float factor = std::exp2(p.max[row] - max);
        const float* output = p.output + row * a.head_dim;
        for (int64_t d = 0; d < a.head_dim; d++) merged[d] += factor * output[d];
        sum += factor * p.sum[row];
    }
    const float inverse = sum > 0 ? 1.0f / sum : sum;
    for (int64_t d = 0; d < a.head_dim; d++) {
        const float value = merged[d] * inverse;
        if (a.activation_type == ActivationType::f32) {
            static_cast<float*>(a.output)[output_offset + d] = value;
        } else {
            static_cast<bf16*>(a.output)[output_offset + d] = to_bf16(value);
        }
    }
}

void attend(const AttentionArguments& a, const AttentionKernels& kernels, const Executor& executor) {
    const int64_t blocks = ceil_divide(a.past_length + a.query_length, kBlockTokens);
    const std::vector<BlockView> views = view_blocks(a, blocks);
    const Division d = divide(a, kernels, blocks, executor.concurrency());
    const int64_t group = a.num_attention_heads / a.num_key_value_heads, rows = d.queries * group;
    const int64_t units = a.batch * a.num_key_value_heads * d.query_parts;
    const size_t scratch_bytes = kernels.scratch_bytes(a, rows);
    const Partials partials(attention_scratch().partials, d, units, rows, a.head_dim);
    // Unit -> batch row, KV head, queries; the last queries see the most keys, so they go first.
    const auto describe = [&](int64_t unit) {
        AttendTask t{};
        const int64_t head = unit % (a.batch * a.num_key_value_heads);
        const int64_t part = d.query_parts - 1 - unit / (a.batch * a.num_key_value_heads);
        t.batch = head / a.num_key_value_heads;
        t.kv_head = head % a.num_key_value_heads;
        t.first_query = part * d.queries;
        t.last_query = std::min(t.first_query + d.queries, a.query_length);
        t.blocks = views.data() + t.batch * blocks;
        t.last_block = blocks;
        return t;
    };
    parallel_for(executor, units * d.key_parts, executor.concurrency(), [&](int64_t i) {
        AttendTask t = describe(i / d.key_parts);
        if (d.key_parts > 1) {
            const Partial p = partials.of(i / d.key_parts, i % d.key_parts);
            t.first_block = i % d.key_parts * d.blocks_per_part;
            t.last_block = std::min(t.first_block + d.blocks_per_part, blocks);
            t.partial_output = p.output, t.partial_max = p.max, t.partial_sum = p.sum;
        }
        kernels.attend(a, t, attention_scratch().task.reserve(scratch_bytes));
    });
    if (d.key_parts == 1) return;
    const int64_t all = units * rows, some = ceil_divide(all, 4 * executor.concurrency());
    const int64_t workers = all * d.key_parts * a.head_dim < 65536 ? 1 : executor.concurrency();
    parallel_for(executor, ceil_divide(all, some), workers, [&](int64_t part) {
        for (int64_t i = part * some; i < std::min((part + 1) * some, all); i++) {
            const int64_t unit = i / rows, row = i % rows;
            const AttendTask t = describe(unit);
            if (row >= (t.last_query - t.first_query) * group) continue;  // the last queries may be fewer
            const int64_t token = t.batch * a.query_length + t.first_query + row / group;
            const int64_t head = t.kv_head * group + row % group;
            merge_row(a, partials, unit, row, (token * a.num_attention_heads + head) * a.head_dim);
        }
    });
}

}  // namespace

const char* name_of(CachePrecision precision) {
    return precision == CachePrecision::f32 ? "f32" : precision == CachePrecision::bf16 ? "bf16" : "i8";
}

bool parse_cache_precision(const char* name, CachePrecision& precision) {
    for (CachePrecision p : {CachePrecision::f32, CachePrecision::bf16, CachePrecision::i8})
        if (std::strcmp(name, name_of(p)) == 0) {
            precision = p;
            return true;
        }
    return false;
}

const char* instruction_sets() {
    static const std::string names =
        names_of_instruction_sets([](const auto& set) { return set.attention != nullptr; });
    return names.c_str();
}

bool takes(const char* instruction_set, int64_t head_dim, CachePrecision precision) {
    for (const InstructionSet& set : instruction_sets_of_cpu())
        if (set.attention && std::strcmp(instruction_set, set.name) == 0)
            return set.attention->accepts(head_dim, precision);
    return false;
}

void append_to_cache(const AttentionArguments& a, const Executor& executor) {
    check_shapes(a);
    append(a, choose_kernels(a, nullptr), executor);
}

void fused_attention(const AttentionArguments& a, const Executor& executor, const char* instruction_set) {
    check_shapes(a);
    check_beam_table(a);
    const AttentionKernels& kernels = choose_kernels(a, instruction_set);
    append(a, kernels, executor);
    attend(a, kernels, executor);
}

}  // namespace optimum_chatglm_ov
