// test.h: checks, random numbers and aligned buffers for the native tests.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "krasis.h"

namespace test {

inline int failures = 0;

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            std::printf("%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
            if (++test::failures > 20) std::exit(1);                             \
        }                                                                        \
    } while (0)

#define CHECK_OK(call)                                                                                           \
    do {                                                                                                         \
        const int32_t check_status = (call);                                                                     \
        if (check_status != KRASIS_OK) {                                                                         \
            std::printf("%s:%d: %s returned %s\n", __FILE__, __LINE__, #call, krasis_status_name(check_status)); \
            if (++test::failures > 20) std::exit(1);                                                             \
        }                                                                                                        \
    } while (0)

inline int finish(const char *name) {
    std::printf("%s: %s\n", name, failures ? "FAILED" : "ok");
    return failures ? 1 : 0;
}

// splitmix64
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    int64_t below(int64_t bound) { return static_cast<int64_t>(next() % static_cast<uint64_t>(bound)); }
    int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
    double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
    // Roughly normal: the sum of twelve uniforms.
    float normal() {
        double sum = -6;
        for (int i = 0; i < 12; ++i) sum += uniform();
        return static_cast<float>(sum);
    }

  private:
    uint64_t state_;
};

template <class T>
struct AlignedAllocator {
    using value_type = T;
    AlignedAllocator() = default;
    template <class U>
    AlignedAllocator(const AlignedAllocator<U> &) {}
    T *allocate(size_t n) { return static_cast<T *>(::operator new(n * sizeof(T), std::align_val_t{64})); }
    void deallocate(T *p, size_t) { ::operator delete(p, std::align_val_t{64}); }
    bool operator==(const AlignedAllocator &) const { return true; }
};
template <class T>
using Buffer = std::vector<T, AlignedAllocator<T>>;

template <class T>
bool same_bits(const Buffer<T> &a, const Buffer<T> &b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

class Pool {
  public:
    Pool(int32_t num_threads, int32_t isa) { CHECK_OK(krasis_pool_create(num_threads, isa, &pool_)); }
    explicit Pool(krasis_pool *made) : pool_(made) {}  // takes it over
    ~Pool() { krasis_pool_destroy(pool_); }
    Pool(const Pool &) = delete;
    Pool &operator=(const Pool &) = delete;
    operator krasis_pool *() const { return pool_; }

  private:
    krasis_pool *pool_ = nullptr;
};

// Whether this program runs AMX's kernels on the twin of cpu/amx/tiles.h.
#if defined(KRASIS_AMX_TWIN)
constexpr bool kAmxTwin = true;
#else
constexpr bool kAmxTwin = false;
#endif

// Says by what the kernels for AMX were checked here; scripts/check.sh shows it.
inline void say_amx() {
    krasis_pool *pool = nullptr;
    const bool ran = krasis_pool_create(1, KRASIS_ISA_AMX_INT8, &pool) == KRASIS_OK;
    krasis_pool_destroy(pool);
    std::printf("AMX kernels, %s: %s\n", kAmxTwin ? "twin in C++" : "the processor's tiles",
                ran ? "checked" : "NOT checked, this machine lacks what they need");
}

// The instruction sets of this CPU.
inline std::vector<int32_t> available_isas() {
    std::vector<int32_t> isas;
    for (int32_t isa : {KRASIS_ISA_AVX2, KRASIS_ISA_AVX512_VNNI, KRASIS_ISA_AMX_INT8}) {
        krasis_pool *pool = nullptr;
        if (krasis_pool_create(1, isa, &pool) == KRASIS_OK) isas.push_back(isa);
        krasis_pool_destroy(pool);
    }
    return isas;
}

}  // namespace test
