// pool.h: the thread pool as kernels see it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../krasis.h"
#include "topology.h"

namespace krasis {

// krasis_pool_create for nodes that the caller names, which need not be this machine's.
int32_t create_pool(int32_t num_threads, int32_t isa, const Topology &topology, krasis_pool **pool);

using TaskFn = void (*)(void *context, int64_t begin, int64_t end, int32_t thread);

// Runs fn over [0, count) in pieces of `grain` indices, dealt dynamically; returns when all are done. thread is in
// [0, num_threads): an index for per-thread scratch. Not reentrant: one caller at a time (a second caller waits).
// fn must not throw and must not use the pool.
void parallel_run(krasis_pool *pool, int64_t count, int64_t grain, TaskFn fn, void *context);

// One step of a job. Steps run one after another: no piece of a step starts before every piece of the step before it is
// done. A step with max_grain > grain is dealt in pieces that shrink from max_grain to grain towards its end, so that
// pieces are long (sequential reads) and threads still finish together.
struct Phase {
    TaskFn fn = nullptr;
    void *context = nullptr;
    int64_t count = 0;
    int64_t grain = 1;
    int64_t max_grain = 0;
    // Where memory is spread over NUMA nodes: units come in runs of `period`, each run stands for the rows of a weight,
    // and node i of n takes units [first_unit(period, n, i), first_unit(period, n, i + 1)) of every run first
    // (mirrored: those of node n - 1 - i). 0: units are alike for all threads.
    int64_t period = 0;
    bool mirrored = false;
};

// All phases with one wake of the threads.
void parallel_phases(krasis_pool *pool, const Phase *phases, int64_t num_phases);

// Holds the pool for several jobs of one caller and lends its scratch memory, which grows and is kept. Jobs started
// through a session see the scratch; it is void once the session ends.
class PoolSession {
  public:
    explicit PoolSession(krasis_pool *pool);
    ~PoolSession();
    PoolSession(const PoolSession &) = delete;
    PoolSession &operator=(const PoolSession &) = delete;

    // 64-byte aligned, nullptr if there is not enough memory. A second call voids the first block.
    void *scratch(size_t bytes);
    void run(const Phase *phases, int64_t num_phases);

  private:
    krasis_pool *pool_;
};

// A phase around a callable that outlives it: f(begin, end, thread).
template <class F>
Phase make_phase(F &f, int64_t count, int64_t grain, int64_t max_grain = 0) {
    Phase phase;
    phase.fn = [](void *context, int64_t begin, int64_t end, int32_t thread) {
        (*static_cast<F *>(context))(begin, end, thread);
    };
    phase.context = const_cast<void *>(static_cast<const void *>(&f));
    phase.count = count;
    phase.grain = grain;
    phase.max_grain = max_grain;
    return phase;
}

// parallel_run with a callable: f(begin, end, thread).
template <class F>
void parallel_for(krasis_pool *pool, int64_t count, int64_t grain, F &&f) {
    using Body = std::remove_reference_t<F>;
    parallel_run(
        pool, count, grain,
        [](void *context, int64_t begin, int64_t end, int32_t thread) {
            (*static_cast<Body *>(context))(begin, end, thread);
        },
        const_cast<void *>(static_cast<const void *>(&f)));
}

}  // namespace krasis
