// SPDX-License-Identifier: Apache-2.0
// Random linear layers and MLPs against float64, on every instruction set of this CPU: shapes, 8 and 4 bits, groups,
// signs, biases. Everything unwritten is NaN. Usage: fuzz_linear SEED COUNT
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

#include "fuzzing.hpp"
#include "linear/driver.hpp"
#include "linear/linear.hpp"

using namespace optimum_chatglm_ov;

namespace {

constexpr int64_t kModelProducts = 1 << 21;  // multiplications of a problem, where the arithmetic is slow

std::vector<float> normal(int64_t count, bool has_outliers = true) {
    std::normal_distribution<float> distribution;
    std::vector<float> values(count);
    for (float& v : values) v = distribution(generator) * (!has_outliers || uniform(0, 40) ? 1.0f : 20.0f);
    return values;
}

// f16 of 2^-exponent * (1 + fraction / 1024), and its value.
f16 half(int exponent, int fraction, double& value) {
    value = std::ldexp(1.0 + fraction / 1024.0, -exponent);
    return {static_cast<uint16_t>((15 - exponent) << 10 | fraction)};
}

struct Layer {
    LinearFormat format;
    int64_t out_features;
    std::vector<double> weights;  // [out_features, in_features]
    std::vector<float> bias;      // or empty
    std::vector<uint8_t> packed;

    Layer(const LinearFormat& f, int64_t rows) : format(f), out_features(rows), weights(rows * f.in_features) {
        const int64_t groups = f.in_features / f.group_size;
        const bool is_signed = uniform(0, 1), is_asymmetric = uniform(0, 1);
        const uint8_t flip = !is_signed ? 0 : f.bits == 8 ? 0x80 : 0x88;
        const int64_t values = 1 << f.bits;
        std::vector<uint8_t> integers(rows * f.in_features * f.bits / 8), zeros(rows * groups);
        std::vector<f16> scales(rows * groups);
        for (int64_t g = 0; g < rows * groups; g++) {
            double scale;
            scales[g] = half(static_cast<int>(uniform(4, 12)), static_cast<int>(uniform(0, 1023)), scale);
            if (!uniform(0, 50))
                scale = std::ldexp(static_cast<double>((scales[g] = f16{700}).bits), -24);  // denormal
            zeros[g] = static_cast<uint8_t>(is_asymmetric ? uniform(0, values - 1) : values / 2);
            for (int64_t i = g * f.group_size; i < (g + 1) * f.group_size; i++) {
                const int64_t integer = uniform(0, values - 1);
                weights[i] = scale * static_cast<double>(integer - zeros[g]);
                if (f.bits == 8)
                    integers[i] = static_cast<uint8_t>(integer) ^ flip;
                else
                    integers[i / 2] |= static_cast<uint8_t>((integer ^ (flip & 15)) << (i % 2 * 4));
            }
        }
        if (uniform(0, 1)) bias = normal(rows);
        packed.assign(rows / kPanelColumns * panel_bytes(f), 0xff);
        const float* biases = bias.empty() ? nullptr : bias.data();
        pack_linear(f, {rows, integers.data(), flip, scales.data(), zeros.data(), biases}, packed.data());
    }

    LinearWeights view() const { return {out_features, packed.data()}; }
};

// How activations are rounded: whole rows to 16 bits, or to 8 if they have no outliers, groups to 8 bits, or each
// number to bf16.
enum class Rounding { rows_wide, rows, groups, bf16, count };

bool has_tiles(const std::string& name) {
    return name.rfind("amx", 0) == 0;
}
bool has_byte_tiles(const LinearFormat& f) {
    return f.bits == 8 && f.group_size == f.in_features && f.in_features % 64 == 0;
}
// Rows of activations that are multiplied in 16 bits with half bytes, if there are no more.
constexpr int64_t kHalvesRows = 16;
bool has_half_tiles(const LinearFormat& f) {
    return f.bits == 4 && (f.group_size == 64 || f.group_size == 128);
}
// Byte products take so few rows in 16 bits, and instead of tiles that weights are converted for.
bool is_wide(const std::string& name, int64_t rows) {
    return rows <= (name == "amx" || name == "avx512-vnni" ? 2 : 1);
}
Rounding tile_rounding(const LinearFormat& f, int64_t rows) {
    if (has_byte_tiles(f)) return f.activation_group_size == f.in_features ? Rounding::rows : Rounding::rows_wide;
    return has_half_tiles(f) && rows <= kHalvesRows ? Rounding::rows_wide : Rounding::bf16;
}
Rounding rounding(const std::string& name, const LinearFormat& f, int64_t rows) {
    if (has_tiles(name) && has_byte_tiles(f)) return tile_rounding(f, rows);
    if (is_wide(name, rows)) return Rounding::rows_wide;
    return has_tiles(name) ? tile_rounding(f, rows) : Rounding::groups;
}

double to_bf16(double x) {
    int exponent;
    const double fraction = std::frexp(x, &exponent);
    return std::ldexp(std::nearbyint(fraction * 256), exponent - 8);
}

// Rows that one scale of 8 bits is good enough for: see rounds_well in tile_driver.cpp.
bool is_even(const double* x, int64_t rows, int64_t width) {
    double largest = 0, mean = 0;
    for (int64_t r = 0; r < rows; r++) {
        double most = 0;
        for (int64_t k = 0; k < width; k++) {
            const double square = x[r * width + k] * x[r * width + k];
            most = std::max(most, square), mean += square / static_cast<double>(width);
        }
        largest += most;
    }
    return rows > 16 && largest <= 32 * mean;
}

// What rounding makes of the activations, for one that has no error of its own. parts: rows that have 8 bits, or not,
// together.
std::vector<double> rounded(const LinearFormat& f, const std::vector<double>& x, Rounding rounding,
                            const RowParts& parts) {
    std::vector<double> result(x.size());
    double steps = rounding == Rounding::rows_wide ? 32639 : 127;
    // byte products round whole rows of 8 bits in groups of 32
    const int64_t group = f.activation_group_size == f.in_features ? 32 : f.activation_group_size;
    const int64_t size = rounding == Rounding::groups ? group : f.in_features;
    int64_t part = 0;
    for (size_t first = 0; first < x.size(); first += size) {
        if (rounding == Rounding::rows && static_cast<int64_t>(first) == parts.begin(part) * f.in_features)
            steps = is_even(&x[first], parts.size(part++), f.in_features) ? 127 : 32639;
        double max = 0;
        for (int64_t i = 0; i < size; i++) max = std::max(max, std::abs(x[first + i]));
        for (int64_t i = 0; i < size; i++) {
            const double v = x[first + i];
            result[first + i] = rounding == Rounding::bf16 ? to_bf16(v)
                                : max > 0                  ? std::nearbyint(v / max * steps) * max / steps
                                                           : 0.0;
        }
    }
    return result;
}

// Memory of outputs, NaN, at a multiple of 64 bytes, or not.
class Output {
public:
    explicit Output(int64_t count) : memory_(count + 32, std::numeric_limits<float>::quiet_NaN()), count_(count) {
        const auto address = reinterpret_cast<uintptr_t>(memory_.data());
        first_ = static_cast<int64_t>((64 - address % 64) % 64 / 4 + (uniform(0, 3) ? 0 : 4));
    }
    float* data() { return memory_.data() + first_; }
    std::vector<float> values() const { return {memory_.begin() + first_, memory_.begin() + first_ + count_}; }

    bool equals(const Output& other) const {
        return std::memcmp(memory_.data() + first_, other.memory_.data() + other.first_, count_ * 4) == 0;
    }

    // Whether nothing beside it was written.
    bool is_alone() const {
        for (int64_t i = 0; i < static_cast<int64_t>(memory_.size()); i++)
            if ((i < first_ || i >= first_ + count_) && memory_[i] == memory_[i]) return false;
        return true;
    }

private:
    std::vector<float> memory_;
    int64_t count_, first_;
};

std::vector<double> apply(const Layer& layer, int64_t rows, const std::vector<double>& x, Rounding rounding,
                          const RowParts& parts) {
    const std::vector<double> input = rounded(layer.format, x, rounding, parts);
    const int64_t width = layer.format.in_features;
    std::vector<double> y(rows * layer.out_features);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t n = 0; n < layer.out_features; n++) {
            double sum = layer.bias.empty() ? 0.0 : layer.bias[n];
            for (int64_t k = 0; k < width; k++) sum += input[r * width + k] * layer.weights[n * width + k];
            y[r * layer.out_features + n] = sum;
        }
    return y;
}

double error(const std::vector<float>& found, const std::vector<double>& expected) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < found.size(); i++) {
        difference += (found[i] - expected[i]) * (found[i] - expected[i]);
        size += expected[i] * expected[i];
    }
    const double relative = std::sqrt(difference / size);
    return relative == relative ? relative : std::numeric_limits<double>::infinity();
}

LinearFormat random_format(int64_t in_features) {
    LinearFormat f{in_features, uniform(0, 1) ? 8 : 4, in_features, 32};
    for (int64_t size : {32, 64, 128})
        if (in_features % size == 0 && !uniform(0, 2)) f.group_size = size;
    for (int64_t size : {64, 128})
        if (f.group_size % size == 0 && !uniform(0, 2)) f.activation_group_size = size;
    if (f.group_size == in_features && !uniform(0, 2)) f.activation_group_size = in_features;
    return f;
}

bool check(const char* what, const std::string& name, const LinearFormat& f, int64_t rows, double error,
           double tolerance) {
    if (error <= tolerance) return true;
    std::printf("%s, %s: error %g; %ld rows, %ld inputs, %ld bits, groups %ld, activation groups %ld\n", what,
                name.c_str(), error, static_cast<long>(rows), static_cast<long>(f.in_features),
                static_cast<long>(f.bits), static_cast<long>(f.group_size),
                static_cast<long>(f.activation_group_size));
    return false;
}

// is_large: a thread writes more than its caches hold.
bool problem(std::map<std::string, Fingerprint>& fingerprints, std::map<std::string, long>& counts, bool is_large) {
    const Threads threads(is_large ? 1 : uniform(0, 7) ? uniform(1, 3) : 96);
    const bool has_parts = !uniform(0, 15);  // with one or two threads
    const int64_t rows = is_large         ? uniform(260, 560)
                         : has_parts      ? uniform(513, 1200)
                         : !uniform(0, 5) ? 1
                         : uniform(0, 3)  ? uniform(1, 20)
                                          : uniform(1, 700);
    const int64_t in_features = is_large || has_parts ? 64 * uniform(1, 2)
                                : uniform(0, 30)      ? 32 * uniform(1, rows > 20 || uniform(0, 1) ? 12 : 24)
                                                      : 32 * uniform(129, 300);
    LinearFormat format = random_format(in_features);
    if (is_large && uniform(0, 2)) {  // byte tiles, of 16 or 8 bits
        format.bits = 8, format.group_size = in_features;
        format.activation_group_size = uniform(0, 1) ? in_features : 32;
    }
    std::vector<Layer> layers;
    const int64_t most_width = has_parts ? 1 : in_features > 4096 || rows > 20 ? 2 : 10;
    const int64_t count = uniform(1, 3), width = 32 * (is_large ? uniform(32, 40) : uniform(1, most_width));
    for (int64_t i = 0; i < count; i++) layers.emplace_back(format, i < 2 ? width : 32 * uniform(1, 3));
    const Layer down(random_format(width), 32 * uniform(1, 4));
    const std::vector<float> input = normal(rows * in_features, uniform(0, 1));
    const std::vector<double> x(input.begin(), input.end());

    const RowParts parts(rows, most_rows_of_mlp(threads));
    std::vector<LinearWeights> weights;
    for (const Layer& layer : layers) weights.push_back(layer.view());
    const LinearWeights down_weights = down.view();
    const LinearLayers first_layers{format, weights.data(), count};
    const RowsView<const float> input_rows{input.data(), in_features, rows};
    const MLPLayers layers_of_mlp{{format, weights.data(), std::min<int64_t>(count, 2)},
                                  count > 1 ? Activation::silu : Activation::gelu,
                                  {down.format, &down_weights, 1}};

    // Each made when an instruction set asks for it.
    constexpr int kCount = static_cast<int>(Rounding::count);
    std::vector<std::vector<double>> all_expected[kCount];
    const auto expected = [&](Rounding kind) -> const std::vector<std::vector<double>>& {
        auto& outputs = all_expected[static_cast<int>(kind)];
        if (outputs.empty())
            for (const Layer& layer : layers)
                outputs.push_back(apply(layer, rows, x, kind, RowParts(rows, rows + 32)));
        return outputs;
    };
    std::vector<double> all_down[kCount][kCount];
    const auto expected_down = [&](Rounding first, Rounding second) -> const std::vector<double>& {
        auto& output = all_down[static_cast<int>(first)][static_cast<int>(second)];
        if (!output.empty()) return output;
        std::vector<double> activated = expected(first)[0];
        for (size_t i = 0; i < activated.size(); i++) {
            const double v = activated[i];
            if (count > 1)
                activated[i] = v / (1 + std::exp(-v)) * expected(first)[1][i];
            else
                activated[i] = 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
        }
        return output = apply(down, rows, activated, second, parts);
    };

    int64_t products = rows * down.format.in_features * down.out_features;
    for (const Layer& layer : layers) products += rows * in_features * layer.out_features;
    bool passed = true;
    std::stringstream names(linear_instruction_sets());
    for (std::string name; std::getline(names, name, ',');) {
        if (name == "amx-model" && products > kModelProducts) continue;
        counts[name]++;
        std::vector<Output> outputs, others;  // of other threads
        const auto compute = [&](std::vector<Output>& results, const Threads& some) {
            std::vector<float*> pointers;
            for (const Layer& layer : layers) results.emplace_back(rows * layer.out_features);
            for (auto& result : results) pointers.push_back(result.data());
            linear(first_layers, input_rows, pointers.data(), some, name.c_str());
        };
        compute(outputs, threads);
        compute(others, Threads(threads.concurrency() > 4 ? 1 : 16));
        for (int64_t i = 0; i < count; i++)
            if (!outputs[i].equals(others[i]))
                passed = !std::printf("%s depends on the number of threads\n", name.c_str());
        for (const Output& output : outputs)
            if (!output.is_alone()) passed = !std::printf("%s wrote beyond an output\n", name.c_str());
        const Rounding kind = rounding(name, format, rows);
        // An activation that is nearly half way between two integers may become either. Tiles round weights of many
        // rows to bf16 if they have several scales.
        const bool rounds_weights = kind == Rounding::bf16 && rows > 32 && format.group_size != format.in_features;
        const bool is_coarse = kind == Rounding::groups || kind == Rounding::rows;
        const double tolerance = is_coarse ? 5e-4 : rounds_weights ? 4e-3 : 5e-5;
        for (int64_t i = 0; i < count; i++)
            passed &= check("linear", name, format, rows, error(outputs[i].values(), expected(kind)[i]), tolerance);
        Output output(rows * down.out_features);
        mlp(layers_of_mlp, input_rows, output.data(), threads, name.c_str());
        // An MLP is on tiles as a whole, or on byte products.
        const bool is_bytes = !has_tiles(name) || (is_wide(name, rows) && !has_byte_tiles(down.format));
        const std::string set = is_bytes && has_tiles(name) ? "portable" : name;
        const Rounding first = is_bytes && is_wide(name, rows) ? Rounding::rows_wide
                               : has_tiles(set)                ? tile_rounding(format, rows)
                                                               : rounding(set, format, rows);
        const Rounding second =
            is_bytes && is_wide(name, rows) ? Rounding::rows_wide : rounding(set, down.format, rows);
        const double most =
            second == Rounding::rows || second == Rounding::bf16 || first == Rounding::bf16 ? 1.5e-2 : 2e-3;
        passed &= check("mlp", name, down.format, rows, error(output.values(), expected_down(first, second)), most);
        for (const Output& found : outputs) fingerprints[name].add(found.values());
        fingerprints[name].add(output.values());
    }
    return passed;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return std::fprintf(stderr, "usage: %s SEED COUNT\n", argv[0]), 2;
    const long seed = std::atol(argv[1]), count = std::atol(argv[2]);
    std::map<std::string, Fingerprint> fingerprints;
    std::map<std::string, long> counts;
    for (long i = 0; i < count; i++) {
        generator.seed(static_cast<unsigned>(seed + i));
        if (!problem(fingerprints, counts, i % 15 == 0)) return std::printf("seed %ld\n", seed + i), 1;
    }
    std::printf("%ld problems, on %s\n", count, linear_instruction_sets());
    for (const auto& [name, fingerprint] : fingerprints)
        std::printf("%s: %ld problems, fingerprint %s\n", name.c_str(), counts[name], fingerprint.text().c_str());
}
