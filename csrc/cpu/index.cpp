// index.cpp: krasis_index_store and krasis_choose: checks, tasks, and the best of a row's scores.
#include "index.h"

#include <cstring>

#include "rows.h"
#include "spans.h"

namespace {

using namespace krasis;

constexpr int64_t kChunkKeys = 512;  // keys of a task
constexpr int64_t kRoundRows = 16;   // rows of which scores are kept at once

bool is_wide_isa(const krasis_pool *pool) { return krasis_pool_isa(pool) == KRASIS_ISA_AVX512_VNNI; }

int32_t check_heads(int64_t heads, int64_t dim) {
    if (heads <= 0 || dim <= 0) return KRASIS_ERR_ARGUMENT;
    const bool fits = dim % 16 == 0 && dim <= kMostIndexDim && heads <= kMostIndexSize && heads * dim <= kMostIndexSize;
    return fits ? KRASIS_OK : KRASIS_ERR_SHAPE;
}

// Of tokens alone a block is one.
bool is_block(int64_t block) { return block > 0 && block <= kMostPoolTokens; }

int32_t check(const krasis_index_args &args) {
    if (!is_block(args.block) || (args.block == 1 && args.gates) || (args.block > 1 && !args.positions) ||
        (args.block > 1 && args.tokens > 0 && !args.gates)) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (args.tokens < 0 || args.rotary_dims < 0 ||
        (args.rope_style != KRASIS_ROPE_HALF && args.rope_style != KRASIS_ROPE_INTERLEAVED)) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (const int32_t status = check_heads(args.heads, args.dim)) return status;
    if (args.rotary_dims % 2 != 0 || args.rotary_dims > args.dim) return KRASIS_ERR_SHAPE;
    const bool rotates = args.rotary_dims > 0;
    if (const int32_t status = check_spans(args, rotates ? args.max_positions : INT64_MAX)) return status;
    if (args.tokens > 0 && (!args.k || !args.norm || !args.bias || (rotates && (!args.cos || !args.sin)))) {
        return KRASIS_ERR_ARGUMENT;
    }
    return KRASIS_OK;
}

int64_t padded(int64_t keys) { return (keys + kScoreBlock - 1) / kScoreBlock * kScoreBlock; }

// Floats of a row's scores: of the row that sees the most, 0 if no row has to choose.
int64_t score_floats(const krasis_choose_args &args) {
    int64_t longest = 0;
    for (int64_t i = 0; i < args.num_spans; ++i) {
        const krasis_span &span = args.spans[i];
        if (span.rows > 0 && span.start + span.rows > longest) longest = span.start + span.rows;
    }
    return longest / args.block > args.budget / args.block ? padded(longest / args.block) : 0;
}

int32_t check(const krasis_choose_args &args) {
    if (args.tokens < 0 || args.budget <= 0 || args.budget > INT32_MAX - kMostPoolTokens || args.workspace_bytes < 0 ||
        !is_block(args.block) || args.budget % args.block != 0) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (const int32_t status = check_heads(args.heads, args.dim)) return status;
    if (args.capacity > INT32_MAX) return KRASIS_ERR_RANGE;
    if (const int32_t status = check_spans(args, INT64_MAX)) return status;
    if (args.tokens > 0 && (!args.q || !args.weights || !args.chosen)) return KRASIS_ERR_ARGUMENT;
    const int64_t available = args.workspace ? args.workspace_bytes : 0;
    const int64_t needed = score_floats(args) * static_cast<int64_t>(sizeof(float));
    return needed <= available ? KRASIS_OK : KRASIS_ERR_MEMORY;
}

// A number that is the larger the better a score is; both zeros are one.
uint32_t rank_of(float score) {
    const float value = score + 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The positions of the best `budget` of n > budget scores, ascending; of equal ones the first.
void choose_best(const float *scores, int64_t n, int64_t budget, int32_t *chosen) {
    constexpr int kBits[] = {11, 11, 10};
    uint32_t least = 0, known = 0;  // the high bits of the last rank that is taken, and which these are
    int64_t left = budget;
    int shift = 32;
    for (const int bits : kBits) {
        shift -= bits;
        int64_t counts[1 << 11] = {};
        const uint32_t mask = (1u << bits) - 1;
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t rank = rank_of(scores[i]);
            if ((rank & known) == least) ++counts[rank >> shift & mask];
        }
        uint32_t bin = mask;
        for (; left > counts[bin]; --bin) left -= counts[bin];
        least |= bin << shift;
        known |= mask << shift;
    }
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t rank = rank_of(scores[i]);
        if (rank > least || (rank == least && left-- > 0)) *chosen++ = static_cast<int32_t>(i);
    }
}

// The positions of count pools of block tokens, in place of the pools, and of tail tokens behind pool `behind`.
void expand(int32_t *chosen, int64_t count, int64_t block, int64_t behind, int64_t tail) {
    for (int64_t i = count; i-- > 0;) {
        const int64_t pool = chosen[i];  // before it is overwritten: i <= i * block
        for (int64_t j = 0; j < block; ++j) chosen[i * block + j] = static_cast<int32_t>(pool * block + j);
    }
    for (int64_t j = 0; j < tail; ++j) chosen[count * block + j] = static_cast<int32_t>(behind * block + j);
}

struct Row {
    const krasis_span *span;
    int64_t row, keys;  // keys: those that it sees
    int64_t pools;      // whole ones among them; with a block of 1 all keys
    int64_t end_task;   // of this row and those before it
};

// The rows of a call, some at a time.
class Rounds {
  public:
    explicit Rounds(const krasis_choose_args &args)
        : args_(args), stride_(score_floats(args)), most_(kRoundRows), scores_(static_cast<float *>(args.workspace)) {
        const int64_t row_bytes = stride_ * static_cast<int64_t>(sizeof(float));
        if (row_bytes > 0 && args.workspace_bytes / row_bytes < most_) most_ = args.workspace_bytes / row_bytes;
    }
    bool take() {
        count_ = tasks_ = 0;
        while (count_ < most_ && next_span_ < args_.num_spans) {
            const krasis_span &span = args_.spans[next_span_];
            if (next_row_ >= span.rows) {
                ++next_span_;
                next_row_ = 0;
                continue;
            }
            const int64_t keys = span.start + next_row_ + 1, pools = keys / args_.block;
            if (pools > args_.budget / args_.block) tasks_ += (pools + kChunkKeys - 1) / kChunkKeys;
            rows_[count_++] = {&span, span.first_row + next_row_++, keys, pools, tasks_};
        }
        return count_ > 0;
    }
    void run(krasis_pool *pool) const {
        const auto score = is_wide_isa(pool) ? avx512::index_scores : avx2::index_scores;
        parallel_for(pool, tasks_, 1, [&](int64_t begin, int64_t end, int32_t) {
            for (int64_t task = begin; task < end; ++task) {
                const Row *row = rows_;
                while (task >= row->end_task) ++row;
                const int64_t first = (task - (row == rows_ ? 0 : row[-1].end_task)) * kChunkKeys;
                const int64_t last = first + kChunkKeys < row->pools ? first + kChunkKeys : row->pools;
                score(args_, *row->span, row->row, first, last, scores_ + (row - rows_) * stride_ + first);
            }
        });
        parallel_rows(pool, count_, 4 * stride_ + args_.budget, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) choose(i);
        });
    }

  private:
    void choose(int64_t index) const {
        const Row &row = rows_[index];
        const int64_t block = args_.block, best = args_.budget / block;
        int32_t *chosen = args_.chosen + row.row * (args_.budget + block - 1);
        if (row.pools > best) {
            choose_best(scores_ + index * stride_, row.pools, best, chosen);
            if (block > 1) expand(chosen, best, block, row.pools, row.keys % block);
            return;
        }
        for (int64_t key = 0; key < row.keys; ++key) chosen[key] = static_cast<int32_t>(key);
    }

    const krasis_choose_args &args_;
    int64_t stride_, most_;
    float *scores_;
    Row rows_[kRoundRows];
    int64_t count_ = 0, tasks_ = 0, next_span_ = 0, next_row_ = 0;
};

// The keys of all pools whose last tokens are among the rows; their first ones may have come before.
void store_pools(krasis_pool *pool, const krasis_index_args &args) {
    const auto store = is_wide_isa(pool) ? avx512::index_pools : avx2::index_pools;
    for (int64_t i = 0; i < args.num_spans; ++i) {
        const krasis_span &span = args.spans[i];
        if (span.rows <= 0) continue;
        const int64_t first = span.start / args.block, last = (span.start + span.rows) / args.block;
        parallel_rows(pool, last - first, 8 * args.block * args.dim,
                      [&](int64_t begin, int64_t end) { store(args, span, first + begin, first + end); });
    }
}

}  // namespace

int32_t krasis_index_store(krasis_pool *pool, const krasis_index_args *args) {
    if (!pool || !args) return KRASIS_ERR_ARGUMENT;
    if (const int32_t status = check(*args)) return status;
    const auto store = is_wide_isa(pool) ? avx512::index_rows : avx2::index_rows;
    const int64_t elements = args->dim * (args->q ? args->heads + 1 : 1);
    parallel_rows(pool, args->tokens, elements, [&](int64_t begin, int64_t end) {
        for (int64_t i = 0; i < args->num_spans; ++i) {
            const krasis_span &span = args->spans[i];
            const int64_t first = span.first_row > begin ? span.first_row : begin;
            const int64_t last = span.first_row + span.rows < end ? span.first_row + span.rows : end;
            if (span.rows > 0 && first < last) store(*args, span, first, last);
        }
    });
    if (args->block > 1) store_pools(pool, *args);
    return KRASIS_OK;
}

int32_t krasis_choose(krasis_pool *pool, const krasis_choose_args *args) {
    if (!pool || !args) return KRASIS_ERR_ARGUMENT;
    if (const int32_t status = check(*args)) return status;
    Rounds rounds(*args);
    while (rounds.take()) rounds.run(pool);
    return KRASIS_OK;
}
