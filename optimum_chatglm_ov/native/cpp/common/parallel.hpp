// SPDX-License-Identifier: Apache-2.0
// Threads and scratch memory of the drivers. Not for the kernels: inline functions of files that are compiled for
// different instruction sets could be merged.
#pragma once

#if defined(__linux__)
#    include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>

namespace optimum_chatglm_ov {

// Runs body(context) on up to `workers` threads, the caller's among them, and returns when all have finished.
class Executor {
public:
    virtual int64_t concurrency() const = 0;
    virtual void run(int64_t workers, void (*body)(void* context), void* context) const = 0;

protected:
    ~Executor() = default;
};

inline int64_t ceil_divide(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Hands out the numbers 0 .. count - 1 to threads, one at a time; an exception of one ends all and is rethrown.
template <class Body>
void parallel_for(const Executor& executor, int64_t count, int64_t workers, const Body& body) {
    workers = std::min({workers, count, executor.concurrency()});
    if (workers <= 1) {
        for (int64_t i = 0; i < count; i++) body(i);
        return;
    }
    struct Shared {
        std::atomic<int64_t> next{0};
        int64_t count;
        const Body* body;
        std::exception_ptr error;
        std::mutex mutex;
    } shared;
    shared.count = count;
    shared.body = &body;
    executor.run(
        workers,
        [](void* context) {
            auto& s = *static_cast<Shared*>(context);
            try {
                for (int64_t i; (i = s.next.fetch_add(1)) < s.count;) (*s.body)(i);
            } catch (...) {
                s.next = s.count;
                std::lock_guard<std::mutex> lock(s.mutex);
                s.error = std::current_exception();
            }
        },
        &shared);
    if (shared.error) std::rethrow_exception(shared.error);
}

constexpr size_t kHugePage = 2 << 20;

// Asks the system for huge pages where whole ones fit; before the memory is touched.
inline void use_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__)
    const auto begin = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
    const auto end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHugePage * kHugePage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

// 64-byte aligned memory that only grows.
class Buffer {
public:
    void* reserve(size_t bytes) {
        if (bytes > size_) {
            memory_.reset();
            size_ = 0;
            // Large ones in huge pages: the translation of addresses would take up to a tenth of the time.
            const size_t alignment = bytes < kHugePage / 2 ? 64 : kHugePage;
            const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
            memory_.reset(std::aligned_alloc(alignment, rounded));
            if (!memory_) throw std::bad_alloc();
            use_huge_pages(memory_.get(), rounded);
            size_ = bytes;
        }
        return memory_.get();
    }

private:
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    std::unique_ptr<void, Free> memory_;
    size_t size_ = 0;
};

}  // namespace optimum_chatglm_ov
