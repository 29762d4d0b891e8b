// gemm_heads.cpp: krasis_gemm_int8_heads: a product a head, each with its own rows of the weight.
#include "acts.h"
#include "gemm.h"
#include "pool.h"

namespace krasis {
namespace {

constexpr int64_t kChunkRows = 8192;         // bounds the scratch: rows of activations packed at once
constexpr int64_t kUnitPanels = 8;           // token panels of one unit
constexpr int64_t kMinUnitMacs = 64 * 1024;  // smaller units are dealt several at a time
constexpr int64_t kMostSize = int64_t{1} << 31;

struct HeadsJob {
    const krasis_acts *acts;
    const int8_t *weight;
    const float *scales;
    int64_t num_heads, n;
    float *out;
    int64_t ldh, ldo;
    int32_t isa;
};

// Tokens [first, first + tokens) of every head.
void run_chunk(PoolSession &session, const HeadsJob &job, int64_t first, int64_t tokens, uint8_t *panels) {
    const int64_t k = job.acts->k, heads = job.num_heads;
    const PanelCut cut = cut_panels(job.isa, tokens, k);
    const int32_t factor = offset_factor(job.isa, StripFormat::kRows);
    const int64_t head_bytes = panel_bytes(tokens, k);
    auto pack = [&](int64_t begin, int64_t end, int32_t) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t head = i / cut.count, p = i % cut.count;
            int32_t rows[kMaxPanelTokens];
            for (int64_t t = 0; t < cut.width(p); ++t) {
                rows[t] = static_cast<int32_t>((first + cut.first(p) + t) * heads + head);
            }
            pack_panel(*job.acts, rows, 0, cut.width(p), factor, panels + head * head_bytes + cut.offset_bytes(p));
        }
    };
    const int64_t strips = job.n / kStripRows, token_units = (cut.count + kUnitPanels - 1) / kUnitPanels;
    auto multiply = [&](int64_t begin, int64_t end, int32_t) {
        for (int64_t u = begin; u < end; ++u) {
            const int64_t strip = u / token_units, panel = u % token_units * kUnitPanels;
            const int64_t head = strip / strips;
            RowsUnit unit;
            unit.strip = reinterpret_cast<const uint8_t *>(job.weight) + strip * kStripRows * k;
            unit.row_scale = job.scales + strip * kStripRows;
            unit.panels = panels + head * head_bytes;
            unit.cut = cut;
            unit.first_panel = panel;
            unit.end_panel = std::min(panel + kUnitPanels, cut.count);
            unit.out = job.out + first * job.ldo + head * job.ldh + strip % strips * kStripRows;
            unit.ldo = job.ldo;
            gemm_rows_unit(job.isa, unit);
        }
    };
    const int64_t unit_macs = kStripRows * k * std::min(tokens, kUnitPanels * cut.width(0));
    const int64_t grain = (kMinUnitMacs + unit_macs - 1) / unit_macs;
    Phase phases[2] = {make_phase(pack, heads * cut.count, 16),
                       make_phase(multiply, heads * strips * token_units, grain)};
    phases[1].period = phases[1].count;
    session.run(phases, 2);
}

}  // namespace
}  // namespace krasis

int32_t krasis_gemm_int8_heads(krasis_pool *pool, const krasis_acts *acts, const int8_t *weight, const float *scales,
                               int64_t num_heads, int64_t n, float *out, int64_t ldh, int64_t ldo) {
    using namespace krasis;
    if (!pool || num_heads <= 0 || n < 0 || num_heads > kMostSize || ldh < n || ldh > kMostSize ||
        ldo < (num_heads - 1) * ldh + n) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (const int32_t status = check_acts(acts)) return status;
    if (n % kStripRows != 0 || acts->tokens % num_heads != 0) return KRASIS_ERR_SHAPE;
    if (acts->tokens > INT32_MAX) return KRASIS_ERR_RANGE;
    if (acts->tokens == 0 || n == 0) return KRASIS_OK;
    if (!weight || !scales || !out) return KRASIS_ERR_ARGUMENT;
    const int64_t tokens = acts->tokens / num_heads;
    const int64_t chunk = std::min(tokens, std::max<int64_t>(kChunkRows / num_heads, 1));
    PoolSession session(pool);
    uint8_t *panels =
        static_cast<uint8_t *>(session.scratch(static_cast<size_t>(num_heads * panel_bytes(chunk, acts->k))));
    if (!panels) return KRASIS_ERR_MEMORY;
    const HeadsJob job{acts, weight, scales, num_heads, n, out, ldh, ldo, product_isa(pool, chunk)};
    for (int64_t first = 0; first < tokens; first += chunk) {
        run_chunk(session, job, first, std::min(chunk, tokens - first), panels);
    }
    return KRASIS_OK;
}
