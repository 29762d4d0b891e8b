// flags.cpp: the words by which CPU and GPU hand work to each other.
#include <sched.h>

#include <chrono>

#include "krasis.h"

namespace {

using Clock = std::chrono::steady_clock;

// The other side usually answers within this time, and being woken costs more than looking.
constexpr std::chrono::microseconds kSpin{2000};
constexpr int kLooksPerClock = 32;

bool is_flag(const uint64_t *flag) { return flag && reinterpret_cast<uintptr_t>(flag) % sizeof(*flag) == 0; }

}  // namespace

int32_t krasis_wait_flag(const uint64_t *flag, uint64_t value, int64_t timeout_ns) {
    if (!is_flag(flag) || timeout_ns < 0) return KRASIS_ERR_ARGUMENT;
    auto is_set = [&] { return __atomic_load_n(flag, __ATOMIC_ACQUIRE) >= value; };
    if (is_set()) return KRASIS_OK;
    const Clock::time_point start = Clock::now();
    for (;;) {
        for (int i = 0; i < kLooksPerClock; ++i) {
            if (is_set()) return KRASIS_OK;
            __builtin_ia32_pause();
        }
        const Clock::duration waited = Clock::now() - start;
        // A last look: this thread may have been off the CPU for all of the time.
        if (waited >= std::chrono::nanoseconds(timeout_ns)) return is_set() ? KRASIS_OK : KRASIS_ERR_TIMEOUT;
        if (waited >= kSpin) sched_yield();
    }
}

int32_t krasis_store_flag(uint64_t *flag, uint64_t value) {
    if (!is_flag(flag)) return KRASIS_ERR_ARGUMENT;
    __atomic_store_n(flag, value, __ATOMIC_RELEASE);
    return KRASIS_OK;
}
