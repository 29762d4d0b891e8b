// gemm.cpp: dense products: int8 rows and float.
#include "gemm.h"

#include <cstring>

#include "acts.h"
#include "pool.h"

namespace krasis {
namespace {

constexpr int64_t kChunkTokens = 1024;       // bounds the scratch: 40 bytes a token and block
constexpr int64_t kUnitPanels = 8;           // token panels of one unit
constexpr int64_t kMinUnitMacs = 64 * 1024;  // smaller units are dealt several at a time
// Each piece starts a stream anew and fetches beyond its end what another thread will read: two threads
// read an output head of 622 MB about 1 % faster in pieces of 8 MB than in pieces of 1 MB.
constexpr int64_t kLongestPiece = 64;
constexpr int64_t kFloatRows = 16, kFloatTokens = 48;  // 48: whole numbers of 3 and of 4

struct RowsJob {
    const krasis_acts *acts;
    const int8_t *weight;
    const float *scales;
    float *out;
    int64_t n, ldo;
    bool accumulate;
};

void run_rows_chunk(krasis_pool *pool, PoolSession &session, const RowsJob &job, int64_t first, int64_t tokens,
                    uint8_t *panels) {
    const int64_t k = job.acts->k;
    const int32_t isa = product_isa(pool, tokens);
    const PanelCut cut = cut_panels(isa, tokens, k);
    const int32_t factor = offset_factor(isa, StripFormat::kRows);
    auto pack = [&](int64_t begin, int64_t end, int32_t) {
        for (int64_t p = begin; p < end; ++p) {
            pack_panel(*job.acts, nullptr, first + cut.first(p), cut.width(p), factor, panels + cut.offset_bytes(p));
        }
    };
    const int64_t token_units = (cut.count + kUnitPanels - 1) / kUnitPanels;
    auto multiply = [&](int64_t begin, int64_t end, int32_t) {
        for (int64_t u = begin; u < end; ++u) {
            const int64_t strip = u / token_units, panel = u % token_units * kUnitPanels;
            RowsUnit unit;
            unit.strip = reinterpret_cast<const uint8_t *>(job.weight) + strip * kStripRows * k;
            unit.row_scale = job.scales + strip * kStripRows;
            unit.panels = panels;
            unit.cut = cut;
            unit.first_panel = panel;
            unit.end_panel = std::min(panel + kUnitPanels, cut.count);
            unit.out = job.out + first * job.ldo + strip * kStripRows;
            unit.ldo = job.ldo;
            unit.accumulate = job.accumulate;
            gemm_rows_unit(isa, unit);
        }
    };
    const int64_t unit_macs = kStripRows * k * std::min(tokens, kUnitPanels * cut.width(0));
    const int64_t grain = (kMinUnitMacs + unit_macs - 1) / unit_macs;
    Phase phases[2] = {make_phase(pack, cut.count, 4),
                       make_phase(multiply, job.n / kStripRows * token_units, grain, kLongestPiece * grain)};
    phases[1].period = phases[1].count;
    const bool pack_here = cut.count <= 4;
    if (pack_here) pack(0, cut.count, 0);
    session.run(phases + pack_here, 2 - pack_here);
}

}  // namespace

void pack_panel(const krasis_acts &acts, const int32_t *rows, int64_t first_row, int64_t width, int32_t offset_factor,
                uint8_t *panel) {
    const int64_t blocks = acts.k / kBlock, stride = width * kPanelTokenBytes;
    for (int64_t t = 0; t < width; ++t) {
        const int64_t row = rows ? rows[t] : first_row + t;
        const int8_t *q = acts.q + row * acts.k;
        const float *scale = acts.scale + row * blocks;
        const int32_t *sum = acts.sum + row * blocks;
        uint8_t *to_q = panel + t * kBlock, *to_scale = panel + width * kBlock + t * 4;
        for (int64_t b = 0; b < blocks; ++b) {
            const int32_t offset = -sum[b] * offset_factor;
            std::memcpy(to_q + b * stride, q + b * kBlock, kBlock);
            std::memcpy(to_scale + b * stride, scale + b, 4);
            std::memcpy(to_scale + b * stride + width * 4, &offset, 4);
        }
    }
}

}  // namespace krasis

int32_t krasis_gemm_int8_rows(krasis_pool *pool, const krasis_acts *acts, const int8_t *weight, const float *scales,
                              int64_t n, float *out, int64_t ldo, int32_t accumulate) {
    using namespace krasis;
    if (!pool || n < 0 || ldo < n) return KRASIS_ERR_ARGUMENT;
    const int32_t status = check_acts(acts);
    if (status != KRASIS_OK) return status;
    if (n % kStripRows != 0) return KRASIS_ERR_SHAPE;
    if (acts->tokens == 0 || n == 0) return KRASIS_OK;
    if (!weight || !scales || !out) return KRASIS_ERR_ARGUMENT;
    PoolSession session(pool);
    const int64_t most = std::min(acts->tokens, kChunkTokens);
    uint8_t *panels = static_cast<uint8_t *>(session.scratch(static_cast<size_t>(panel_bytes(most, acts->k))));
    if (!panels) return KRASIS_ERR_MEMORY;
    const RowsJob job{acts, weight, scales, out, n, ldo, accumulate != 0};
    for (int64_t first = 0; first < acts->tokens; first += kChunkTokens) {
        run_rows_chunk(pool, session, job, first, std::min(kChunkTokens, acts->tokens - first), panels);
    }
    return KRASIS_OK;
}

int32_t krasis_gemm_float(krasis_pool *pool, const float *x, int64_t tokens, int64_t k, const void *weight,
                          int32_t dtype, int64_t n, float *out) {
    using namespace krasis;
    if (!pool || tokens < 0 || k <= 0 || n < 0) return KRASIS_ERR_ARGUMENT;
    if (dtype != KRASIS_F32 && dtype != KRASIS_BF16 && dtype != KRASIS_F16) return KRASIS_ERR_ARGUMENT;
    if (tokens == 0 || n == 0) return KRASIS_OK;
    if (!x || !weight || !out) return KRASIS_ERR_ARGUMENT;
    const int32_t isa = krasis_pool_isa(pool);
    const int64_t row_units = (n + kFloatRows - 1) / kFloatRows;
    const int64_t token_units = (tokens + kFloatTokens - 1) / kFloatTokens;
    const int64_t unit_macs = std::min(kFloatRows, n) * std::min(kFloatTokens, tokens) * k;
    const int64_t grain = (kMinUnitMacs / 4 + unit_macs - 1) / unit_macs;
    parallel_for(pool, row_units * token_units, grain, [&](int64_t begin, int64_t end, int32_t) {
        for (int64_t u = begin; u < end; ++u) {
            FloatUnit unit{x, weight, dtype, k, n, 0, 0, 0, 0, out};
            unit.n_begin = u % row_units * kFloatRows;
            unit.n_end = std::min(unit.n_begin + kFloatRows, n);
            unit.t_begin = u / row_units * kFloatTokens;
            unit.t_end = std::min(unit.t_begin + kFloatTokens, tokens);
            isa == KRASIS_ISA_AVX512_VNNI ? avx512::gemm_float_unit(unit) : avx2::gemm_float_unit(unit);
        }
    });
    return KRASIS_OK;
}
