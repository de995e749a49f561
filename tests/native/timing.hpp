// SPDX-License-Identifier: Apache-2.0
// What the native benchmarks share: threads that wait without sleeping, the rate of reading memory, the best of some
// runs.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

#include "common/parallel.hpp"

namespace optimum_chatglm_ov {

// Threads that are there from the beginning and never sleep, as those of OpenVINO during an inference.
class Pool final : public Executor {
public:
    explicit Pool(int64_t count) {
        for (int64_t i = 1; i < count; i++)
            threads_.emplace_back([this, i] {
                for (int64_t seen = 0;;) {
                    while (generation_.load(std::memory_order_acquire) == seen) __builtin_ia32_pause();
                    seen++;
                    if (!body_) return;
                    if (i < workers_) body_(context_);
                    done_.fetch_add(1, std::memory_order_release);
                }
            });
    }
    ~Pool() {
        start(0, nullptr, nullptr);
        for (auto& t : threads_) t.join();
    }
    int64_t concurrency() const override { return static_cast<int64_t>(threads_.size()) + 1; }
    void run(int64_t workers, void (*body)(void*), void* context) const override {
        start(workers, body, context);
        body(context);
        while (done_.load(std::memory_order_acquire) < static_cast<int64_t>(threads_.size())) __builtin_ia32_pause();
    }

private:
    void start(int64_t workers, void (*body)(void*), void* context) const {
        workers_ = workers, body_ = body, context_ = context;
        done_.store(0, std::memory_order_relaxed);
        generation_.fetch_add(1, std::memory_order_release);
    }
    std::vector<std::thread> threads_;
    mutable std::atomic<int64_t> generation_{0}, done_{0};
    mutable int64_t workers_ = 0;
    mutable void (*body_)(void*) = nullptr;
    mutable void* context_ = nullptr;
};

template <class Body>
double best_seconds(double budget, const Body& body) {
    using Clock = std::chrono::steady_clock;
    const auto seconds = [](Clock::duration d) { return std::chrono::duration<double>(d).count(); };
    double best = 1e9;
    body();
    int runs = 0;
    for (const auto begin = Clock::now(); runs < 3 || seconds(Clock::now() - begin) < budget; runs++) {
        const auto start = Clock::now();
        body();
        best = std::min(best, seconds(Clock::now() - start));
    }
    return best;
}

inline void* allocate_weights(int64_t bytes) {
    void* memory = std::aligned_alloc(2 << 20, (bytes + (2 << 20) - 1) >> 21 << 21);
    madvise(memory, bytes, MADV_HUGEPAGE);
    return memory;
}

// Bytes a second of reading memory in order, each thread a part of its own.
inline double stream_rate(const Executor& executor, const uint8_t* memory, int64_t bytes) {
    const int64_t parts = 8 * executor.concurrency(), part = bytes / parts / 64 * 64;
    std::atomic<int64_t> total{0};
    const double seconds = best_seconds(0.2, [&] {
        parallel_for(executor, parts, executor.concurrency(), [&](int64_t i) {
            const int64_t* p = reinterpret_cast<const int64_t*>(memory + i * part);
            int64_t sums[8] = {};
            for (int64_t j = 0; j < part / 8; j += 8) {
                __builtin_prefetch(p + j + 512);
                for (int k = 0; k < 8; k++) sums[k] += p[j + k];
            }
            for (int64_t sum : sums) total += sum;
        });
    });
    return double(part * parts) / seconds;
}

}  // namespace optimum_chatglm_ov
