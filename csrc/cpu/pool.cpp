// pool.cpp: the thread pool.
//
// A job is a list of phases. The pieces of the current phase are dealt through one 64-bit ticket, (phase number << 32)
// | next piece, by compare-and-swap; whoever finishes the last piece of a phase opens the next one. Nobody waits for a
// thread that holds no piece: one that is asleep or descheduled costs nothing, which is what keeps throughput up when
// the cores are shared with other work.
//
// The description of the current phase is read before the claim and is valid if the claim succeeds: the ticket is
// closed before the description changes, and phase numbers are not reused within 2^31 phases.
//
// Idle threads spin briefly, then sleep on a futex. With more threads than CPUs they sleep at once.
#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "probe.h"

namespace {

constexpr int32_t kMaxThreads = 4096;
constexpr uint32_t kClosed = UINT32_MAX;    // piece number of a ticket whose phase is being set up
constexpr uint32_t kIdle = UINT32_MAX - 1;  // ... of a ticket without a job
constexpr int64_t kMaxPieces = UINT32_MAX - 2;
constexpr int64_t kSpinNs = 40'000, kMaxSpinNs = 1'000'000'000;
constexpr size_t kLine = 64;

struct Claim {
    krasis::TaskFn fn;
    void *context;
    int64_t begin, end;
    uint32_t taken, pieces;
};

void futex_wait(std::atomic<uint32_t> &word, uint32_t expected) {
    syscall(SYS_futex, reinterpret_cast<uint32_t *>(&word), FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t> &word, int count) {
    syscall(SYS_futex, reinterpret_cast<uint32_t *>(&word), FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

static_assert(std::atomic<uint64_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == 4);

uint64_t make_ticket(uint32_t number, uint32_t piece) { return (static_cast<uint64_t>(number) << 32) | piece; }
uint32_t ticket_piece(uint64_t ticket) { return static_cast<uint32_t>(ticket); }
uint32_t ticket_number(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 32); }

}  // namespace

struct krasis_pool {
    int32_t num_threads = 1;
    int32_t isa = KRASIS_ISA_AVX2;
    bool spins = true;
    std::atomic<int64_t> spin_ns{kSpinNs};
    std::vector<std::thread> workers;
    std::mutex callers;
    void *scratch = nullptr;
    size_t scratch_bytes = 0;

    // Of the running job; touched by whoever opens a phase.
    const krasis::Phase *phases = nullptr;
    int64_t num_phases = 0, next_phase = 0;

    // Of the current phase.
    std::atomic<krasis::TaskFn> fn{nullptr};
    std::atomic<void *> context{nullptr};
    std::atomic<int64_t> count{0}, grain{1};
    std::atomic<uint32_t> pieces{0}, max_taken{1};

    alignas(kLine) std::atomic<uint64_t> ticket{make_ticket(0, kIdle)};
    alignas(kLine) std::atomic<uint32_t> done{0};
    alignas(kLine) std::atomic<uint32_t> work_word{0};
    std::atomic<int32_t> sleepers{0};
    std::atomic<bool> stop{false};
    alignas(kLine) std::atomic<uint32_t> caller_word{0};
    std::atomic<bool> caller_asleep{false};

    ~krasis_pool();
    bool start();
    void work(int32_t thread);
    void run(const krasis::Phase *list, int64_t length);

  private:
    bool claim(Claim *piece, uint32_t *number);
    bool execute_one(int32_t thread, uint32_t *number);
    void open_next();
    bool spin(uint32_t number) const;
    void sleep_worker(uint32_t number);
    void sleep_caller(uint32_t number);
};

// Takes the next pieces of the open phase. False if there are none; *number then tells which ticket said so.
bool krasis_pool::claim(Claim *piece, uint32_t *number) {
    uint64_t seen = ticket.load(std::memory_order_acquire);
    for (;;) {
        *number = ticket_number(seen);
        const uint32_t index = ticket_piece(seen);
        if (index >= kIdle) return false;
        const uint32_t total = pieces.load(std::memory_order_acquire);
        if (index >= total) return false;
        const uint32_t share = (total - index) / (4u * static_cast<uint32_t>(num_threads));
        const uint32_t taken = std::clamp(share, 1u, max_taken.load(std::memory_order_acquire));
        const int64_t step = grain.load(std::memory_order_acquire);
        const int64_t size = count.load(std::memory_order_acquire);
        piece->fn = fn.load(std::memory_order_acquire);
        piece->context = context.load(std::memory_order_acquire);
        if (!ticket.compare_exchange_weak(seen, seen + taken, std::memory_order_acq_rel, std::memory_order_acquire)) {
            continue;
        }
        piece->begin = index * step;
        piece->end = std::min(size, (static_cast<int64_t>(index) + taken) * step);
        piece->taken = taken;
        piece->pieces = total;
        return true;
    }
}

bool krasis_pool::execute_one(int32_t thread, uint32_t *number) {
    Claim piece;
    if (!claim(&piece, number)) return false;
    piece.fn(piece.context, piece.begin, piece.end, thread);
    if (done.fetch_add(piece.taken, std::memory_order_acq_rel) + piece.taken == piece.pieces) open_next();
    return true;
}

// Opens the next phase with work in it, or ends the job. Called with no piece outstanding.
void krasis_pool::open_next() {
    const uint32_t number = ticket_number(ticket.load(std::memory_order_relaxed));
    while (next_phase < num_phases && phases[next_phase].count <= 0) ++next_phase;
    if (next_phase == num_phases) {
        ticket.store(make_ticket(number + 1, kIdle), std::memory_order_seq_cst);
    } else {
        const krasis::Phase &phase = phases[next_phase++];
        ticket.store(make_ticket(number + 1, kClosed), std::memory_order_seq_cst);
        const int64_t step = std::max(std::max<int64_t>(phase.grain, 1), phase.count / kMaxPieces + 1);
        const int64_t total = (phase.count + step - 1) / step;
        done.store(0, std::memory_order_release);
        fn.store(phase.fn, std::memory_order_release);
        context.store(phase.context, std::memory_order_release);
        count.store(phase.count, std::memory_order_release);
        grain.store(step, std::memory_order_release);
        pieces.store(static_cast<uint32_t>(total), std::memory_order_release);
        max_taken.store(static_cast<uint32_t>(std::clamp<int64_t>(phase.max_grain / step, 1, kMaxPieces)),
                        std::memory_order_release);
        ticket.store(make_ticket(number + 2, 0), std::memory_order_seq_cst);
        const int32_t asleep = sleepers.load(std::memory_order_seq_cst);
        if (asleep > 0 && total > 1) {
            work_word.fetch_add(1, std::memory_order_seq_cst);
            futex_wake(work_word, static_cast<int>(std::min<int64_t>(asleep, total - 1)));
        }
    }
    if (caller_asleep.load(std::memory_order_seq_cst)) {
        caller_word.fetch_add(1, std::memory_order_seq_cst);
        futex_wake(caller_word, 1);
    }
}

// True once the ticket is another than `number`; false after the spinning time.
bool krasis_pool::spin(uint32_t number) const {
    if (!spins) return false;
    const auto end =
        std::chrono::steady_clock::now() + std::chrono::nanoseconds(spin_ns.load(std::memory_order_relaxed));
    do {
        for (int i = 0; i < 16; ++i) {
            if (ticket_number(ticket.load(std::memory_order_relaxed)) != number) return true;
            __builtin_ia32_pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

void krasis_pool::sleep_worker(uint32_t number) {
    const uint32_t word = work_word.load(std::memory_order_seq_cst);
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    const bool same = ticket_number(ticket.load(std::memory_order_seq_cst)) == number;
    if (same && !stop.load(std::memory_order_seq_cst)) futex_wait(work_word, word);
    sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

void krasis_pool::sleep_caller(uint32_t number) {
    const uint32_t word = caller_word.load(std::memory_order_seq_cst);
    caller_asleep.store(true, std::memory_order_seq_cst);
    if (ticket_number(ticket.load(std::memory_order_seq_cst)) == number) futex_wait(caller_word, word);
    caller_asleep.store(false, std::memory_order_seq_cst);
}

void krasis_pool::work(int32_t thread) {
    uint32_t number = 0;
    while (!stop.load(std::memory_order_acquire)) {
        if (execute_one(thread, &number)) continue;
        if (!spin(number)) sleep_worker(number);
    }
}

void krasis_pool::run(const krasis::Phase *list, int64_t length) {
    bool worth_waking = false;
    for (int64_t i = 0; i < length; ++i) worth_waking |= list[i].count > std::max<int64_t>(list[i].grain, 1);
    if (num_threads == 1 || !worth_waking) {
        for (int64_t i = 0; i < length; ++i) {
            const int64_t step = std::max<int64_t>({list[i].grain, list[i].max_grain, 1});
            for (int64_t begin = 0; begin < list[i].count; begin += step) {
                list[i].fn(list[i].context, begin, std::min(begin + step, list[i].count), 0);
            }
        }
        return;
    }
    phases = list;
    num_phases = length;
    next_phase = 0;
    open_next();
    uint32_t number = 0;
    for (;;) {
        if (execute_one(0, &number)) continue;
        if (ticket_piece(ticket.load(std::memory_order_acquire)) == kIdle) break;
        if (!spin(number)) sleep_caller(number);
    }
}

bool krasis_pool::start() {
    // Signals belong to the program's own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool ok = true;
    try {
        workers.reserve(static_cast<size_t>(num_threads - 1));
        for (int32_t i = 1; i < num_threads; ++i) {
            workers.emplace_back([this, i] { work(i); });
            char name[24];
            std::snprintf(name, sizeof name, "krasis-%d", i);
            name[15] = '\0';  // the kernel takes 15 characters
            pthread_setname_np(workers.back().native_handle(), name);
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
    stop.store(true, std::memory_order_seq_cst);
    ticket.store(make_ticket(ticket_number(ticket.load()) + 1, kIdle), std::memory_order_seq_cst);
    work_word.fetch_add(1, std::memory_order_seq_cst);
    futex_wake(work_word, INT_MAX);
    for (std::thread &worker : workers) worker.join();
    std::free(scratch);
}

int32_t krasis_pool_create(int32_t num_threads, int32_t isa, krasis_pool **pool) {
    if (!pool) return KRASIS_ERR_ARGUMENT;
    *pool = nullptr;
    if (num_threads < 0 || num_threads > kMaxThreads) return KRASIS_ERR_ARGUMENT;
    if (isa < KRASIS_ISA_AUTO || isa > KRASIS_ISA_AVX512_VNNI) return KRASIS_ERR_ARGUMENT;
    const int32_t chosen = krasis::resolve_isa(isa);
    if (chosen == KRASIS_ISA_AUTO) return KRASIS_ERR_ISA;
    krasis_pool *made = new (std::nothrow) krasis_pool;
    if (!made) return KRASIS_ERR_MEMORY;
    const int32_t cpus = krasis::num_available_cpus();
    made->num_threads = num_threads > 0 ? num_threads : std::min(cpus, kMaxThreads);
    made->isa = chosen;
    made->spins = made->num_threads <= cpus;
    if (!made->start()) {
        delete made;
        return KRASIS_ERR_THREAD;
    }
    *pool = made;
    return KRASIS_OK;
}

void krasis_pool_destroy(krasis_pool *pool) { delete pool; }
int32_t krasis_pool_num_threads(const krasis_pool *pool) { return pool ? pool->num_threads : 0; }
int32_t krasis_pool_set_spin(krasis_pool *pool, int64_t spin_ns) {
    if (!pool || spin_ns < 0 || spin_ns > kMaxSpinNs) return KRASIS_ERR_ARGUMENT;
    pool->spin_ns.store(spin_ns, std::memory_order_relaxed);
    return KRASIS_OK;
}
int32_t krasis_pool_isa(const krasis_pool *pool) { return pool ? pool->isa : KRASIS_ISA_AUTO; }

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
