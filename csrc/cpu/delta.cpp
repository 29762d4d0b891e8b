// delta.cpp: krasis_gated_delta: checks, and its three steps on the pool.
#include "delta.h"

#include "pool.h"

namespace {

using namespace krasis;

constexpr int64_t kMostHeads = 1 << 16, kMostRows = int64_t{1} << 40;
constexpr int64_t kGateRows = 16;  // rows of gates or norms that one piece does

struct Parts {
    decltype(&avx2::delta_conv) conv;
    decltype(&avx2::delta_gates) gates;
    decltype(&avx2::delta_scan) scan;
    decltype(&avx2::delta_norm) norm;
};

Parts parts_for(const krasis_pool *pool) {
    if (krasis_pool_isa(pool) == KRASIS_ISA_AVX512_VNNI) {
        return {avx512::delta_conv, avx512::delta_gates, avx512::delta_scan, avx512::delta_norm};
    }
    return {avx2::delta_conv, avx2::delta_gates, avx2::delta_scan, avx2::delta_norm};
}

int32_t check_sizes(const krasis_gated_delta_args &args) {
    if (args.tokens < 0 || args.key_heads <= 0 || args.value_heads <= 0 || args.key_dim <= 0 || args.value_dim <= 0 ||
        args.conv_width <= 0 || args.num_spans < 0 || args.matrices_offset_bytes < 0 || args.columns_offset_bytes < 0) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (args.gate != KRASIS_GATE_SILU && args.gate != KRASIS_GATE_SIGMOID) return KRASIS_ERR_ARGUMENT;
    if (args.key_dim % 16 != 0 || args.value_dim % kDeltaTile != 0 || args.key_dim > kMaxDeltaDim ||
        args.value_dim > kMaxDeltaDim || args.conv_width > kMaxConvWidth || args.key_heads > kMostHeads ||
        args.value_heads > kMostHeads || args.value_heads % args.key_heads != 0 || args.tokens > kMostRows ||
        args.ldx < delta_channels(args) + args.value_heads * args.value_dim || args.matrices_offset_bytes % 4 != 0 ||
        args.columns_offset_bytes % 4 != 0) {
        return KRASIS_ERR_SHAPE;
    }
    return KRASIS_OK;
}

int32_t check(const krasis_gated_delta_args &args) {
    if (const int32_t status = check_sizes(args)) return status;
    if (!args.conv || !args.rates || !args.dt_bias || !args.gate_norm) return KRASIS_ERR_ARGUMENT;
    if (args.tokens > 0 && (!args.x || !args.gates || !args.out || !args.spans)) return KRASIS_ERR_ARGUMENT;
    int64_t row = 0;
    for (int64_t i = 0; i < args.num_spans; ++i) {
        if (!args.spans) return KRASIS_ERR_ARGUMENT;
        const krasis_span &span = args.spans[i];
        if (span.rows == 0) continue;
        if (span.rows < 0 || span.start < 0 || span.first_row != row || !span.keys) return KRASIS_ERR_ARGUMENT;
        if (span.rows > args.tokens - row) return KRASIS_ERR_RANGE;
        row += span.rows;
    }
    return row == args.tokens ? KRASIS_OK : KRASIS_ERR_RANGE;
}

}  // namespace

int32_t krasis_gated_delta(krasis_pool *pool, const krasis_gated_delta_args *pointer) {
    if (!pool || !pointer) return KRASIS_ERR_ARGUMENT;
    const krasis_gated_delta_args &args = *pointer;
    if (const int32_t status = check(args)) return status;
    if (args.tokens == 0) return KRASIS_OK;
    const Parts parts = parts_for(pool);
    const int64_t units = delta_conv_units(args), blocks = (args.tokens + kGateRows - 1) / kGateRows;
    const int64_t convs = args.num_spans * units;
    const int64_t tiles = args.value_dim / kDeltaTile, scans = args.value_heads * tiles;
    const auto rows_of = [&](int64_t block, auto &&rows) {
        const int64_t begin = block * kGateRows, end = begin + kGateRows;
        rows(args, begin, end < args.tokens ? end : args.tokens);
    };
    auto mix = [&](int64_t begin, int64_t end, int32_t) {
        for (int64_t i = begin; i < end; ++i) {
            if (i >= convs) {
                rows_of(i - convs, parts.gates);
            } else if (const krasis_span &span = args.spans[i / units]; span.rows > 0) {
                parts.conv(args, span, i % units);
            }
        }
    };
    auto scan = [&](int64_t begin, int64_t end, int32_t) {
        for (int64_t i = begin; i < end; ++i) {
            const krasis_span &span = args.spans[i / scans];
            if (span.rows > 0) parts.scan(args, span, i % scans / tiles, i % tiles);
        }
    };
    auto norm = [&](int64_t begin, int64_t end, int32_t) {
        for (int64_t i = begin; i < end; ++i) rows_of(i, parts.norm);
    };
    // A token of one sequence is little work a unit: pieces of several.
    const bool is_step = args.tokens <= args.num_spans;
    const Phase phases[] = {make_phase(mix, convs + blocks, is_step ? 8 : 1),
                            make_phase(scan, args.num_spans * scans, is_step ? tiles : 1), make_phase(norm, blocks, 1)};
    parallel_phases(pool, phases, 3);
    return KRASIS_OK;
}
