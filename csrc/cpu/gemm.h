// gemm.h: the strip product, which every int8 kernel is made of, as the baseline files see it.
//
// A strip is 32 output rows of a weight over all of k, stored as k/32 consecutive blocks. Activations are regrouped
// into panels: a panel holds a few tokens (as many as a kernel keeps in registers), block after block:
//   int8 q [tokens][32], float scale [tokens], int32 offset [tokens]          40 bytes a token and block
// offset is what an accumulator starts from, so that unsigned codes need no correction afterwards.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../krasis.h"

namespace krasis {

// kRows: int8 without scales in the blocks. kFp4: codes of twice an E2M1, half of 2^(e - 127) as scale.
enum class StripFormat : int32_t { kQ8 = 0, kI4 = 1, kRows = 2, kFp4 = 3 };

constexpr int64_t kStripRows = 32;
constexpr int64_t kBlock = 32;
constexpr int64_t kPanelTokenBytes = 40;
constexpr int64_t kMaxPanelTokens = 16;

inline int64_t strip_block_bytes(StripFormat format) {
    if (format == StripFormat::kQ8) return KRASIS_Q8_TILE_BYTES;
    if (format == StripFormat::kFp4) return KRASIS_MXFP4_TILE_BYTES;
    return format == StripFormat::kI4 ? KRASIS_I4_TILE_BYTES : kStripRows * kBlock;
}

// The format of a krasis_tiles.
inline StripFormat strip_format(int32_t tiles) {
    if (tiles == KRASIS_TILES_MXFP4) return StripFormat::kFp4;
    return tiles == KRASIS_TILES_Q8 ? StripFormat::kQ8 : StripFormat::kI4;
}

// How `tokens` rows of activations are cut into panels: as few as possible, of widths that differ by one at most; for
// tiles of max_width, all full but the last, so that their rows do not lie across cache lines. At least one token.
struct PanelCut {
    int64_t tokens = 0, count = 0, blocks = 0;
    int64_t least_width = 0, num_wider = 0;  // the first num_wider panels hold one token more

    PanelCut() = default;
    PanelCut(int64_t num_tokens, int64_t k, int64_t max_width, bool full)
        : tokens(num_tokens),
          count((num_tokens + max_width - 1) / max_width),
          blocks(k / kBlock),
          least_width(full ? max_width : num_tokens / count),
          num_wider(full ? 0 : num_tokens % count) {}
    int64_t first(int64_t panel) const { return panel * least_width + std::min(panel, num_wider); }
    int64_t width(int64_t panel) const {
        return std::min(least_width + (panel < num_wider), tokens - panel * least_width);
    }
    int64_t offset_bytes(int64_t panel) const { return first(panel) * blocks * kPanelTokenBytes; }
};

// Bytes of all panels of `tokens` rows; independent of the cut.
inline int64_t panel_bytes(int64_t tokens, int64_t k) { return tokens * (k / kBlock) * kPanelTokenBytes; }

// Writes tokens rows[0..width) of acts as one panel. offset = -sum * offset_factor.
void pack_panel(const krasis_acts &acts, const int32_t *rows, int64_t first_row, int64_t width, int32_t offset_factor,
                uint8_t *panel);

// What the accumulators start from, per unit of the sum of the activations of a block. AMX multiplies signed codes and
// does not look, but leaves a last panel of few tokens to AVX-512.
inline int32_t offset_factor(int32_t isa, StripFormat format) {
    if (format == StripFormat::kI4) return 8;
    if (format == StripFormat::kFp4) return isa == KRASIS_ISA_AVX2 ? 0 : 12;
    return isa == KRASIS_ISA_AVX2 ? 0 : 128;  // AVX2 multiplies signed codes by sign and magnitude
}

// One unit of krasis_gemm_int8_rows: out[t, 0..32) (+)= panels x strip, times row_scale.
struct RowsUnit {
    const uint8_t *strip = nullptr;
    const float *row_scale = nullptr;
    const uint8_t *panels = nullptr;
    PanelCut cut;
    int64_t first_panel = 0, end_panel = 0;
    float *out = nullptr;  // of token 0 of the cut, first column of the strip
    int64_t ldo = 0;
    bool accumulate = false;
};

// A block of krasis_gemm_float: rows [n_begin, n_end) of the weight for tokens [t_begin, t_end).
struct FloatUnit {
    const float *x = nullptr;
    const void *weight = nullptr;
    int32_t dtype = KRASIS_F32;
    int64_t k = 0, n = 0, n_begin = 0, n_end = 0, t_begin = 0, t_end = 0;
    float *out = nullptr;
};

#define KRASIS_DECLARE_GEMM(isa)                 \
    namespace isa {                              \
    int64_t panel_tokens();                      \
    void gemm_rows_unit(const RowsUnit &unit);   \
    void gemm_float_unit(const FloatUnit &unit); \
    }
KRASIS_DECLARE_GEMM(amx) /* without gemm_float_unit */
KRASIS_DECLARE_GEMM(avx2)
KRASIS_DECLARE_GEMM(avx512)
#undef KRASIS_DECLARE_GEMM

// The fewest rows of activations for which tiles are used.
constexpr int64_t kTileTokens = 32;

// What multiplies `tokens` rows by int8 strips. Unlike krasis_pool_isa it may be AMX.
inline int32_t product_isa(const krasis_pool *pool, int64_t tokens) {
    return tokens >= kTileTokens && krasis_pool_has_amx(pool) ? KRASIS_ISA_AMX_INT8 : krasis_pool_isa(pool);
}

inline int64_t panel_tokens(int32_t isa) {
    if (isa == KRASIS_ISA_AMX_INT8) return amx::panel_tokens();
    return isa == KRASIS_ISA_AVX512_VNNI ? avx512::panel_tokens() : avx2::panel_tokens();
}

inline PanelCut cut_panels(int32_t isa, int64_t tokens, int64_t k) {
    return {tokens, k, panel_tokens(isa), isa == KRASIS_ISA_AMX_INT8};
}

inline void gemm_rows_unit(int32_t isa, const RowsUnit &unit) {
    if (isa == KRASIS_ISA_AMX_INT8) return amx::gemm_rows_unit(unit);
    isa == KRASIS_ISA_AVX512_VNNI ? avx512::gemm_rows_unit(unit) : avx2::gemm_rows_unit(unit);
}

}  // namespace krasis
