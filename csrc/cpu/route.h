// route.h: the per-ISA scores of router logits.
#pragma once

#include <cstdint>

namespace krasis {

constexpr int64_t kMaxExperts = 4096;  // bounds the scratch on the stack

// Each: out[0, count) of x; out has room for count rounded up to 16, and may be x.
#define KRASIS_DECLARE_ROUTE(isa)                                       \
    namespace isa {                                                     \
    void softmax_row(const float *x, int64_t count, float *out);        \
    void sigmoid_row(const float *x, int64_t count, float *out);        \
    void sqrt_softplus_row(const float *x, int64_t count, float *out);  \
    /* cap * tanh(x / cap) */                                           \
    void cap_row(const float *x, int64_t count, float cap, float *out); \
    }
KRASIS_DECLARE_ROUTE(avx2)
KRASIS_DECLARE_ROUTE(avx512)
#undef KRASIS_DECLARE_ROUTE

}  // namespace krasis
