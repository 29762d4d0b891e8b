// pool_api.cpp: making and ending pools, and the ways kernels run work on them.
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <system_error>

#include "pool_state.h"
#include "probe.h"

using namespace krasis;

namespace {

constexpr int32_t kMaxThreads = 4096;
constexpr int64_t kMaxSpinNs = 1'000'000'000;

}  // namespace

// What the threads need to know of the nodes. Throws bad_alloc.
void krasis_pool::place(const Topology &topology) {
    queues = std::vector<PoolQueue>(topology.size());
    ticket().store(make_ticket(0, kIdle));
    homes = homes_of_threads(num_threads, topology);
    takers.assign(topology.size(), 0);
    for (int32_t home : homes) ++takers[static_cast<size_t>(home)];
    for (int32_t &count : takers) count = std::max(count, 1);  // a node without threads is served by others
    for (size_t i = topology.size(); i-- > 0;) {
        for (int32_t cpu : topology[i].cpus) {
            if (static_cast<size_t>(cpu) >= node_of_cpu.size()) node_of_cpu.resize(static_cast<size_t>(cpu) + 1);
            node_of_cpu[static_cast<size_t>(cpu)] = static_cast<int32_t>(i);
        }
    }
}

bool krasis_pool::start(const Topology &topology) {
    // Signals belong to the program's own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool ok = true;
    try {
        place(topology);
        workers.reserve(static_cast<size_t>(num_threads - 1));
        for (int32_t i = 1; i < num_threads; ++i) {
            workers.emplace_back([this, i] { work(i); });
            char name[24];
            std::snprintf(name, sizeof name, "krasis-%d", i);
            name[15] = '\0';  // the kernel takes 15 characters
            pthread_setname_np(workers.back().native_handle(), name);
            // A refusal leaves the thread where it may run now: slower, not wrong.
            if (topology.size() > 1) bind_thread(workers.back().native_handle(), topology[homes[i]].cpus);
        }
    } catch (const std::system_error &) {
        ok = false;
    } catch (const std::bad_alloc &) {
        ok = false;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return ok;
}

krasis_pool::~krasis_pool() {
    if (!workers.empty()) dismiss();
    for (std::thread &worker : workers) worker.join();
    std::free(scratch);
}

int32_t krasis::create_pool(int32_t num_threads, int32_t isa, const Topology &topology, krasis_pool **pool) {
    if (!pool) return KRASIS_ERR_ARGUMENT;
    *pool = nullptr;
    if (num_threads < 0 || num_threads > kMaxThreads) return KRASIS_ERR_ARGUMENT;
    if (isa < KRASIS_ISA_AUTO || isa > KRASIS_ISA_AMX_INT8) return KRASIS_ERR_ARGUMENT;
    const int32_t chosen = resolve_isa(isa);
    if (chosen == KRASIS_ISA_AUTO) return KRASIS_ERR_ISA;
    krasis_pool *made = new (std::nothrow) krasis_pool;
    if (!made) return KRASIS_ERR_MEMORY;
    const int32_t cpus = num_available_cpus();
    made->num_threads = num_threads > 0 ? num_threads : std::min(cpus, kMaxThreads);
    made->has_amx = chosen == KRASIS_ISA_AMX_INT8;
    made->isa = made->has_amx ? static_cast<int32_t>(KRASIS_ISA_AVX512_VNNI) : chosen;
    made->spins = made->num_threads <= cpus;
    if (!made->start(topology)) {
        delete made;
        return KRASIS_ERR_THREAD;
    }
    *pool = made;
    return KRASIS_OK;
}

int32_t krasis_pool_create(int32_t num_threads, int32_t isa, krasis_pool **pool) {
    try {
        return krasis::create_pool(num_threads, isa, machine_topology(), pool);
    } catch (const std::bad_alloc &) {
        return KRASIS_ERR_MEMORY;
    }
}

void krasis_pool_destroy(krasis_pool *pool) { delete pool; }
int32_t krasis_pool_num_threads(const krasis_pool *pool) { return pool ? pool->num_threads : 0; }
int32_t krasis_pool_set_spin(krasis_pool *pool, int64_t spin_ns) {
    if (!pool || spin_ns < 0 || spin_ns > kMaxSpinNs) return KRASIS_ERR_ARGUMENT;
    pool->spin_ns.store(spin_ns, std::memory_order_relaxed);
    return KRASIS_OK;
}
int32_t krasis_pool_isa(const krasis_pool *pool) { return pool ? pool->isa : KRASIS_ISA_AUTO; }
int32_t krasis_pool_has_amx(const krasis_pool *pool) { return pool && pool->has_amx; }

namespace krasis {

PoolSession::PoolSession(krasis_pool *pool) : pool_(pool) { pool_->callers.lock(); }
PoolSession::~PoolSession() { pool_->callers.unlock(); }

void *PoolSession::scratch(size_t bytes) {
    if (bytes > pool_->scratch_bytes) {
        std::free(pool_->scratch);
        const size_t rounded = (bytes + 4095) / 4096 * 4096;
        pool_->scratch = std::aligned_alloc(4096, rounded);
        pool_->scratch_bytes = pool_->scratch ? rounded : 0;
    }
    return pool_->scratch;
}

void PoolSession::run(const Phase *phases, int64_t num_phases) { pool_->run(phases, num_phases); }

void parallel_phases(krasis_pool *pool, const Phase *phases, int64_t num_phases) {
    PoolSession session(pool);
    session.run(phases, num_phases);
}

void parallel_run(krasis_pool *pool, int64_t count, int64_t grain, TaskFn fn, void *context) {
    if (pool->num_threads == 1) {  // no state of the pool is touched
        const int64_t step = std::max<int64_t>(grain, 1);
        for (int64_t begin = 0; begin < count; begin += step) fn(context, begin, std::min(begin + step, count), 0);
        return;
    }
    Phase phase;
    phase.fn = fn;
    phase.context = context;
    phase.count = count;
    phase.grain = grain;
    parallel_phases(pool, &phase, 1);
}

}  // namespace krasis
