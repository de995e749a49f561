// SPDX-License-Identifier: Apache-2.0
// Threads, chance and a fingerprint of what the random tests of the kernels compute.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/parallel.hpp"

namespace optimum_chatglm_ov {

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

inline std::mt19937 generator;

inline int64_t uniform(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

// Of all bytes seen, in their order: two builds of the kernels that print the same computed the same.
class Fingerprint {
public:
    template <class Element>
    void add(const std::vector<Element>& elements) {
        const size_t bytes = elements.size() * sizeof(Element);
        for (size_t i = 0; i < bytes; i += 8) {
            uint64_t word = 0;
            std::memcpy(&word, reinterpret_cast<const char*>(elements.data()) + i, bytes - i < 8 ? bytes - i : 8);
            bits_ = (bits_ ^ word) * 0x100000001b3u;  // FNV-1a, of words
            bits_ ^= bits_ >> 32;
        }
    }
    std::string text() const {
        char digits[17];
        std::snprintf(digits, sizeof(digits), "%016llx", static_cast<unsigned long long>(bits_));
        return digits;
    }

private:
    uint64_t bits_ = 0xcbf29ce484222325u;
};

}  // namespace optimum_chatglm_ov
