// pool_state.h: what a pool consists of. Included by pool.cpp, which deals the work, and pool_api.cpp.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "pool.h"
#include "pool_times.h"

namespace krasis {

constexpr size_t kLine = 64;
constexpr int64_t kSpinNs = 40'000;
constexpr uint32_t kClosed = UINT32_MAX;    // piece number of a ticket whose phase is being set up
constexpr uint32_t kIdle = UINT32_MAX - 1;  // ... of a ticket without a job

inline uint64_t make_ticket(uint32_t number, uint32_t piece) { return (static_cast<uint64_t>(number) << 32) | piece; }
inline uint32_t ticket_piece(uint64_t ticket) { return static_cast<uint32_t>(ticket); }
inline uint32_t ticket_number(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 32); }

// Units [first, first + width) of every run of `period` units; period 0: all units.
struct Rows {
    int64_t period = 0, first = 0, width = 0;

    int64_t units_of(int64_t count) const;
    void call(TaskFn fn, void *context, int64_t begin, int64_t end, int32_t thread) const;
};

// What one node's threads take first of the current phase. Units are counted as this queue deals them: 0, 1, ...
struct alignas(kLine) PoolQueue {
    std::atomic<uint64_t> ticket{make_ticket(0, kClosed)};

    // Changed only while the ticket is closed.
    alignas(kLine) std::atomic<TaskFn> fn{nullptr};
    std::atomic<void *> context{nullptr};
    std::atomic<int64_t> count{0}, grain{1};
    std::atomic<uint32_t> pieces{0}, all_pieces{0};  // of this queue, of the phase
    std::atomic<uint32_t> max_taken{1}, num_takers{1};
    std::atomic<int64_t> period{0}, first{0}, width{0};

    // Sets what is dealt and returns the number of pieces.
    uint32_t set(const Phase &phase, int64_t step, const Rows &rows, int32_t takers);
};

struct Claim {
    TaskFn fn;
    void *context;
    int64_t begin, end;
    uint32_t taken, all_pieces;
    Rows rows;
};

}  // namespace krasis

struct krasis_pool {
    int32_t num_threads = 1;
    int32_t isa = KRASIS_ISA_AVX2;  // of its vectors
    bool has_amx = false;
    bool spins = true;
    std::atomic<int64_t> spin_ns{krasis::kSpinNs};
    std::vector<std::thread> workers;
    std::mutex callers;
    void *scratch = nullptr;
    size_t scratch_bytes = 0;

    // By node, usually one.
    std::vector<krasis::PoolQueue> queues;
    std::vector<int32_t> takers;  // threads of the node, at least 1
    std::vector<int32_t> homes;   // of each thread
    std::vector<int32_t> node_of_cpu;

    std::unique_ptr<krasis::PoolTimes> times;  // while they are noted; changed by who holds callers

    // Of the running job; touched by whoever opens a phase.
    const krasis::Phase *phases = nullptr;
    int64_t num_phases = 0, next_phase = 0;

    alignas(krasis::kLine) std::atomic<uint32_t> done{0};
    alignas(krasis::kLine) std::atomic<uint32_t> work_word{0};
    std::atomic<int32_t> sleepers{0};
    std::atomic<bool> stop{false};
    alignas(krasis::kLine) std::atomic<uint32_t> caller_word{0};
    std::atomic<bool> caller_asleep{false};

    ~krasis_pool();
    bool start(const krasis::Topology &topology);
    void dismiss();  // tells the workers to end
    void run(const krasis::Phase *list, int64_t length);
    void run_phases(const krasis::Phase *list, int64_t length);

  private:
    std::atomic<uint64_t> &ticket() { return queues[0].ticket; }
    const std::atomic<uint64_t> &ticket() const { return queues[0].ticket; }
    void place(const krasis::Topology &topology);
    void work(int32_t thread);
    int32_t home_of_caller() const;
    bool claim(int32_t home, krasis::Claim *piece, uint32_t *number);
    bool execute_one(int32_t thread, int32_t home, uint32_t *number);
    void open_next();
    uint32_t describe(const krasis::Phase &phase);
    bool spin(uint32_t number) const;
    void sleep_worker(uint32_t number);
    void sleep_caller(uint32_t number);
};
