// SPDX-License-Identifier: Apache-2.0
// Random linear layers and MLPs against float64, on every instruction set of this CPU: shapes, 8 and 4 bits, groups,
// signs, biases. Everything unwritten is NaN. Usage: fuzz_linear SEED COUNT
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "fuzzing.hpp"
#include "linear.hpp"

using namespace optimum_chatglm_ov;

namespace {

std::vector<float> normal(int64_t count) {
    std::normal_distribution<float> distribution;
    std::vector<float> values(count);
    for (float& v : values) v = distribution(generator) * (uniform(0, 40) ? 1.0f : 20.0f);
    return values;
}

// f16 of 2^-exponent * (1 + fraction / 1024), and its value.
uint16_t half(int exponent, int fraction, double& value) {
    value = std::ldexp(1.0 + fraction / 1024.0, -exponent);
    return static_cast<uint16_t>((15 - exponent) << 10 | fraction);
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
        std::vector<uint16_t> scales(rows * groups);
        for (int64_t g = 0; g < rows * groups; g++) {
            double scale;
            scales[g] = half(static_cast<int>(uniform(4, 12)), static_cast<int>(uniform(0, 1023)), scale);
            if (!uniform(0, 50)) scale = std::ldexp(static_cast<double>(scales[g] = 700), -24);  // denormal
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
        pack_linear(f, rows, integers.data(), flip, scales.data(), zeros.data(), bias.empty() ? nullptr : bias.data(),
                    packed.data());
    }

    LinearWeights view() const { return {out_features, packed.data()}; }
};

// What rounding to 8 bits makes of the activations, for one that has no error of its own.
std::vector<double> rounded(const LinearFormat& f, const std::vector<double>& x) {
    std::vector<double> result(x.size());
    for (size_t first = 0; first < x.size(); first += f.activation_group_size) {
        double max = 0;
        for (int64_t i = 0; i < f.activation_group_size; i++) max = std::max(max, std::abs(x[first + i]));
        for (int64_t i = 0; i < f.activation_group_size; i++)
            result[first + i] = max > 0 ? std::nearbyint(x[first + i] / max * 127) * max / 127 : 0.0;
    }
    return result;
}

std::vector<double> apply(const Layer& layer, int64_t rows, const std::vector<double>& x) {
    const std::vector<double> input = rounded(layer.format, x);
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

bool problem() {
    const Threads threads(uniform(0, 7) ? uniform(1, 3) : 96);
    const int64_t rows = uniform(0, 3) ? uniform(1, 20) : uniform(1, 700);
    const int64_t in_features = uniform(0, 30) ? 32 * uniform(1, 12) : 32 * uniform(129, 300);
    const LinearFormat format = random_format(in_features);
    std::vector<Layer> layers;
    const int64_t count = uniform(1, 3), width = 32 * uniform(1, in_features > 4096 || rows > 20 ? 2 : 10);
    for (int64_t i = 0; i < count; i++) layers.emplace_back(format, i < 2 ? width : 32 * uniform(1, 3));
    const Layer down(random_format(width), 32 * uniform(1, 4));
    const std::vector<float> input = normal(rows * in_features);
    const std::vector<double> x(input.begin(), input.end());

    std::vector<LinearWeights> weights;
    std::vector<std::vector<double>> expected;
    for (const Layer& layer : layers) weights.push_back(layer.view()), expected.push_back(apply(layer, rows, x));
    std::vector<double> activated = expected[0];
    for (size_t i = 0; i < activated.size(); i++) {
        const double v = activated[i];
        if (count > 1)
            activated[i] = v / (1 + std::exp(-v)) * expected[1][i];
        else
            activated[i] = 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
    }
    const std::vector<double> expected_down = apply(down, rows, activated);

    bool passed = true;
    std::stringstream names(linear_instruction_sets());
    for (std::string name; std::getline(names, name, ',');) {
        std::vector<std::vector<float>> outputs;
        std::vector<float*> pointers;
        for (const Layer& layer : layers)
            outputs.emplace_back(rows * layer.out_features, std::numeric_limits<float>::quiet_NaN());
        for (auto& output : outputs) pointers.push_back(output.data());
        linear(format, weights.data(), count, rows, input.data(), pointers.data(), threads, name.c_str());
        // An activation that is nearly half way between two integers may become either.
        for (int64_t i = 0; i < count; i++)
            passed &= check("linear", name, format, rows, error(outputs[i], expected[i]), 5e-4);
        std::vector<float> output(rows * down.out_features, std::numeric_limits<float>::quiet_NaN());
        mlp(format, weights.data(), count > 1 ? Activation::silu : Activation::gelu, down.format, down.view(), rows,
            input.data(), output.data(), threads, name.c_str());
        passed &= check("mlp", name, down.format, rows, error(output, expected_down), 2e-3);
    }
    return passed;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return std::fprintf(stderr, "usage: %s SEED COUNT\n", argv[0]), 2;
    const long seed = std::atol(argv[1]), count = std::atol(argv[2]);
    for (long i = 0; i < count; i++) {
        generator.seed(static_cast<unsigned>(seed + i));
        if (!problem()) return std::printf("seed %ld\n", seed + i), 1;
    }
    std::printf("%ld problems, on %s\n", count, linear_instruction_sets());
}
