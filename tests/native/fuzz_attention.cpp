// SPDX-License-Identifier: Apache-2.0
// Random problems against a float64 reference, on every instruction set of this CPU: shapes, masks, prefixes, beam
// tables, cache precisions, activation types, loud tokens, scores that rise without end. Everything unwritten is NaN.
// Usage: fuzz_attention SEED COUNT LENGTH [PAST]: up to LENGTH new tokens at once; with PAST in the shapes of the
// ChatGLM models, after up to PAST others. Each problem has a seed of its own: SEED, SEED + 1, ...
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "attention/attention.hpp"
#include "fuzzing.hpp"

using namespace optimum_chatglm_ov;

namespace {

// Bounds of the time and memory of a problem: numbers in a cache of keys, multiplications of a step's reference (which
// computes as many rows as that allows), and of a step where the arithmetic is slow.
constexpr int64_t kCached = 1 << 24, kReferenceProducts = 1 << 25;
constexpr int64_t kPortableProducts = 1 << 30, kModelProducts = 1 << 27;  // of long sequences
constexpr int64_t kShort = 64;  // by how much fewer of short ones, which run under the sanitizers
constexpr float kLoud = 30;
constexpr int64_t kRise = 24, kRises = 6;  // tokens after which keys become twice as large, and how often they do

// Activations in either type, with a few elements of padding after each row; one row in `rarity` is `loudness` times
// larger.
struct Activations {
    std::vector<float> f32;
    std::vector<bf16> half;
    int64_t stride;
    Activations(int64_t rows, int64_t columns, bool is_bf16, float loudness = 1, int64_t rarity = 1)
        : stride(columns + 3) {
        std::normal_distribution<float> normal;
        f32.assign(rows * stride, std::numeric_limits<float>::quiet_NaN());
        for (int64_t r = 0; r < rows; r++) {
            const float factor = uniform(1, rarity) == 1 ? loudness : 1;
            for (int64_t c = 0; c < columns; c++) f32[r * stride + c] = factor * normal(generator);
        }
        if (!is_bf16) return;
        for (float& x : f32) x = x == x ? to_float(to_bf16(x)) : x;
        half.resize(f32.size());
        for (int64_t r = 0; r < rows; r++) multiply_row(r, 1);
    }
    // By a power of two, which leaves bf16 numbers what they are.
    void multiply_row(int64_t row, float factor) {
        for (int64_t i = row * stride; i < (row + 1) * stride; i++) {
            f32[i] *= factor;
            if (!half.empty()) half[i] = to_bf16(f32[i]);
        }
    }
    const void* data() const { return half.empty() ? static_cast<const void*>(f32.data()) : half.data(); }
    float at(int64_t row, int64_t column) const { return f32[row * stride + column]; }
};

struct Problem {
    long seed;
    AttentionArguments a{};
    float key_loudness, value_loudness;
    int64_t rarity;  // of loud tokens
    bool is_long;    // in the shapes of the ChatGLM models
    bool rises;      // keys become larger and larger, and with them the largest score so far
    std::vector<uint8_t> key_cache, value_cache;
    std::vector<int32_t> beam_table, mask, context;
    std::vector<float> cos, sin;
    // What the cache must hold: [row][token][head][channel], after rotation.
    std::vector<float> keys, values;

    int64_t tokens() const { return a.cache_blocks * kBlockTokens; }

    float& kept(std::vector<float>& cache, int64_t row, int64_t token, int64_t head, int64_t d) {
        return cache[((row * tokens() + token) * a.num_key_value_heads + head) * a.head_dim + d];
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

struct InstructionSet {
    std::string name;
    int64_t steps = 0;
    double worst = 0;         // error, as a part of what is tolerated
    Fingerprint fingerprint;  // of outputs and caches

    bool takes(const Problem& p) const {
        const AttentionArguments& a = p.a;
        const int64_t keys = a.past_length + a.query_length;
        const int64_t factor = p.is_long ? 1 : kShort;
        const int64_t products = factor * a.batch * a.query_length * keys * a.num_attention_heads * a.head_dim;
        return optimum_chatglm_ov::takes(name.c_str(), a.head_dim, a.cache_precision) &&
               (name != "portable" || products <= kPortableProducts) &&
               (name != "amx-model" || products <= kModelProducts);
    }

    double tolerance(const AttentionArguments& a) const {
        const bool multiplies_bytes = name.find("vnni") != std::string::npos || name.find("amx") != std::string::npos;
        if (a.cache_precision == CachePrecision::i8) return multiplies_bytes ? 3e-2 : 2e-2;
        if (a.cache_precision == CachePrecision::bf16 || name.find("bf16") != std::string::npos) return 1e-2;
        return a.activation_type == ActivationType::bf16 ? 5e-3 : 2e-5;
    }
};

void fail(const Problem& p, const InstructionSet& isa, const std::string& what) {
    const auto& a = p.a;
    std::printf("FAILED on %s: %s\n  seed %ld: batch %d new %d past %d", isa.name.c_str(), what.c_str(), p.seed,
                (int)a.batch, (int)a.query_length, (int)a.past_length);
    std::printf(" heads %d/%d head_dim %d rotary %d cache %d type %d\n", (int)a.num_attention_heads,
                (int)a.num_key_value_heads, (int)a.head_dim, (int)a.rotary_dim, (int)a.cache_precision,
                (int)a.activation_type);
    std::exit(1);
}

// Some of the rows of the output, by where they begin.
using Rows = std::map<int64_t, std::vector<double>>;

Rows reference(Problem& p, const Activations& query) {
    const auto& a = p.a;
    const int64_t total = a.past_length + a.query_length, group = a.num_attention_heads / a.num_key_value_heads;
    const int64_t rows = a.batch * a.query_length * a.num_attention_heads;
    const int64_t every = 1 + rows * a.head_dim * total / kReferenceProducts;
    Rows expected;
    for (int64_t i = 0; i < rows; i++) {
        if (uniform(1, every) > 1) continue;
        const int64_t h = i % a.num_attention_heads, token = i / a.num_attention_heads;
        const int64_t b = token / a.query_length, t = token % a.query_length;
        const std::vector<float> q = p.rotated(query, b, t, h);
        std::vector<double> scores(total, -INFINITY), result(a.head_dim, 0.0);
        double largest = -INFINITY, sum = 0;
        const auto cache_row = [&](int64_t k) { return k < a.past_length ? p.beam_table[b * p.tokens() + k] : b; };
        for (int64_t k = 0; k < total; k++) {
            const int64_t context = p.context.empty() ? 0 : p.context[b];
            if ((k >= context && k > a.past_length + t) || !p.mask[b * p.tokens() + k]) continue;
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
            for (int64_t d = 0; d < a.head_dim; d++) result[d] += w * p.kept(p.values, cache_row(k), k, h / group, d);
        }
        if (sum > 0)
            for (double& x : result) x /= sum;
        expected.emplace(i * a.head_dim, result);
    }
    return expected;
}

// Relative to each row: in the mean square, or half of the largest.
double error(const Rows& expected, const std::vector<float>& output) {
    double sum_of_squares = 0, largest_square = 0;
    int64_t compared = 0;
    for (const auto& [begin, row] : expected) {
        double error = 0, norm = 0;
        for (size_t d = 0; d < row.size(); d++) {
            error += (output[begin + d] - row[d]) * (output[begin + d] - row[d]);
            norm += row[d] * row[d];
        }
        if (norm == 0 && error > 0) return INFINITY;  // a query that sees nothing must give zeros
        if (norm == 0) continue;
        sum_of_squares += error / norm, compared++;
        largest_square = std::max(largest_square, error / norm);
    }
    return compared ? std::sqrt(std::max(sum_of_squares / compared, largest_square / 4)) : 0;
}

// Appends `query_length` tokens and, if it `attends`, compares with the reference.
void step(Problem& p, std::vector<InstructionSet>& instruction_sets, int64_t query_length, bool attends) {
    auto& a = p.a;
    a.query_length = query_length;
    const bool is_bf16 = a.activation_type == ActivationType::bf16;
    const int64_t rows = a.batch * query_length, total = a.past_length + query_length;
    const Activations query(attends ? rows : 0, a.num_attention_heads * a.head_dim, is_bf16);
    Activations key(rows, a.num_key_value_heads * a.head_dim, is_bf16, p.key_loudness, p.rarity);
    for (int64_t r = 0; p.rises && r < rows; r++)
        key.multiply_row(r, std::ldexp(1.0f, std::min<int64_t>((a.past_length + r % query_length) / kRise, kRises)));
    const Activations value(rows, a.num_key_value_heads * a.head_dim, is_bf16, p.value_loudness, p.rarity);
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
    for (int64_t b = 0; b < a.batch; b++)
        for (int64_t t = 0; t < query_length; t++)
            for (int64_t h = 0; h < a.num_key_value_heads; h++) {
                const std::vector<float> k = p.rotated(key, b, t, h);
                for (int64_t d = 0; d < a.head_dim; d++) {
                    p.kept(p.keys, b, a.past_length + t, h, d) = k[d];
                    p.kept(p.values, b, a.past_length + t, h, d) = value.at(b * query_length + t, h * a.head_dim + d);
                }
            }
    const Threads threads(uniform(0, 7) ? uniform(1, 3) : 96);
    if (!attends) {
        append_to_cache(a, threads);
        a.past_length = total;
        return;
    }
    // Exactly as long as needed, for the sanitizer to see any access beyond.
    std::vector<int32_t> mask, table;
    for (int64_t b = 0; b < a.batch; b++) {
        const auto visible = p.mask.begin() + b * p.tokens(), beams = p.beam_table.begin() + b * p.tokens();
        mask.insert(mask.end(), visible, visible + total);
        table.insert(table.end(), beams, beams + a.past_length);
    }
    a.attention_mask = mask.data(), a.attention_mask_stride = total;
    a.beam_table = table.data(), a.beam_table_stride = a.past_length;
    a.context_length = p.context.empty() ? nullptr : p.context.data();
    const Rows expected = reference(p, query);
    const std::vector<uint8_t> key_cache = p.key_cache, value_cache = p.value_cache;
    for (InstructionSet& isa : instruction_sets) {
        if (!isa.takes(p)) continue;
        // What another has appended must not be there; what the last one appends stays.
        std::copy(key_cache.begin(), key_cache.end(), p.key_cache.begin());
        std::copy(value_cache.begin(), value_cache.end(), p.value_cache.begin());
        std::vector<float> output(rows * a.num_attention_heads * a.head_dim, std::numeric_limits<float>::quiet_NaN());
        std::vector<bf16> output_bf16(is_bf16 ? output.size() : 0, bf16{0x7fc0});
        a.output = is_bf16 ? static_cast<void*>(output_bf16.data()) : output.data();
        fused_attention(a, threads, isa.name.c_str());
        for (size_t i = 0; i < output_bf16.size(); i++) output[i] = to_float(output_bf16[i]);
        for (float found : output)
            if (!std::isfinite(found))
                fail(p, isa, "output is not finite: memory was read beyond the tokens, or sums overflowed");
        const double found = error(expected, output);
        if (found > isa.tolerance(a)) fail(p, isa, "relative error " + std::to_string(found));
        isa.worst = std::max(isa.worst, found / isa.tolerance(a));
        isa.steps++;
        isa.fingerprint.add(output);
        isa.fingerprint.add(p.key_cache);
        isa.fingerprint.add(p.value_cache);
    }
    a.past_length = total;
}

void run_problem(long seed, std::vector<InstructionSet>& instruction_sets, int64_t longest, int64_t longest_past) {
    static const int64_t heads[][2] = {{32, 2}, {32, 4}, {32, 32}, {4, 2}, {4, 4}, {16, 1}, {6, 2}, {2, 2}};
    static const int64_t dims[] = {64, 128, 16, 32, 48, 96};
    generator.seed(static_cast<unsigned>(seed));
    Problem p;
    p.seed = seed;
    auto& a = p.a;
    const auto& h = heads[uniform(0, longest_past ? 2 : 7)];
    a.num_attention_heads = h[0], a.num_key_value_heads = h[1];
    a.head_dim = dims[uniform(0, longest_past ? 1 : 5)];
    a.cache_precision = static_cast<CachePrecision>(uniform(0, 2));
    a.activation_type = uniform(0, 1) ? ActivationType::f32 : ActivationType::bf16;
    a.rotary_dim = uniform(0, 4) == 0 ? 0 : a.head_dim / (uniform(0, 1) ? 1 : 2);
    p.key_loudness = uniform(0, 3) ? 1 : kLoud, p.value_loudness = uniform(0, 3) ? 1 : kLoud;
    p.rarity = uniform(2, 200);
    p.is_long = longest_past > 0;
    a.scale = 1.0 / std::sqrt(double(a.head_dim));
    // Exact in bf16, or large scores would make any error of theirs a larger one of the weights.
    p.rises = a.cache_precision != CachePrecision::i8 && uniform(0, 3) == 0;
    if (p.rises) a.activation_type = ActivationType::bf16, a.rotary_dim = 0, p.key_loudness = 1;
    // Large scores would be as uncertain as they are large, in any arithmetic on rounded keys.
    if (a.cache_precision != CachePrecision::f32) a.scale /= p.key_loudness;
    a.batch = uniform(1, 4);
    const int64_t past = uniform(0, std::min(longest_past, kCached / (a.batch * a.num_key_value_heads * a.head_dim)));
    std::vector<int64_t> lengths;
    for (int64_t rest = past; rest > 0; rest -= lengths.back()) lengths.push_back(uniform(1, rest));
    lengths.push_back(uniform(1, uniform(0, 2) ? longest : 40));
    const int64_t prompt = past + lengths.back();
    int64_t total = prompt;
    for (int64_t s = uniform(0, 3); s > 0; s--, total += lengths.back())
        lengths.push_back(uniform(0, 2) ? 1 : uniform(1, 40));
    a.cache_rows = a.batch + uniform(0, 1);
    a.cache_blocks = (total + kBlockTokens - 1) / kBlockTokens + uniform(0, 1);
    const int64_t tokens = p.tokens();
    const size_t bytes =
        a.cache_rows * a.num_key_value_heads * a.cache_blocks * cache_block_bytes(a.cache_precision, a.head_dim);
    p.key_cache.assign(bytes, 0xff), p.value_cache.assign(bytes, 0xff);  // NaN in f32 and in bf16
    a.key_cache = p.key_cache.data(), a.value_cache = p.value_cache.data();
    p.keys.assign(a.cache_rows * tokens * a.num_key_value_heads * a.head_dim, NAN), p.values = p.keys;
    p.mask.assign(a.batch * tokens, 1);
    const int64_t kind = uniform(0, 3);  // none, left padding, holes, all hidden in one row
    for (int64_t b = 0; b < a.batch; b++) {
        const int64_t padding = kind == 1 ? uniform(0, prompt) : kind == 3 && b == 0 ? total : 0;
        for (int64_t t = 0; t < tokens; t++)
            if (t < padding || (kind == 2 && uniform(0, 3) == 0)) p.mask[b * tokens + t] = 0;
    }
    if (uniform(0, 2) == 0)
        for (int64_t b = 0; b < a.batch; b++) p.context.push_back(uniform(0, prompt));
    p.beam_table.resize(a.batch * tokens);
    for (int64_t b = 0; b < a.batch; b++)
        for (int64_t t = 0; t < tokens; t++) p.beam_table[b * tokens + t] = b;
    const bool beams = uniform(0, 1) != 0;
    for (int64_t length : lengths) {
        step(p, instruction_sets, length, a.past_length >= past);
        if (!beams) continue;
        const std::vector<int32_t> before = p.beam_table;
        for (int64_t b = 0; b < a.batch; b++) {
            const int64_t parent = uniform(0, a.batch - 1);
            for (int64_t t = 0; t < a.past_length; t++) p.beam_table[b * tokens + t] = before[parent * tokens + t];
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 4) return std::fprintf(stderr, "usage: %s SEED COUNT LENGTH [PAST]\n", argv[0]), 2;
    const long seed = std::atol(argv[1]), count = std::atol(argv[2]), length = std::atol(argv[3]);
    const long past = argc > 4 ? std::atol(argv[4]) : 0;
    std::vector<InstructionSet> instruction_sets;
    std::stringstream names(optimum_chatglm_ov::instruction_sets());
    for (std::string name; std::getline(names, name, ',');) instruction_sets.push_back({name, 0, 0, Fingerprint()});
    for (long i = seed; i < seed + count; i++)
        run_problem(i, instruction_sets, i % 16 == 15 && !past ? 6 * length : length, past);
    for (const InstructionSet& isa : instruction_sets)
        std::printf("%s: %ld steps, worst error %.2f of what is tolerated, fingerprint %s\n", isa.name.c_str(),
                    static_cast<long>(isa.steps), isa.worst, isa.fingerprint.text().c_str());
}
