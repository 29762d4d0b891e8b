// check.h: checks, random numbers and aligned buffers of the GPU kernels' tests, on the host and on a device.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>

namespace test {

inline int failures = 0;

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            std::printf("%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
            if (++test::failures > 20) std::exit(1);                             \
        }                                                                        \
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
    double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
    // Roughly normal: four uniforms, scaled to variance one.
    float normal() {
        double sum = -2;
        for (int i = 0; i < 4; ++i) sum += uniform();
        return static_cast<float>(sum * 1.7320508);
    }

  private:
    uint64_t state_;
};

// Vectors whose data begin at a multiple of 256 bytes, as device allocations do.
template <class T>
struct Aligned {
    using value_type = T;
    Aligned() = default;
    template <class U>
    Aligned(const Aligned<U> &) {}
    T *allocate(size_t n) { return static_cast<T *>(::operator new(n * sizeof(T), std::align_val_t{256})); }
    void deallocate(T *p, size_t) { ::operator delete(p, std::align_val_t{256}); }
    bool operator==(const Aligned &) const { return true; }
};

}  // namespace test
