// SPDX-License-Identifier: Apache-2.0
// Random problems against a float64 reference, on every instruction set of this CPU: shapes, masks, prefixes, beam
// tables, cache precisions, activation types. Everything unwritten is NaN. Usage: fuzz_attention SEED COUNT LENGTH
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "attention.hpp"
#include "parallel.hpp"

using namespace optimum_chatglm_ov;

namespace {

class Threads final : public Executor {
public:
    explicit Threads(int64_t count) : count_(count) {}
    int64_t concurrency() const override { return count_; }
    void run(int64_t workers, void (*body)(void*), void* context) const override {
        std::vector<std::thread> threads;
        for (int64_t i = 1; i < workers; i++) threads.emplace_back(body, context);
        body(context);
        for (auto& t : threads) t.join();
    }

private:
    int64_t count_;
};

std::mt19937 generator;

int64_t uniform(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

float round_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u;
    std::memcpy(&x, &bits, 4);
    return x;
}

// Activations in either type, with a few elements of padding after each row.
struct Activations {
    std::vector<float> f32;
    std::vector<uint16_t> bf16;
    int64_t stride;
    Activations(int64_t rows, int64_t columns, bool is_bf16) : stride(columns + 3) {
        std::normal_distribution<float> normal;
        f32.assign(rows * stride, std::numeric_limits<float>::quiet_NaN());
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < columns; c++) f32[r * stride + c] = normal(generator);
        if (!is_bf16) return;
        for (float& x : f32) {
            x = x == x ? round_bf16(x) : x;
            uint32_t bits;
            std::memcpy(&bits, &x, 4);
            bf16.push_back(static_cast<uint16_t>(bits >> 16));
        }
    }
    const void* data() const { return bf16.empty() ? static_cast<const void*>(f32.data()) : bf16.data(); }
    float at(int64_t row, int64_t column) const { return f32[row * stride + column]; }
};

struct Problem {
    AttentionArguments a{};
    std::vector<uint8_t> key_cache, value_cache;
    std::vector<int32_t> beam_table, mask, context;
    std::vector<float> cos, sin;
    // What the cache must hold: [row][token][head][channel], after rotation.
    std::vector<float> keys, values;

    float& kept(std::vector<float>& cache, int64_t row, int64_t token, int64_t head, int64_t d) {
        const int64_t tokens = a.cache_blocks * kBlockTokens;
        return cache[((row * tokens + token) * a.num_key_value_heads + head) * a.head_dim + d];
    }

    std::vector<float> rotated(const Activations& x, int64_t batch, int64_t token, int64_t head) const {
        std::vector<float> row(a.head_dim);
        for (int64_t d = 0; d < a.head_dim; d++) row[d] = x.at(batch * a.query_length + token, head * a.head_dim + d);
        const int64_t half = a.rotary_dim / 2, at = batch * a.rotary_batch_stride + token * a.rotary_dim;
        const std::vector<float> in = row;
        for (int64_t d = 0; d < a.rotary_dim; d++)
            row[d] = in[d] * cos[at + d] + (d < half ? -in[d + half] : in[d - half]) * sin[at + d];
        return row;
    }
};

void fail(const Problem& p, const std::string& isa, const std::string& what) {
    const auto& a = p.a;
    std::printf("FAILED on %s: %s\n  batch %d new %d past %d heads %d/%d head_dim %d rotary %d cache %d type %d\n",
                isa.c_str(), what.c_str(), (int)a.batch, (int)a.query_length, (int)a.past_length,
                (int)a.num_attention_heads, (int)a.num_key_value_heads, (int)a.head_dim, (int)a.rotary_dim,
                (int)a.cache_precision, (int)a.activation_type);
    std::exit(1);
}

// Appends and attends `query_length` tokens; compares with the reference. Returns the relative error.
double step(Problem& p, const std::string& isa, int64_t threads, int64_t query_length) {
    auto& a = p.a;
    a.query_length = query_length;
    const bool is_bf16 = a.activation_type == ActivationType::bf16;
    const int64_t rows = a.batch * query_length, total = a.past_length + query_length;
    const Activations query(rows, a.num_attention_heads * a.head_dim, is_bf16);
    const Activations key(rows, a.num_key_value_heads * a.head_dim, is_bf16);
    const Activations value(rows, a.num_key_value_heads * a.head_dim, is_bf16);
    a.query = query.data(), a.key = key.data(), a.value = value.data();
    a.query_stride = query.stride, a.key_stride = key.stride, a.value_stride = value.stride;
    const bool shared = uniform(0, 1) != 0;
    const int64_t tables = shared ? 1 : a.batch;
    a.rotary_batch_stride = shared ? 0 : query_length * a.rotary_dim;
    p.cos.resize(tables * query_length * a.rotary_dim), p.sin.resize(p.cos.size());
    for (size_t i = 0; i < p.cos.size(); i++) {
        const double angle = std::uniform_real_distribution<double>(0, 6.28)(generator);
        p.cos[i] = std::cos(angle), p.sin[i] = std::sin(angle);
    }
    a.cos = p.cos.data(), a.sin = p.sin.data();
    // Exactly as long as needed, for the sanitizer to see any access beyond.
    std::vector<int32_t> mask, table;
    for (int64_t b = 0; b < a.batch; b++) {
        for (int64_t t = 0; t < total; t++) mask.push_back(p.mask[b * a.cache_blocks * kBlockTokens + t]);
        for (int64_t t = 0; t < a.past_length; t++)
            table.push_back(p.beam_table[b * a.cache_blocks * kBlockTokens + t]);
    }
    a.attention_mask = mask.data(), a.attention_mask_stride = total;
    a.beam_table = table.data(), a.beam_table_stride = a.past_length;
    a.context_length = p.context.empty() ? nullptr : p.context.data();
    const int64_t width = a.num_attention_heads * a.head_dim;
    std::vector<float> output(rows * width, std::numeric_limits<float>::quiet_NaN());
    std::vector<uint16_t> output_bf16(is_bf16 ? rows * width : 0, 0x7fc0);
    a.output = is_bf16 ? static_cast<void*>(output_bf16.data()) : output.data();

    fused_attention(a, Threads(threads), isa.c_str());

    if (is_bf16)
        for (size_t i = 0; i < output.size(); i++) {
            const uint32_t bits = static_cast<uint32_t>(output_bf16[i]) << 16;
            std::memcpy(&output[i], &bits, 4);
        }
    for (int64_t b = 0; b < a.batch; b++)
        for (int64_t t = 0; t < query_length; t++)
            for (int64_t h = 0; h < a.num_key_value_heads; h++) {
                const std::vector<float> k = p.rotated(key, b, t, h);
                for (int64_t d = 0; d < a.head_dim; d++) {
                    p.kept(p.keys, b, a.past_length + t, h, d) = k[d];
                    p.kept(p.values, b, a.past_length + t, h, d) = value.at(b * query_length + t, h * a.head_dim + d);
                }
            }
    double error = 0, norm = 0;
    const int64_t group = a.num_attention_heads / a.num_key_value_heads;
    for (int64_t b = 0; b < a.batch; b++)
        for (int64_t t = 0; t < query_length; t++)
            for (int64_t h = 0; h < a.num_attention_heads; h++) {
                const std::vector<float> q = p.rotated(query, b, t, h);
                std::vector<double> scores(total, -INFINITY), result(a.head_dim, 0.0);
                double largest = -INFINITY, sum = 0;
                const auto cache_row = [&](int64_t k) {
                    return k < a.past_length ? table[b * a.past_length + k] : b;
                };
                for (int64_t k = 0; k < total; k++) {
                    const int64_t context = p.context.empty() ? 0 : p.context[b];
                    if ((k >= context && k > a.past_length + t) || !mask[b * total + k]) continue;
                    double dot = 0;
                    for (int64_t d = 0; d < a.head_dim; d++)
                        dot += double(q[d]) * p.kept(p.keys, cache_row(k), k, h / group, d);
                    scores[k] = dot * a.scale;
                    largest = std::max(largest, scores[k]);
                }
                for (int64_t k = 0; k < total; k++) {
                    if (scores[k] == -INFINITY) continue;
                    const double w = std::exp(scores[k] - largest);
                    sum += w;
                    for (int64_t d = 0; d < a.head_dim; d++)
                        result[d] += w * p.kept(p.values, cache_row(k), k, h / group, d);
                }
                for (int64_t d = 0; d < a.head_dim; d++) {
                    const double expected = sum > 0 ? result[d] / sum : 0;
                    const double found = output[((b * query_length + t) * a.num_attention_heads + h) * a.head_dim + d];
                    if (!std::isfinite(found)) fail(p, isa, "output is not finite: memory was read beyond the tokens");
                    if (sum == 0 && found != 0) fail(p, isa, "a query that sees nothing must give zeros");
                    error += (found - expected) * (found - expected);
                    norm += expected * expected;
                }
            }
    a.past_length = total;
    return norm > 0 ? std::sqrt(error / norm) : 0;
}

double tolerance(const Problem& p, const std::string& isa) {
    if (p.a.cache_precision == CachePrecision::i8) return isa.find("vnni") != std::string::npos ? 3e-2 : 2e-2;
    if (p.a.cache_precision == CachePrecision::bf16 || isa.find("bf16") != std::string::npos) return 1e-2;
    return p.a.activation_type == ActivationType::bf16 ? 5e-3 : 2e-5;
}

double run_problem(const std::string& isa, int64_t longest) {
    static const int64_t heads[][2] = {{32, 2}, {32, 32}, {4, 2}, {4, 4}, {16, 1}, {6, 2}, {2, 2}};
    Problem p;
    auto& a = p.a;
    const auto& h = heads[uniform(0, 6)];
    a.num_attention_heads = h[0], a.num_key_value_heads = h[1];
    static const int64_t dims[] = {16, 64, 128, 32, 48, 96};
    do {
        a.head_dim = dims[uniform(0, 5)];
        a.cache_precision = static_cast<CachePrecision>(uniform(0, 2));
    } while (!takes(isa.c_str(), a.head_dim, a.cache_precision));
    a.rotary_dim = uniform(0, 4) == 0 ? 0 : a.head_dim / (uniform(0, 1) ? 1 : 2);
    a.scale = 1.0 / std::sqrt(double(a.head_dim));
    a.activation_type = uniform(0, 1) ? ActivationType::f32 : ActivationType::bf16;
    a.batch = uniform(1, a.num_attention_heads == 32 ? 2 : 4);
    const int64_t first = uniform(0, 2) ? uniform(1, longest) : uniform(1, 40);
    const int64_t steps = uniform(0, 3);
    std::vector<int64_t> lengths{first};
    int64_t total = first;
    for (int64_t s = 0; s < steps; s++) lengths.push_back(uniform(0, 2) ? 1 : uniform(1, 40)), total += lengths.back();
    a.cache_rows = a.batch + uniform(0, 1);
    a.cache_blocks = (total + kBlockTokens - 1) / kBlockTokens + uniform(0, 1);
    const int64_t tokens = a.cache_blocks * kBlockTokens;
    const size_t bytes = a.cache_rows * a.num_key_value_heads * a.cache_blocks *
                         cache_block_bytes(a.cache_precision, a.head_dim);
    p.key_cache.assign(bytes, 0xff), p.value_cache.assign(bytes, 0xff);  // NaN in f32 and in bf16
    a.key_cache = p.key_cache.data(), a.value_cache = p.value_cache.data();
    p.keys.assign(a.cache_rows * tokens * a.num_key_value_heads * a.head_dim, NAN), p.values = p.keys;
    p.mask.assign(a.batch * tokens, 1);
    const int64_t kind = uniform(0, 3);  // none, left padding, holes, all hidden in one row
    for (int64_t b = 0; b < a.batch; b++) {
        const int64_t padding = kind == 1 ? uniform(0, first) : kind == 3 && b == 0 ? total : 0;
        for (int64_t t = 0; t < tokens; t++)
            if (t < padding || (kind == 2 && uniform(0, 3) == 0)) p.mask[b * tokens + t] = 0;
    }
    if (uniform(0, 2) == 0)
        for (int64_t b = 0; b < a.batch; b++) p.context.push_back(uniform(0, first));
    p.beam_table.resize(a.batch * tokens);
    for (int64_t b = 0; b < a.batch; b++)
        for (int64_t t = 0; t < tokens; t++) p.beam_table[b * tokens + t] = b;
    const bool beams = uniform(0, 1) != 0;
    double worst = 0;
    for (int64_t length : lengths) {
        worst = std::max(worst, step(p, isa, uniform(1, 3), length));
        if (!beams) continue;
        const std::vector<int32_t> before = p.beam_table;
        for (int64_t b = 0; b < a.batch; b++) {
            const int64_t parent = uniform(0, a.batch - 1);
            for (int64_t t = 0; t < a.past_length; t++) p.beam_table[b * tokens + t] = before[parent * tokens + t];
        }
    }
    if (worst > tolerance(p, isa)) {
        char text[80];
        std::snprintf(text, sizeof(text), "relative error %.3g", worst);
        fail(p, isa, text);
    }
    return worst;
}

}  // namespace

int main(int argc, char** argv) {
    const unsigned seed = argc > 1 ? std::atoi(argv[1]) : 1;
    const int count = argc > 2 ? std::atoi(argv[2]) : 100;
    const int64_t length = argc > 3 ? std::atoi(argv[3]) : 200;
    std::stringstream names(instruction_sets());
    for (std::string isa; std::getline(names, isa, ',');) {
        generator.seed(seed);
        double worst = 0;
        for (int i = 0; i < count; i++) worst = std::max(worst, run_problem(isa, i % 16 == 15 ? 6 * length : length));
        std::printf("%s: %d problems, worst relative error %.2e\n", isa.c_str(), count, worst);
    }
    return 0;
}
