// index.h: the per-ISA parts of an index over tokens, which says what keys a query attends to.
#pragma once

#include <cstdint>

#include "../krasis.h"

namespace krasis {

constexpr int64_t kScoreBlock = 64;          // keys that are scored together
constexpr int64_t kMostIndexDim = 256;       // channels of a head
constexpr int64_t kMostIndexSize = 1 << 15;  // channels of all heads
constexpr int64_t kMostPoolTokens = 256;

#define KRASIS_DECLARE_INDEX(isa)                                                                                \
    namespace isa {                                                                                              \
    /* Rows [begin, end) of args, all of one span. */                                                            \
    void index_rows(const krasis_index_args &args, const krasis_span &span, int64_t begin, int64_t end);         \
    /* The keys of pools [begin, end), whose tokens are kept, in place of that of each one's last token. */      \
    void index_pools(const krasis_index_args &args, const krasis_span &span, int64_t begin, int64_t end);        \
    /* Scores of keys (or pools) [begin, end), begin % kScoreBlock == 0, for a row of the span; whole blocks are \
     * written. */                                                                                               \
    void index_scores(const krasis_choose_args &args, const krasis_span &span, int64_t row, int64_t begin,       \
                      int64_t end, float *scores);                                                               \
    }
KRASIS_DECLARE_INDEX(avx2)
KRASIS_DECLARE_INDEX(avx512)
#undef KRASIS_DECLARE_INDEX

}  // namespace krasis
