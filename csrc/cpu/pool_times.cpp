// pool_times.cpp: wraps every piece of a job in two looks at the clock.
#include "pool_times.h"

#include <algorithm>
#include <chrono>
#include <new>

#include "pool_state.h"

namespace krasis {
namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

}  // namespace

void PoolTimes::run_piece(void *context, int64_t begin, int64_t end, int32_t thread) {
    const Timed &timed = *static_cast<Timed *>(context);
    Thread &own = timed.times->threads_[static_cast<size_t>(thread)];
    const Clock::time_point start = Clock::now();
    timed.phase->fn(timed.phase->context, begin, end, thread);
    own.busy_s[timed.index] += since(start);
    ++own.num_pieces;
}

void PoolTimes::run(krasis_pool &pool, const Phase *list, int64_t length) {
    timed_.clear();
    phases_.assign(list, list + length);
    for (int64_t i = 0; i < length; ++i) {
        timed_.push_back({list + i, this, static_cast<int>(std::min<int64_t>(i, kPhases - 1))});
    }
    for (size_t i = 0; i < phases_.size(); ++i) {
        phases_[i].fn = run_piece;
        phases_[i].context = &timed_[i];
    }
    const Clock::time_point start = Clock::now();
    pool.run_phases(phases_.data(), length);
    job_s_ += since(start);
    ++num_jobs_;
    num_phases_ += length;
}

void PoolTimes::report(krasis_pool_times *times, double *busy_s) const {
    *times = krasis_pool_times{};
    times->num_jobs = num_jobs_;
    times->num_phases = num_phases_;
    times->job_s = job_s_;
    for (size_t t = 0; t < threads_.size(); ++t) {
        busy_s[t] = 0;
        times->num_pieces += threads_[t].num_pieces;
        for (int i = 0; i < kPhases; ++i) {
            busy_s[t] += threads_[t].busy_s[i];
            times->first_phases_s[i] += threads_[t].busy_s[i];
        }
    }
}

}  // namespace krasis

int32_t krasis_pool_time_start(krasis_pool *pool) {
    if (!pool) return KRASIS_ERR_ARGUMENT;
    std::lock_guard<std::mutex> held(pool->callers);
    pool->times.reset(new (std::nothrow) krasis::PoolTimes(pool->num_threads));
    return pool->times ? KRASIS_OK : KRASIS_ERR_MEMORY;
}

int32_t krasis_pool_time_end(krasis_pool *pool, krasis_pool_times *times, double *busy_s) {
    if (!pool || !times || !busy_s) return KRASIS_ERR_ARGUMENT;
    std::lock_guard<std::mutex> held(pool->callers);
    if (!pool->times) return KRASIS_ERR_RANGE;
    pool->times->report(times, busy_s);
    pool->times.reset();
    return KRASIS_OK;
}
