// pool.cpp: how pieces of work are dealt to threads.
//
// A job is a list of phases. The pieces of the current phase are dealt through 64-bit tickets, (phase number << 32) |
// next piece, by compare-and-swap; whoever finishes the last piece of a phase opens the next one. Nobody waits for a
// thread that holds no piece: one that is asleep or descheduled costs nothing, which is what keeps throughput up when
// the cores are shared with other work.
//
// There is one queue, and so one ticket, for each NUMA node (usually one). A phase without a period is dealt from the
// first queue alone. A phase with one is split among the queues by rows; a thread takes from its own node's queue while
// there is work in it, then from the others', so that a node whose threads do not come is not waited for either.
//
// What a queue deals is read before the claim and is valid if the claim succeeds: the ticket is closed before it
// changes, and phase numbers are not reused within 2^31 phases. The first queue is opened last and has work in every
// phase, so a phase cannot end before it is open everywhere, and threads without work need to watch its ticket alone.
//
// Idle threads spin briefly, then sleep on a futex. With more threads than CPUs they sleep at once.
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>

#include "pool_state.h"

using namespace krasis;

namespace {

constexpr int64_t kMaxPieces = INT32_MAX;  // of one queue; rounding makes them one more a queue

void futex_wait(std::atomic<uint32_t> &word, uint32_t expected) {
    syscall(SYS_futex, reinterpret_cast<uint32_t *>(&word), FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t> &word, int count) {
    syscall(SYS_futex, reinterpret_cast<uint32_t *>(&word), FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

static_assert(std::atomic<uint64_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == 4);

// Takes the next pieces of a queue. False if there are none, or if the queue is not in phase `number`.
bool claim_from(PoolQueue &queue, uint32_t number, Claim *piece) {
    uint64_t seen = queue.ticket.load(std::memory_order_acquire);
    for (;;) {
        const uint32_t index = ticket_piece(seen);
        if (index >= kIdle || ticket_number(seen) != number) return false;
        const uint32_t total = queue.pieces.load(std::memory_order_acquire);
        if (index >= total) return false;
        const uint32_t share = (total - index) / (4u * queue.num_takers.load(std::memory_order_acquire));
        const uint32_t taken = std::clamp(share, 1u, queue.max_taken.load(std::memory_order_acquire));
        const int64_t step = queue.grain.load(std::memory_order_acquire);
        const int64_t size = queue.count.load(std::memory_order_acquire);
        piece->fn = queue.fn.load(std::memory_order_acquire);
        piece->context = queue.context.load(std::memory_order_acquire);
        piece->all_pieces = queue.all_pieces.load(std::memory_order_acquire);
        piece->rows.period = queue.period.load(std::memory_order_acquire);
        piece->rows.first = queue.first.load(std::memory_order_acquire);
        piece->rows.width = queue.width.load(std::memory_order_acquire);
        if (!queue.ticket.compare_exchange_weak(seen, seen + taken, std::memory_order_acq_rel,
                                                std::memory_order_acquire)) {
            continue;
        }
        piece->begin = index * step;
        piece->end = std::min(size, (static_cast<int64_t>(index) + taken) * step);
        piece->taken = taken;
        return true;
    }
}

}  // namespace

int64_t Rows::units_of(int64_t count) const {
    if (period == 0) return count;
    return count / period * width + std::clamp<int64_t>(count % period - first, 0, width);
}

// A piece may reach over the end of a run: one call for each stretch of neighbours.
void Rows::call(TaskFn fn, void *context, int64_t begin, int64_t end, int32_t thread) const {
    if (period == 0) return fn(context, begin, end, thread);
    while (begin < end) {
        const int64_t within = begin % width, length = std::min(width - within, end - begin);
        const int64_t unit = begin / width * period + first + within;
        fn(context, unit, unit + length, thread);
        begin += length;
    }
}

uint32_t PoolQueue::set(const Phase &phase, int64_t step, const Rows &rows, int32_t takers) {
    const int64_t units = rows.units_of(phase.count);
    const uint32_t total = static_cast<uint32_t>((units + step - 1) / step);
    fn.store(phase.fn, std::memory_order_release);
    context.store(phase.context, std::memory_order_release);
    count.store(units, std::memory_order_release);
    grain.store(step, std::memory_order_release);
    pieces.store(total, std::memory_order_release);
    max_taken.store(static_cast<uint32_t>(std::clamp<int64_t>(phase.max_grain / step, 1, kMaxPieces)),
                    std::memory_order_release);
    num_takers.store(static_cast<uint32_t>(takers), std::memory_order_release);
    period.store(rows.period, std::memory_order_release);
    first.store(rows.first, std::memory_order_release);
    width.store(rows.width, std::memory_order_release);
    return total;
}

// Takes pieces, from the home's queue if it has any. False if there are none; *number then tells which phase said so.
bool krasis_pool::claim(int32_t home, Claim *piece, uint32_t *number) {
    // Before the looking, and of one phase: else work that is being handed out now would be missed in the own queue and
    // found in another's.
    *number = ticket_number(ticket().load(std::memory_order_acquire));
    const size_t num_queues = queues.size();
    for (size_t i = 0, q = static_cast<size_t>(home); i < num_queues; ++i) {
        if (claim_from(queues[q], *number, piece)) return true;
        q = q + 1 < num_queues ? q + 1 : 0;
    }
    return false;
}

bool krasis_pool::execute_one(int32_t thread, int32_t home, uint32_t *number) {
    Claim piece;
    if (!claim(home, &piece, number)) return false;
    piece.rows.call(piece.fn, piece.context, piece.begin, piece.end, thread);
    if (done.fetch_add(piece.taken, std::memory_order_acq_rel) + piece.taken == piece.all_pieces) open_next();
    return true;
}

// Sets all queues for a phase, which must be closed, and returns the number of pieces.
uint32_t krasis_pool::describe(const Phase &phase) {
    const int64_t step = std::max(std::max<int64_t>(phase.grain, 1), phase.count / kMaxPieces + 1);
    const int64_t n = phase.period > 0 ? static_cast<int64_t>(queues.size()) : 1;
    uint32_t total = 0;
    for (int64_t i = 0; n > 1 && i < n; ++i) {
        const int64_t share = phase.mirrored ? n - 1 - i : i, first = first_unit(phase.period, n, share);
        const Rows rows{phase.period, first, first_unit(phase.period, n, share + 1) - first};
        const uint32_t pieces = queues[static_cast<size_t>(i)].set(phase, step, rows, takers[static_cast<size_t>(i)]);
        if (i == 0 && pieces == 0) break;  // the first queue has to have work: not split
        total += pieces;
    }
    if (total == 0) {
        total = queues[0].set(phase, step, Rows{}, num_threads);
        for (size_t i = 1; i < queues.size(); ++i) queues[i].pieces.store(0, std::memory_order_release);
    }
    for (PoolQueue &queue : queues) queue.all_pieces.store(total, std::memory_order_release);
    return total;
}

// Opens the next phase with work in it, or ends the job. Called with no piece outstanding.
void krasis_pool::open_next() {
    const uint32_t number = ticket_number(ticket().load(std::memory_order_relaxed));
    while (next_phase < num_phases && phases[next_phase].count <= 0) ++next_phase;
    if (next_phase == num_phases) {
        ticket().store(make_ticket(number + 1, kIdle), std::memory_order_seq_cst);
    } else {
        for (PoolQueue &queue : queues) queue.ticket.store(make_ticket(number + 1, kClosed), std::memory_order_seq_cst);
        const uint32_t total = describe(phases[next_phase++]);
        done.store(0, std::memory_order_release);
        for (size_t i = queues.size(); i-- > 0;) {
            queues[i].ticket.store(make_ticket(number + 2, 0), std::memory_order_seq_cst);
        }
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
            if (ticket_number(ticket().load(std::memory_order_relaxed)) != number) return true;
            __builtin_ia32_pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

void krasis_pool::sleep_worker(uint32_t number) {
    const uint32_t word = work_word.load(std::memory_order_seq_cst);
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    const bool same = ticket_number(ticket().load(std::memory_order_seq_cst)) == number;
    if (same && !stop.load(std::memory_order_seq_cst)) futex_wait(work_word, word);
    sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

void krasis_pool::sleep_caller(uint32_t number) {
    const uint32_t word = caller_word.load(std::memory_order_seq_cst);
    caller_asleep.store(true, std::memory_order_seq_cst);
    if (ticket_number(ticket().load(std::memory_order_seq_cst)) == number) futex_wait(caller_word, word);
    caller_asleep.store(false, std::memory_order_seq_cst);
}

void krasis_pool::work(int32_t thread) {
    const int32_t home = homes[static_cast<size_t>(thread)];
    uint32_t number = 0;
    while (!stop.load(std::memory_order_acquire)) {
        if (execute_one(thread, home, &number)) continue;
        if (!spin(number)) sleep_worker(number);
    }
}

void krasis_pool::dismiss() {
    stop.store(true, std::memory_order_seq_cst);
    ticket().store(make_ticket(ticket_number(ticket().load()) + 1, kIdle), std::memory_order_seq_cst);
    work_word.fetch_add(1, std::memory_order_seq_cst);
    futex_wake(work_word, INT_MAX);
}

// The caller's thread is not ours to bind: it takes the work of the node it happens to run on.
int32_t krasis_pool::home_of_caller() const {
    if (queues.size() == 1) return 0;
    const int cpu = sched_getcpu();
    return cpu >= 0 && static_cast<size_t>(cpu) < node_of_cpu.size() ? node_of_cpu[static_cast<size_t>(cpu)] : 0;
}

void krasis_pool::run(const Phase *list, int64_t length) {
    times ? times->run(*this, list, length) : run_phases(list, length);
}

void krasis_pool::run_phases(const Phase *list, int64_t length) {
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
    const int32_t home = home_of_caller();
    uint32_t number = 0;
    for (;;) {
        if (execute_one(0, home, &number)) continue;
        if (ticket_piece(ticket().load(std::memory_order_acquire)) == kIdle) break;
        if (!spin(number)) sleep_caller(number);
    }
}
