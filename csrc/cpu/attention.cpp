// attention.cpp: krasis_attention: checks, tasks, and who runs them.
#include "attention.h"

#include "rows.h"

namespace {

using namespace krasis;

constexpr int64_t kMostPositions = int64_t{1} << 40, kMostHeads = 1 << 16;  // keep sizes far from overflow
constexpr int64_t kSmallWork = 200000;  // multiply-adds that one core does in some 10 us

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct Parts {
    decltype(&avx2::attend_task) attend_task;
    decltype(&avx2::attend_split) attend_split;
    decltype(&avx2::merge_splits) merge_splits;
};

Parts parts_for(const krasis_pool *pool) {
    if (krasis_pool_isa(pool) == KRASIS_ISA_AVX512_VNNI) {
        return {avx512::attend_task, avx512::attend_split, avx512::merge_splits};
    }
    return {avx2::attend_task, avx2::attend_split, avx2::merge_splits};
}

// The cut of a call: kv heads x chunks of their query heads x chunks of tokens.
struct Grid {
    explicit Grid(const krasis_attention_args &args) : group(args.num_heads / args.num_kv_heads), tokens(args.tokens) {
        chunk_heads = smaller(group, kMaxRows);
        head_chunks = (group + chunk_heads - 1) / chunk_heads;
        chunk_tokens = kMaxRows / chunk_heads;
        token_chunks = (tokens + chunk_tokens - 1) / chunk_tokens;
        count = args.num_kv_heads * head_chunks * token_chunks;
    }
    AttentionTask task(int64_t index) const {
        // Late tokens see the most keys: they come first, so that no long task is left for the end.
        const int64_t token = (token_chunks - 1 - index % token_chunks) * chunk_tokens;
        const int64_t chunk = index / token_chunks, kv_head = chunk / head_chunks;
        const int64_t offset = chunk % head_chunks * chunk_heads;
        return {kv_head, kv_head * group + offset, smaller(chunk_heads, group - offset), token,
                smaller(chunk_tokens, tokens - token)};
    }
    int64_t group, tokens, chunk_heads, head_chunks, chunk_tokens, token_chunks, count;
};

int32_t check(const krasis_attention_args &args) {
    if (args.tokens < 0 || args.start < 0 || args.num_heads <= 0 || args.num_kv_heads <= 0 || args.head_dim <= 0 ||
        args.workspace_bytes < 0 || (args.kv_dtype != KRASIS_F32 && args.kv_dtype != KRASIS_F16)) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (args.head_dim % 16 != 0 || args.head_dim > kMaxHeadDim || args.num_heads % args.num_kv_heads != 0 ||
        args.ldq < args.num_heads * args.head_dim) {
        return KRASIS_ERR_SHAPE;
    }
    if (args.tokens > args.capacity || args.start > args.capacity - args.tokens) return KRASIS_ERR_RANGE;
    if (args.tokens > 0 && (!args.q || !args.k_cache || !args.v_cache || !args.out)) return KRASIS_ERR_ARGUMENT;
    return KRASIS_OK;
}

template <class F>
void run(krasis_pool *pool, int64_t count, bool small, F &&f) {
    if (small || count == 1) {
        for (int64_t i = 0; i < count; ++i) f(i);
        return;
    }
    parallel_for(pool, count, 1, [&](int64_t begin, int64_t end, int32_t) {
        for (int64_t i = begin; i < end; ++i) f(i);
    });
}

}  // namespace

int64_t krasis_attention_workspace_bytes(int64_t tokens, int64_t start, int64_t num_heads, int64_t head_dim) {
    if (tokens < 0 || start < 0 || tokens > kMostPositions || start > kMostPositions || num_heads <= 0 ||
        num_heads > kMostHeads || head_dim <= 0 || head_dim > kMaxHeadDim) {
        return -1;
    }
    const int64_t splits = num_splits(start + tokens);
    if (splits < 2) return 0;
    return smaller(tokens, kSplitTokens) * num_heads * splits * (head_dim + kPartialTail) *
           static_cast<int64_t>(sizeof(float));
}

int32_t krasis_attention(krasis_pool *pool, const krasis_attention_args *args) {
    if (!pool || !args) return KRASIS_ERR_ARGUMENT;
    if (const int32_t status = check(*args)) return status;
    if (args->tokens == 0) return KRASIS_OK;
    const Parts parts = parts_for(pool);
    const Grid grid(*args);
    const int64_t splits = num_splits(args->start + args->tokens), rows = args->tokens * args->num_heads;
    const bool small = rows * (args->start + args->tokens) * args->head_dim * 2 < kSmallWork;
    if (args->tokens > kSplitTokens || splits < 2) {
        run(pool, grid.count, small, [&](int64_t i) { parts.attend_task(*args, grid.task(i)); });
        return KRASIS_OK;
    }
    const int64_t need = krasis_attention_workspace_bytes(args->tokens, args->start, args->num_heads, args->head_dim);
    if (!args->workspace || args->workspace_bytes < need) return KRASIS_ERR_MEMORY;
    float *partials = static_cast<float *>(args->workspace);
    run(pool, grid.count * splits, small,
        [&](int64_t i) { parts.attend_split(*args, grid.task(i / splits), i % splits, partials); });
    parallel_rows(pool, rows, splits * args->head_dim, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) parts.merge_splits(*args, row, partials);
    });
    return KRASIS_OK;
}
