// pool.h: the thread pool as kernels see it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../krasis.h"

namespace krasis {

using TaskFn = void (*)(void *context, int64_t begin, int64_t end, int32_t thread);

// Runs fn over [0, count) in pieces of `grain` indices, dealt dynamically; returns when all are done. thread is in
// [0, num_threads): an index for per-thread scratch. Not reentrant: one caller at a time (a second caller waits).
void parallel_run(krasis_pool *pool, int64_t count, int64_t grain, TaskFn fn, void *context);

// Same with a callable: f(begin, end, thread).
template <class F> void parallel_for(krasis_pool *pool, int64_t count, int64_t grain, F &&f) {
    using Body = std::remove_reference_t<F>;
    parallel_run(
        pool, count, grain,
        [](void *context, int64_t begin, int64_t end, int32_t thread) {
            (*static_cast<Body *>(context))(begin, end, thread);
        },
        const_cast<void *>(static_cast<const void *>(&f)));
}

}  // namespace krasis
