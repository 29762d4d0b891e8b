// attention.cpp: krasis_attention: checks, tasks, and who runs them.
#include "attention.h"

#include "rows.h"
#include "spans.h"

namespace {

using namespace krasis;

constexpr int64_t kMostPositions = int64_t{1} << 40, kMostHeads = 1 << 16;  // keep sizes far from overflow
constexpr int64_t kSmallWork = 200000;  // multiply-adds that one core does in some 10 us
constexpr int64_t kMostPieces = 64;     // spans of one round

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

// The cut of a span: kv heads x chunks of their query heads x chunks of tokens.
struct Grid {
    Grid() = default;  // its content is set later
    Grid(const krasis_attention_args &args, int64_t num_tokens)
        : group(args.num_heads / args.num_kv_heads), tokens(num_tokens) {
        const int64_t most_rows = is_wide(args) ? kMaxWideRows : kMaxRows;
        chunk_heads = smaller(group, most_rows);
        head_chunks = (group + chunk_heads - 1) / chunk_heads;
        chunk_tokens = most_rows / chunk_heads;
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

AttentionSpan view_of(const krasis_attention_args &args, const krasis_span &span) {
    AttentionSpan view{};
    view.args = &args;
    view.q = args.q + span.first_row * args.ldq;
    view.out = args.out + span.first_row * args.num_heads * value_width(args);
    view.keys = layer_keys(args, span);
    view.values = layer_values(args, span);
    view.start = span.start;
    view.tokens = span.rows;
    view.first_split = first_key(args.window, span.start) / kSplitKeys;
    view.splits = num_splits(span.start + span.rows) - view.first_split;
    return view;
}

bool is_split(const AttentionSpan &span) { return span.tokens <= kSplitTokens && span.splits >= 2; }

// Bytes of its partial results.
int64_t partial_bytes(const AttentionSpan &span) {
    if (!is_split(span)) return 0;
    return span.tokens * span.args->num_heads * span.splits * (value_width(*span.args) + kPartialTail) *
           static_cast<int64_t>(sizeof(float));
}

// All that the rows of a span see must be there at once.
int32_t check_ring(const krasis_attention_args &args) {
    static_assert(KRASIS_RING_STEP % kBlockKeys == 0, "a block of keys must lie together");
    if (!is_ring(args)) return KRASIS_OK;
    if (args.window == 0) return KRASIS_ERR_ARGUMENT;
    for (int64_t i = 0; i < args.num_spans; ++i) {
        const krasis_span &span = args.spans[i];
        const int64_t before = span.start - first_key(args.window, span.start);
        if (span.rows > 0 && span.rows > args.capacity - before) return KRASIS_ERR_RANGE;
    }
    return KRASIS_OK;
}

int32_t check(const krasis_attention_args &args) {
    if (args.tokens < 0 || args.num_heads <= 0 || args.num_kv_heads <= 0 || args.head_dim <= 0 || args.window < 0 ||
        args.workspace_bytes < 0 || args.value_dim < 0) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (args.head_dim % 16 != 0 || args.head_dim > kMaxAttentionDim || args.value_dim % 16 != 0 ||
        args.value_dim > args.head_dim || args.num_heads % args.num_kv_heads != 0 ||
        args.ldq < args.num_heads * args.head_dim) {
        return KRASIS_ERR_SHAPE;
    }
    if (const int32_t status = check_spans(args, INT64_MAX)) return status;
    if (args.tokens > 0 && (!args.q || !args.out)) return KRASIS_ERR_ARGUMENT;
    if (const int32_t status = check_ring(args)) return status;
    const int64_t available = args.workspace ? args.workspace_bytes : 0;
    for (int64_t i = 0; i < args.num_spans; ++i) {
        if (args.spans[i].rows > 0 && partial_bytes(view_of(args, args.spans[i])) > available) return KRASIS_ERR_MEMORY;
    }
    return KRASIS_OK;
}

struct Piece {
    AttentionSpan span;
    Grid grid;
    bool split;
    int64_t end_task, end_row;  // tasks, and rows to be merged, of this piece and those before it
};

// Spans that run together: as many as have room for their partial results.
class Round {
  public:
    // Takes spans from index `first` on and returns the index after the last.
    int64_t take(const krasis_attention_args &args, int64_t first) {
        uint8_t *memory = static_cast<uint8_t *>(args.workspace);
        int64_t used = 0, index = first;
        for (; index < args.num_spans && count_ < kMostPieces; ++index) {
            if (args.spans[index].rows == 0) continue;
            Piece piece;
            piece.span = view_of(args, args.spans[index]);
            const int64_t bytes = partial_bytes(piece.span);
            if (bytes > args.workspace_bytes - used) break;  // a first one fits: see check
            piece.split = bytes > 0;
            if (piece.split) piece.span.partials = reinterpret_cast<float *>(memory + used);
            used += bytes;
            piece.grid = Grid(args, piece.span.tokens);
            tasks_ += piece.grid.count * (piece.split ? piece.span.splits : 1);
            rows_ += piece.split ? piece.span.tokens * args.num_heads : 0;
            row_splits_ = piece.split && piece.span.splits > row_splits_ ? piece.span.splits : row_splits_;
            work_ += piece.span.tokens * args.num_heads * (piece.span.start + piece.span.tokens) *
                     (args.head_dim + value_width(args));
            piece.end_task = tasks_;
            piece.end_row = rows_;
            pieces_[count_++] = piece;
        }
        return index;
    }
    void run(krasis_pool *pool, const Parts &parts, int64_t width) const {
        const auto attend = [&](int64_t begin, int64_t end, int32_t) {
            for (int64_t i = begin; i < end; ++i) run_task(parts, i);
        };
        if (work_ < kSmallWork || tasks_ == 1) {
            attend(0, tasks_, 0);
        } else {
            parallel_for(pool, tasks_, 1, attend);
        }
        parallel_rows(pool, rows_, row_splits_ * width, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) merge_row(parts, i);
        });
    }

  private:
    void run_task(const Parts &parts, int64_t index) const {
        const Piece *piece = pieces_;
        while (index >= piece->end_task) ++piece;
        const int64_t own = index - (piece == pieces_ ? 0 : piece[-1].end_task);
        if (!piece->split) return parts.attend_task(piece->span, piece->grid.task(own));
        const int64_t splits = piece->span.splits;
        parts.attend_split(piece->span, piece->grid.task(own / splits), piece->span.first_split + own % splits);
    }
    void merge_row(const Parts &parts, int64_t index) const {
        const Piece *piece = pieces_;
        while (index >= piece->end_row) ++piece;
        parts.merge_splits(piece->span, index - (piece == pieces_ ? 0 : piece[-1].end_row));
    }

    Piece pieces_[kMostPieces];
    int64_t count_ = 0, tasks_ = 0, rows_ = 0, row_splits_ = 0, work_ = 0;
};

}  // namespace

int64_t krasis_attention_workspace_bytes(int64_t num_rows, int64_t longest_end, int64_t num_heads, int64_t head_dim) {
    if (num_rows < 0 || longest_end < 0 || num_rows > kMostPositions || longest_end > kMostPositions ||
        num_heads <= 0 || num_heads > kMostHeads || head_dim <= 0 || head_dim > kMaxAttentionDim) {
        return -1;
    }
    const int64_t splits = num_splits(longest_end);
    if (splits < 2) return 0;
    return smaller(num_rows, kSplitTokens) * num_heads * splits * (head_dim + kPartialTail) *
           static_cast<int64_t>(sizeof(float));
}

int32_t krasis_attention(krasis_pool *pool, const krasis_attention_args *args) {
    if (!pool || !args) return KRASIS_ERR_ARGUMENT;
    if (const int32_t status = check(*args)) return status;
    const Parts parts = parts_for(pool);
    for (int64_t next = 0; next < args->num_spans;) {
        Round round;
        next = round.take(*args, next);
        round.run(pool, parts, value_width(*args));
    }
    return KRASIS_OK;
}
