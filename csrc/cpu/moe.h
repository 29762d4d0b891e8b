// moe.h: the pieces of work of krasis_moe, as the baseline file deals them out and the per-ISA files do them.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace krasis {

// The (token, slot) pairs of one expert: positions [first, first + tokens) of the sorted pairs.
struct MoeGroup {
    int32_t expert, first, tokens, first_panel;
};

// One chunk of tokens. Positions number the pairs sorted by expert, then token, then slot.
struct MoeJob {
    StripFormat format = StripFormat::kQ8;
    int32_t offset_factor = 0;
    int32_t activation = KRASIS_ACT_SILU;
    float limit = 0.0f, alpha = 0.0f;
    int64_t matrices = 2;                                                        // of w13: gate and up, or up alone
    const float *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;  // of all experts
    int32_t isa = KRASIS_ISA_AVX2;                                               // of groups of few tokens
    int64_t least_tile_tokens = INT64_MAX;                                       // of groups that use AMX
    int64_t hidden = 0, intermediate = 0, top_k = 0, tokens = 0;
    const uint8_t *blob = nullptr;
    int64_t expert_stride_bytes = 0, w2_offset_bytes = 0;
    const MoeGroup *groups = nullptr;
    int64_t num_groups = 0;
    bool one_token = false;                 // all groups use the same panel
    const uint8_t *input_panels = nullptr;  // [pairs, hidden] or, with one_token, [1, hidden]
    uint8_t *middle_panels = nullptr;       // [pairs, intermediate]
    float *partial = nullptr;               // [pairs, columns]
    const int32_t *position = nullptr;      // [tokens, top_k], -1: no pair
    const float *weights = nullptr;         // [tokens, top_k]
    float *out = nullptr;                   // [tokens, hidden]

    int32_t isa_of(const MoeGroup &group) const {
        return group.tokens >= least_tile_tokens ? KRASIS_ISA_AMX_INT8 : isa;
    }
    PanelCut cut(const MoeGroup &group, int64_t k) const { return cut_panels(isa_of(group), group.tokens, k); }
    const uint8_t *input_of(const MoeGroup &group) const {
        return input_panels + (one_token ? 0 : panel_bytes(group.first, hidden));
    }
    uint8_t *middle_of(const MoeGroup &group) const { return middle_panels + panel_bytes(group.first, intermediate); }
};

// Some columns of the output: those that `partial` has room for.
struct MoeColumns {
    const MoeJob *job = nullptr;
    int64_t begin = 0, end = 0;

    int64_t count() const { return end - begin; }
};

#define KRASIS_DECLARE_MOE(isa)                                                                          \
    namespace isa {                                                                                      \
    /* Intermediate elements [32 block, 32 block + 32) of a group: activation(gate, up), quantised, into \
     * middle_panels. Without a gate their strip of w13 is one of up alone. */                           \
    void moe_gate_up(const MoeJob &job, int64_t group, int64_t block);                                   \
    /* Output columns [begin + 32 strip, + 32) of a group, into partial. */                              \
    void moe_down(const MoeColumns &columns, int64_t group, int64_t strip);                              \
    /* out[token, from..to) += the weighted partials in slot order; from and to are multiples of 32. */  \
    void moe_reduce(const MoeColumns &columns, int64_t token, int64_t from, int64_t to);                 \
    }
KRASIS_DECLARE_MOE(amx) /* without moe_reduce */
KRASIS_DECLARE_MOE(avx2)
KRASIS_DECLARE_MOE(avx512)
#undef KRASIS_DECLARE_MOE

}  // namespace krasis
