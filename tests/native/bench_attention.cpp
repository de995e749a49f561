// SPDX-License-Identifier: Apache-2.0
// Times the attention of one layer below OpenVINO, on every instruction set of this CPU that is no model of another:
// a whole prompt, and one token after as many others, with each cache. Best of a few, all taken in turns, so that
// other load on the machine hits them alike.
// Usage: bench_attention [THREADS [TOKENS [SECONDS [NAMES]]]], NAMES part of the printed names, empty for all
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "attention/attention.hpp"
#include "attention/kernel.hpp"
#include "bench/peaks.hpp"
#include "common/parallel.hpp"

using namespace optimum_chatglm_ov;

namespace {

constexpr int64_t kHeads = 32, kHeadDim = 128, kRotaryDim = 64, kDecodeLayers = 8;
constexpr double kSlow = 2.0;  // seconds; what takes longer runs once

// Threads that wait for work without sleeping: starting one takes as long as a token's attention.
class Pool final : public Executor {
public:
    explicit Pool(int64_t count) {
        for (int64_t i = 1; i < count; i++) threads_.emplace_back([this, i] { serve(i); });
    }
    ~Pool() {
        workers_ = 0;
        round_++;
        for (auto& t : threads_) t.join();
    }
    int64_t concurrency() const override { return threads_.size() + 1; }
    void run(int64_t workers, void (*body)(void*), void* context) const override {
        body_ = body, context_ = context, workers_ = workers, busy_ = threads_.size();
        round_++;
        body(context);
        while (busy_) std::this_thread::yield();
    }

private:
    void serve(int64_t i) {
        for (int64_t seen = 0;;) {
            while (round_ == seen) std::this_thread::yield();
            seen = round_;
            if (workers_ == 0) return;
            if (i < workers_) body_(context_);
            busy_--;
        }
    }
    std::vector<std::thread> threads_;
    mutable std::atomic<int64_t> round_{0}, busy_{0}, workers_{0};
    mutable void (*body_)(void*) = nullptr;
    mutable void* context_ = nullptr;
};

double seconds_of(const std::function<void()>& call) {
    const auto start = std::chrono::steady_clock::now();
    call();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Layer {
    Buffer keys, values;
};

// Everything of one call, and its caches; each call takes the next layer's.
struct Problem {
    AttentionArguments a{};
    std::vector<float> query, key, value, cos, sin, output;
    std::vector<int32_t> beam_table, mask;
    std::vector<Layer> layers;
    size_t bytes, next = 0;  // bytes of one cache

    Problem(int64_t kv_heads, int64_t tokens, int64_t past, CachePrecision precision) {
        std::mt19937 generator;
        std::normal_distribution<float> normal;
        const auto random = [&](int64_t count) {
            std::vector<float> numbers(count);
            for (int64_t i = 0; i < count; i++) numbers[i] = i < 1 << 20 ? normal(generator) : numbers[i - (1 << 20)];
            return numbers;
        };
        query = random(tokens * kHeads * kHeadDim), output = query;
        key = random(tokens * kv_heads * kHeadDim), value = random(tokens * kv_heads * kHeadDim);
        cos.assign(tokens * kRotaryDim, 0.6f), sin.assign(tokens * kRotaryDim, 0.8f);
        beam_table.assign(past, 0), mask.assign(past + tokens, 1);
        a.batch = a.cache_rows = 1, a.query_length = tokens, a.past_length = past;
        a.num_attention_heads = kHeads, a.num_key_value_heads = kv_heads;
        a.head_dim = kHeadDim, a.rotary_dim = kRotaryDim, a.scale = 0.0883883f;
        a.cache_precision = precision, a.activation_type = ActivationType::f32;
        a.query = query.data(), a.key = key.data(), a.value = value.data(), a.output = output.data();
        a.query_stride = kHeads * kHeadDim, a.key_stride = a.value_stride = kv_heads * kHeadDim;
        a.cos = cos.data(), a.sin = sin.data();
        a.cache_blocks = (past + tokens + kBlockTokens - 1) / kBlockTokens;
        a.beam_table = beam_table.data(), a.beam_table_stride = past;
        a.attention_mask = mask.data(), a.attention_mask_stride = past + tokens;
        bytes = kv_heads * a.cache_blocks * cache_block_bytes(precision, kHeadDim);
        for (int64_t i = 0; i < (past ? kDecodeLayers : 1); i++) {
            layers.emplace_back();
            std::memset(layers[i].keys.reserve(bytes), 0, bytes);
            std::memset(layers[i].values.reserve(bytes), 0, bytes);
            if (past) append(random(past * a.key_stride), layers[i]);
        }
    }

    void use(AttentionArguments& arguments, Layer& layer) const {
        arguments.key_cache = static_cast<uint8_t*>(layer.keys.reserve(bytes));
        arguments.value_cache = static_cast<uint8_t*>(layer.values.reserve(bytes));
    }

    // Keys and values of the past.
    void append(const std::vector<float>& numbers, Layer& layer) const {
        AttentionArguments before = a;
        before.query_length = a.past_length, before.past_length = 0, before.rotary_dim = 0;
        before.key = before.value = numbers.data();
        use(before, layer);
        append_to_cache(before, Pool(1));
    }

    double seconds(const Executor& executor, const char* instruction_set) {
        use(a, layers[next]);
        next = (next + 1) % layers.size();
        return seconds_of([&] { fused_attention(a, executor, instruction_set); });
    }

    double flops() const {
        const double n = a.query_length, pairs = n * a.past_length + n * (n + 1) / 2;
        return 4 * pairs * kHeads * kHeadDim;
    }
    double cache_bytes() const { return bytes * 2.0; }
};

struct Row {
    std::string name, instruction_set;
    Problem* problem;
    double best = 1e9;
};

}  // namespace

int main(int argc, char** argv) {
    const int64_t threads = argc > 1 ? std::atol(argv[1]) : std::thread::hardware_concurrency();
    const int64_t tokens = argc > 2 ? std::atol(argv[2]) : 8192;
    const double budget = argc > 3 ? std::atof(argv[3]) : 20;
    const std::string wanted = argc > 4 ? argv[4] : "";
    const Pool pool(threads);
    std::vector<Problem> problems;
    problems.reserve(8);
    std::vector<Row> rows;
    for (const int64_t kv_heads : {2, 32})
        for (const int64_t past : {int64_t{0}, tokens})
            for (const CachePrecision precision : {CachePrecision::bf16, CachePrecision::i8}) {
                std::stringstream names(instruction_sets());
                std::vector<Row> found;
                for (std::string name; std::getline(names, name, ',');) {
                    const std::string title = std::string(kv_heads == 2 ? "chatglm3" : "chatglm-6b") +
                                              (past ? " token " : " prompt ") +
                                              (precision == CachePrecision::bf16 ? "bf16 " : "i8 ") + name;
                    if (name == "portable" || name == "amx-model" || title.find(wanted) == std::string::npos ||
                        !takes(name.c_str(), kHeadDim, precision))
                        continue;
                    found.push_back({title, name, nullptr});
                }
                if (found.empty()) continue;
                problems.emplace_back(kv_heads, past ? 1 : tokens, past, precision);
                for (Row& row : found) row.problem = &problems.back(), rows.push_back(row);
            }
    double peak = 0;
    const auto start = std::chrono::steady_clock::now();
    do {
        peak = std::max(peak, peak_operations("tile-bf16", pool) * 1e-12);
        for (Row& row : rows) {
            if (row.best < 1e9 && row.best > kSlow) continue;
            for (size_t i = 0; i <= row.problem->layers.size(); i++)  // the first warms up
                row.best = std::min(row.best, row.problem->seconds(pool, row.instruction_set.c_str()));
        }
    } while (std::chrono::steady_clock::now() - start < std::chrono::duration<double>(budget));
    std::printf("%d threads, %d tokens, bf16 tile peak %.2f TFLOP/s\n", (int)threads, (int)tokens, peak);
    for (const Row& row : rows) {
        const double flops = row.problem->flops() / row.best * 1e-12;
        std::printf("%-36s %9.3f ms %7.3f TFLOP/s", row.name.c_str(), row.best * 1e3, flops);
        if (peak > 0) std::printf(" %5.1f %% of the peak", flops / peak * 100);
        std::printf(" %7.1f GB/s\n", row.problem->cache_bytes() / row.best * 1e-9);
    }
}
