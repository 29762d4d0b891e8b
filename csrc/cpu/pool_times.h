// pool_times.h: what the threads of a pool do with their time, noted on demand.
#pragma once

#include <vector>

#include "pool.h"

namespace krasis {

class PoolTimes {
  public:
    static constexpr int kPhases = 4;  // told apart within a job; the last stands for all later ones

    explicit PoolTimes(int32_t num_threads) : threads_(static_cast<size_t>(num_threads)) {}
    void run(krasis_pool &pool, const Phase *list, int64_t length);
    void report(krasis_pool_times *times, double *busy_s) const;

  private:
    // Written by one thread, on lines of its own.
    struct alignas(64) Thread {
        double busy_s[kPhases] = {};
        int64_t num_pieces = 0;
    };
    struct Timed {
        const Phase *phase;
        PoolTimes *times;
        int index;
    };
    static void run_piece(void *context, int64_t begin, int64_t end, int32_t thread);

    std::vector<Thread> threads_;
    std::vector<Timed> timed_;
    std::vector<Phase> phases_;
    int64_t num_jobs_ = 0, num_phases_ = 0;
    double job_s_ = 0;
};

}  // namespace krasis
