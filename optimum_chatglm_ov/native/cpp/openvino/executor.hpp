// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>

#include "common/parallel.hpp"

namespace optimum_chatglm_ov {

// The threads that OpenVINO runs the inference on. Isolated: a thread that waits here takes no work of another
// inference, whose kernels would use the same thread's scratch memory.
class ArenaExecutor final : public Executor {
public:
    int64_t concurrency() const override { return tbb::this_task_arena::max_concurrency(); }

    void run(int64_t workers, void (*body)(void*), void* context) const override {
        tbb::this_task_arena::isolate([&] {
            tbb::parallel_for(
                int64_t(0), workers, int64_t(1), [&](int64_t) { body(context); }, tbb::simple_partitioner());
        });
    }
};

}  // namespace optimum_chatglm_ov
