// simt_host.cpp: fibers, barriers and collectives of the host shim.
#include <sys/mman.h>

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <new>

#include "simt_host_state.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the host shim switches fibers with x86-64 code"
#endif

// Saves the callee-saved registers on the running stack, stores its pointer, and continues on another stack.
asm(R"(
.text
.globl krasis_simt_switch
.type krasis_simt_switch, @function
krasis_simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size krasis_simt_switch, .-krasis_simt_switch
)");
extern "C" void krasis_simt_switch(void **save, void *load);

namespace krasis::simt {

Thread *current = nullptr;
Block block;
FaultPlan planned_fault;

namespace {

constexpr size_t kStackBytes = 256 * 1024, kGuardBytes = 4096;

char report[512];
void (*entry_point)(const void *) = nullptr;
const void *entry_params = nullptr;
Thread launcher;                       // the caller of run, as a place to return to
const void *launcher_stack = nullptr;  // its stack, as AddressSanitizer told
[[maybe_unused]] size_t launcher_stack_bytes = 0;

// Stacks live as long as the process: a fiber that an error left behind is simply never resumed.
struct Stacks {
    uint8_t *base = nullptr;
    unsigned count = 0;

    void reserve(unsigned num) {
        if (num <= count) return;
        if (base) munmap(base, count * kStackBytes);
        void *mapped = mmap(nullptr, num * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) throw std::bad_alloc();
        base = static_cast<uint8_t *>(mapped);
        count = num;
        for (unsigned i = 0; i < num; ++i) mprotect(base + i * kStackBytes, kGuardBytes, PROT_NONE);
    }
    uint8_t *bottom(unsigned i) const { return base + i * kStackBytes + kGuardBytes; }
    static constexpr size_t usable() { return kStackBytes - kGuardBytes; }
};
Stacks stacks;

void switch_to(Thread &to, bool forever = false) {
    Thread &from = *current;
    current = &to;
#if defined(__SANITIZE_ADDRESS__)
    const bool home = &to == &launcher;
    __sanitizer_start_switch_fiber(forever ? nullptr : &from.fake_stack,
                                   home ? launcher_stack : stacks.bottom(to.index),
                                   home ? launcher_stack_bytes : Stacks::usable());
#else
    (void)forever;
#endif
    krasis_simt_switch(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// Gives way to the next thread that can run. Returns when this one may go on.
void yield(bool forever = false) {
    const unsigned count = block.num_threads;
    unsigned next = current->index;
    for (unsigned i = 0; i < count; ++i) {
        next = next + 1 == count ? 0 : next + 1;
        if (block.threads[next].wait == Wait::kNone) {
            if (&block.threads[next] != current) switch_to(block.threads[next], forever);
            return;
        }
    }
    const Thread *stuck[2] = {};
    for (const Thread &thread : block.threads) {
        if (thread.wait == Wait::kLanes) stuck[0] = &thread;
        if (thread.wait == Wait::kBlock) stuck[1] = &thread;
    }
    if (stuck[0]) {
        const Thread *warp = &block.threads[stuck[0]->index / kWarp * kWarp];
        int absent = 0;
        while (warp[absent].wait == Wait::kLanes) ++absent;
        fail("%s, but %s", describe_thread(*stuck[0]).text, describe_thread(warp[absent]).text);
    }
    if (stuck[1]) fail("no thread can go on; for one, %s", describe_thread(*stuck[1]).text);
    switch_to(launcher, forever);
}

void finish_thread() {
    if (block.is_beside && !current->has_waited) fail("ended without having waited for the launches ahead");
    current->wait = Wait::kDone;
    if (block.num_at_barrier) fail("ended while others wait at a barrier");
    yield(true);
    std::abort();  // nobody resumes a finished thread
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    const void *stack = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
    if (!launcher_stack) launcher_stack = stack, launcher_stack_bytes = bytes;
#endif
    entry_point(entry_params);
    finish_thread();
}

void prepare_thread(unsigned index) {
    Thread &thread = block.threads[index];
    thread = Thread{};
    thread.index = index;
    uint8_t *bottom = stacks.bottom(index);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(bottom, Stacks::usable());
#endif
    // What krasis_simt_switch pops: six registers and the address it returns to. On entry of a function the stack is
    // eight short of a multiple of sixteen.
    void **top = reinterpret_cast<void **>(bottom + Stacks::usable() - 64);
    top[6] = reinterpret_cast<void *>(&fiber_main);
    top[7] = nullptr;
    for (int i = 0; i < 6; ++i) top[i] = nullptr;
    thread.stack_pointer = top;
}

void run_block(unsigned index) {
    block.index = index;
    block.num_at_barrier = 0;
    block.interval = 1;
    memset(block.shared, 0xff, block.shared_bytes);
    reset_cells();
    for (unsigned i = 0; i < block.num_threads; ++i) prepare_thread(i);
    current = &launcher;
    launcher_stack = nullptr;
    switch_to(block.threads[0]);
}

}  // namespace

unsigned thread_x() { return current->index; }
unsigned block_x() { return block.index; }
unsigned num_threads() { return block.num_threads; }
unsigned num_blocks() { return block.num_blocks; }
uint8_t *shared_memory() { return block.shared; }
const char *last_report() { return report; }

Text describe_thread(const Thread &thread) {
    Text result;
    const char *doing = thread.wait == Wait::kDone    ? "has ended"
                        : thread.wait == Wait::kBlock ? "waits at a barrier"
                        : thread.wait == Wait::kLanes ? "waits in "
                                                      : "runs";
    std::snprintf(result.text, sizeof(result.text), "thread %u %s%s", thread.index, doing,
                  thread.wait == Wait::kLanes ? thread.collective_name : "");
    return result;
}

void fail(const char *format, ...) {
    const int prefix = std::snprintf(report, sizeof(report), "block %u, thread %u: ", block.index, current->index);
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(report + prefix, sizeof(report) - static_cast<size_t>(prefix), format, arguments);
    va_end(arguments);
    switch_to(launcher, true);
    std::abort();  // nobody resumes it
}

void sync_threads() {
    if (planned_fault.fault == Fault::kNoBarrier && current->num_barriers++ >= planned_fault.from) return;
    for (const Thread &thread : block.threads) {
        if (thread.wait == Wait::kDone) fail("at a barrier, but thread %u has ended", thread.index);
    }
    if (++block.num_at_barrier < block.num_threads) {
        current->wait = Wait::kBlock;
        return yield();
    }
    block.num_at_barrier = 0;
    ++block.interval;
    for (Thread &thread : block.threads) {
        if (thread.wait == Wait::kBlock) thread.wait = Wait::kNone;
    }
}

void collective(const char *name, void *argument, Perform perform) {
    Thread *warp = &block.threads[current->index / kWarp * kWarp];
    // The warp's state of affairs: how many lanes have come, and to what. Kept by lane 0.
    unsigned &num_waiting = warp->num_lanes_waiting;
    if (num_waiting && warp->warp_collective != name && strcmp(warp->warp_collective, name) != 0) {
        fail("in %s, but other lanes wait in %s", name, warp->warp_collective);
    }
    current->wait = Wait::kLanes;
    current->collective_name = warp->warp_collective = name;
    current->argument = argument;
    if (++num_waiting < kWarp) return yield();
    num_waiting = 0;
    void *lanes[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) lanes[lane] = warp[lane].argument;
    perform(lanes);
    for (int lane = 0; lane < kWarp; ++lane) warp[lane].wait = Wait::kNone;
}

uint32_t ballot(bool predicate) {
    struct Argument {
        bool in;
        uint32_t out;
    } own{predicate, 0};
    collective("ballot", &own, [](void *const *lanes) {
        uint32_t bits = 0;
        for (int lane = 0; lane < kWarp; ++lane) {
            bits |= static_cast<uint32_t>(static_cast<Argument *>(lanes[lane])->in) << lane;
        }
        for (int lane = 0; lane < kWarp; ++lane) static_cast<Argument *>(lanes[lane])->out = bits;
    });
    return own.out;
}

void wait_for_previous() { current->has_waited = true; }

bool run(const LaunchShape &shape, void (*entry)(const void *), const void *params, bool beside) {
    report[0] = 0;
    if (!shape.blocks) return true;
    if (!shape.threads || shape.threads > 1024 || shape.threads % kWarp) {
        std::snprintf(report, sizeof(report), "a block must have 32 to 1024 threads, a multiple of 32");
        return false;
    }
    entry_point = entry;
    entry_params = params;
    stacks.reserve(shape.threads);
    block.num_blocks = shape.blocks;
    block.is_beside = beside;
    block.num_threads = shape.threads;
    block.threads.resize(shape.threads);
    block.shared_bytes = shape.shared_bytes;
    block.shared = static_cast<uint8_t *>(::operator new(shape.shared_bytes, std::align_val_t{1024}));
    for (unsigned i = 0; i < shape.blocks && !report[0]; ++i) {
        run_block(i);
        const Thread *open = thread_with_open_copies();
        if (open && !report[0]) {
            std::snprintf(report, sizeof(report), "block %u, thread %u: ended with a cp.async not waited for", i,
                          open->index);
        }
    }
    ::operator delete(block.shared, std::align_val_t{1024});
    return !report[0];
}

uint64_t clock_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
}

void rest_ns(uint32_t duration) {
    const timespec time{0, static_cast<long>(duration)};
    nanosleep(&time, nullptr);
}

uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t choice = selector >> (4 * i) & 7;
        result |= static_cast<uint32_t>(both >> (8 * choice) & 0xff) << (8 * i);
    }
    return result;
}

float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
float divide(float a, float b) { return a / b; }
float reciprocal(float x) { return 1.0f / x; }
float quotient(float a, float b) { return a / b; }
float round_even(float x) { return std::nearbyint(x); }
float exp_float(float x) { return std::exp(x); }
float reciprocal_sqrt(float x) { return 1.0f / std::sqrt(x); }
float square_root(float x) { return std::sqrt(x); }
float log1p_float(float x) { return std::log1p(x); }

}  // namespace krasis::simt
