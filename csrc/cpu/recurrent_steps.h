// recurrent_steps.h: what mixers whose state is a matrix a head have in common around their kernels: the spans they
// take, and three steps on the pool.
#pragma once

#include <cstdint>

#include "../krasis.h"
#include "pool.h"

namespace krasis {

constexpr int64_t kRowsOfPiece = 16;  // rows of gates or norms that one piece does

// Spans of a call whose sequences have a state: in the order of the rows, all of them.
inline int32_t check_state_spans(const krasis_span *spans, int64_t num_spans, int64_t tokens) {
    int64_t row = 0;
    for (int64_t i = 0; i < num_spans; ++i) {
        if (!spans) return KRASIS_ERR_ARGUMENT;
        const krasis_span &span = spans[i];
        if (span.rows == 0) continue;
        if (span.rows < 0 || span.start < 0 || span.first_row != row || !span.keys) return KRASIS_ERR_ARGUMENT;
        if (span.rows > tokens - row) return KRASIS_ERR_RANGE;
        row += span.rows;
    }
    return row == tokens ? KRASIS_OK : KRASIS_ERR_RANGE;
}

// The kernels of one mixer: of a unit of channels, of rows, of a tile of a head, of rows again.
template <typename Args>
struct RecurrentParts {
    void (*conv)(const Args &args, const krasis_span &span, int64_t unit);
    void (*gates)(const Args &args, int64_t begin, int64_t end);
    void (*scan)(const Args &args, const krasis_span &span, int64_t head, int64_t tile);
    void (*norm)(const Args &args, int64_t begin, int64_t end);
};

// Convolutions and gates; then the scans; then the norms. units: of channels, for conv. tiles: of a head.
template <typename Args>
void run_recurrent(krasis_pool *pool, const Args &args, const RecurrentParts<Args> &parts, int64_t units, int64_t heads,
                   int64_t tiles) {
    const int64_t blocks = (args.tokens + kRowsOfPiece - 1) / kRowsOfPiece, convs = args.num_spans * units;
    const int64_t scans = heads * tiles;
    const auto rows_of = [&](int64_t block, auto &&rows) {
        const int64_t begin = block * kRowsOfPiece, end = begin + kRowsOfPiece;
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
}

}  // namespace krasis
