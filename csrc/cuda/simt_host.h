// simt_host.h: the shim on the host. Blocks run one after another; the threads of a block are fibers that switch at
// barriers and collectives. What a GPU would leave undefined is an error here, with a sentence that says what happened:
// lanes missing from a collective, threads missing from a barrier, and, for shared memory, reading what nothing wrote,
// reading bytes of a cp.async before it was waited for, and any access that races with another thread's since the last
// barrier. The first error ends the launch. One launch at a time: the state is global.
#pragma once

#include <type_traits>

namespace krasis::simt {

// ---- the running thread (simt_host.cpp)

struct Thread;
extern Thread *current;

unsigned thread_x();
unsigned block_x();
unsigned num_threads();
unsigned num_blocks();
uint8_t *shared_memory();

// Ends the launch with a report. Does not return; nothing on the fiber's stack is destroyed, so callers own no memory.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char *format, ...);

// Mistakes that tests put into kernels from outside, to see that the watch would have noticed them.
enum class Fault { kNone, kNoWait, kWaitOneLess, kNoBarrier };
struct FaultPlan {
    Fault fault = Fault::kNone;
    unsigned from = 0;  // each thread's waits, or barriers, before this one are as they should be
};
extern FaultPlan planned_fault;

// beside: the launch may begin before those ahead of it have ended, so every thread must wait for them.
bool run(const LaunchShape &shape, void (*entry)(const void *), const void *params, bool beside = false);
// What went wrong in the last launch; empty if nothing did.
const char *last_report();

// ---- barriers and collectives

void sync_threads();

// Called by each lane of a warp with its own argument; the last one to come performs the operation for all 32.
using Perform = void (*)(void *const *lanes);
void collective(const char *name, void *argument, Perform perform);

template <class T>
struct ShuffleArgument {
    T in, out;
    int source;
};

template <class T>
T shuffle_from(const char *name, T value, int source) {
    ShuffleArgument<T> argument{value, value, source};
    collective(name, &argument, [](void *const *lanes) {
        for (int lane = 0; lane < kWarp; ++lane) {
            auto *own = static_cast<ShuffleArgument<T> *>(lanes[lane]);
            own->out = static_cast<ShuffleArgument<T> *>(lanes[own->source])->in;
        }
    });
    return argument.out;
}
template <class T>
T shuffle(T value, int source_lane) {
    return shuffle_from("shuffle", value, source_lane & 31);
}
template <class T>
T shuffle_up(T value, int distance) {
    const int lane = static_cast<int>(thread_x() % kWarp);
    return shuffle_from("shuffle_up", value, lane < distance ? lane : lane - distance);
}
template <class T>
T shuffle_xor(T value, int lane_mask) {
    return shuffle_from("shuffle_xor", value, static_cast<int>(thread_x() % kWarp) ^ lane_mask);
}
uint32_t ballot(bool predicate);

// ---- shared memory, watched (simt_host_memory.cpp)

void watch_read(const void *shared, size_t bytes);
void watch_write(const void *shared, size_t bytes);

template <class T>
T shared_load(const void *shared) {
    static_assert(std::is_trivially_copyable_v<T>);
    watch_read(shared, sizeof(T));
    T value;
    memcpy(&value, shared, sizeof(T));
    return value;
}
template <class T>
void shared_store(void *shared, T value) {
    static_assert(std::is_trivially_copyable_v<T>);
    watch_write(shared, sizeof(T));
    memcpy(shared, &value, sizeof(T));
}
int32_t shared_atomic_add(int32_t *shared, int32_t value);
inline void global_atomic_add(int32_t *global, int32_t value) { *global += value; }
inline void global_atomic_add(unsigned long long *global, unsigned long long value) { *global += value; }

inline float load_written(const float *global) { return *global; }
inline uint16_t load_written(const uint16_t *global) { return *global; }
// Blocks run one after another: the last to come is the last of all, or not.
inline bool arrive_last(uint32_t *counter, uint32_t expected) {
    *counter = *counter + 1 == expected ? 0 : *counter + 1;
    return *counter == 0;
}
template <class Words>
Words load_if(const uint8_t *global, bool valid) {
    Words words{};
    if (valid) memcpy(&words, global, sizeof(words));
    return words;
}
inline Words4 load_once(const uint8_t *global, bool valid) { return load_if<Words4>(global, valid); }
inline Words2 load_early2(const uint8_t *global, bool valid) { return load_if<Words2>(global, valid); }
inline uint32_t load_early1(const uint8_t *global, bool valid) { return load_if<uint32_t>(global, valid); }
inline void prefetch_before_wait(const uint8_t *, int64_t, int, int) {}

// A thread that ends without having waited is an error where the launch may have begun early.
void wait_for_previous();
inline void let_next_begin() {}

// The bytes arrive when the group is waited for; until then the destination holds NaNs and may not be touched.
void cp_async16(void *shared, const void *global, bool valid);
void cp_async_commit();
void cp_async_wait_for(int pending);
template <int kPending>
void cp_async_wait() {
    cp_async_wait_for(kPending);
}

// ---- words that another thread of the host reads and writes at the same time

inline void store_release_system(uint64_t *word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }
inline uint64_t load_acquire_system(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
uint64_t clock_ns();
// Gives the CPU to other threads of the host, which may have to store what is waited for.
void rest_ns(uint32_t duration);

// ---- tensor cores (simt_host_mma.cpp)

void ldmatrix_x4(uint32_t (&r)[4], const void *shared_row);
void ldmatrix_x4_transposed(uint32_t (&r)[4], const void *shared_row);
void ldmatrix_x2(uint32_t (&r)[2], const void *shared_row);
uint32_t transpose_8x8(uint32_t own);
void mma(Bf16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma(F16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// ---- products of a warpgroup (simt_host_wgmma.cpp): performed as late as allowed, when they are waited for

void wgmma_record(Bf16, float (*d)[4], int num_tiles, const uint32_t *a, const uint8_t *tile, int k16);
void wgmma_record(F16, float (*d)[4], int num_tiles, const uint32_t *a, const uint8_t *tile, int k16);
template <class Type, int kTiles>
void wgmma(Type type, float (&d)[kTiles][4], const uint32_t (&a)[4], const uint8_t *tile, int k16) {
    wgmma_record(type, d, kTiles, a, tile, k16);
}
inline void wgmma_fence() {}
inline void fence_for_wgmma() {}
inline void hold(float &) {}
inline void hold(uint32_t &) {}
void wgmma_commit();
void wgmma_wait_for(int pending);
template <int kPending>
void wgmma_wait() {
    wgmma_wait_for(kPending);
}

// ---- words

template <class Type>
uint32_t add2(Type, uint32_t a, uint32_t b) {
    auto half = [](uint32_t word, int shift) { return Type::to_float(static_cast<uint16_t>(word >> shift)); };
    return pack2<Type>(half(a, 0) + half(b, 0), half(a, 16) + half(b, 16));
}
template <class Type>
uint32_t mul2(Type, uint32_t a, uint32_t b) {
    auto half = [](uint32_t word, int shift) { return Type::to_float(static_cast<uint16_t>(word >> shift)); };
    return pack2<Type>(half(a, 0) * half(b, 0), half(a, 16) * half(b, 16));
}
template <uint32_t kMask, uint32_t kSet>
uint32_t and_or(uint32_t a) {
    return (a & kMask) | kSet;
}
uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector);
float fused_multiply_add(float a, float b, float c);
inline float multiply(float a, float b) { return a * b; }
float divide(float a, float b);
float reciprocal(float x);
float quotient(float a, float b);
float round_even(float x);
float exp_float(float x);
float reciprocal_sqrt(float x);
float square_root(float x);
float log1p_float(float x);

// ---- launching

// What has_wgmma says; tests change it to reach both kernels.
inline bool offers_wgmma = true;
inline bool has_wgmma() { return offers_wgmma; }

// Few, so that kernels which share out work among resident blocks give each several pieces.
template <auto kKernel>
int64_t resident_blocks(const LaunchShape &, const char **) {
    return 5;
}

template <auto kKernel, class Params>
bool launch(const LaunchShape &shape, const Params &params, void *, const char **error) {
    const bool ok = run(shape, [](const void *p) { kKernel(*static_cast<const Params *>(p)); }, &params);
    if (!ok) *error = last_report();
    return ok;
}

template <auto kKernel, class Params>
bool launch_beside(const LaunchShape &shape, const Params &params, void *, const char **error) {
    const bool ok = run(shape, [](const void *p) { kKernel(*static_cast<const Params *>(p)); }, &params, true);
    if (!ok) *error = last_report();
    return ok;
}

}  // namespace krasis::simt
