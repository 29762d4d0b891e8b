// activation.h: which activations there are, and the per-ISA rows of krasis_gated_activation and krasis_add_rows.
#pragma once

#include <cstdint>

#include "../krasis.h"

namespace krasis {

inline bool has_gate(int32_t kind) { return kind != KRASIS_ACT_RELU_SQUARED; }

inline int32_t check_activation(int32_t kind, float limit, float alpha) {
    if (kind < KRASIS_ACT_SILU || kind > KRASIS_ACT_RELU_SQUARED) return KRASIS_ERR_ARGUMENT;
    const bool limited = kind == KRASIS_ACT_SWIGLU_OFFSET || kind == KRASIS_ACT_SILU_CLAMPED_BEFORE ||
                         kind == KRASIS_ACT_SILU_CLAMPED_AFTER;
    if (limited && !(limit > 0.0f && limit <= 3.4e38f)) return KRASIS_ERR_ARGUMENT;
    if (kind == KRASIS_ACT_SWIGLU_OFFSET && !(alpha >= 0.0f && alpha <= 3.4e38f)) return KRASIS_ERR_ARGUMENT;
    return KRASIS_OK;
}

// Rows [begin, end) of args.
#define KRASIS_DECLARE_ACTIVATION(isa)                                                    \
    namespace isa {                                                                       \
    void activation_rows(const krasis_activation_args &args, int64_t begin, int64_t end); \
    void add_rows(const krasis_add_rows_args &args, int64_t begin, int64_t end);          \
    void gate_rows(float *x, const float *gates, int64_t count, int32_t gate);            \
    }
KRASIS_DECLARE_ACTIVATION(avx2)
KRASIS_DECLARE_ACTIVATION(avx512)
#undef KRASIS_DECLARE_ACTIVATION

}  // namespace krasis
