// SPDX-License-Identifier: Apache-2.0
// Threads and chance of the random tests of the kernels.
#pragma once

#include <cstdint>
#include <random>
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

}  // namespace optimum_chatglm_ov
