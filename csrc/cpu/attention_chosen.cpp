// attention_chosen.cpp: krasis_attention_chosen: the keys that rows chose are laid side by side, and attended to as
// those of short sequences. A row that chose all it sees gets the bits of krasis_attention.
#include <atomic>
#include <cstring>

#include "attention.h"
#include "rows.h"
#include "spans.h"

namespace {

using namespace krasis;

constexpr int64_t kRoundRows = 16;    // rows whose keys are laid out at once
constexpr int64_t kGatherKeys = 256;  // of a task
constexpr int64_t kLine = 64;

int64_t aligned(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct Row {
    const krasis_span *span;
    int64_t position;
};

// What krasis_attention does not check of a call that it sees in parts.
int32_t check(const krasis_attention_args &args, const int32_t *chosen, int64_t budget, int64_t block) {
    if (block <= 0 || block > INT32_MAX / 2 || budget > INT32_MAX / 2 || budget % block != 0 || args.tokens < 0 ||
        args.num_heads <= 0 || args.head_dim <= 0 || args.workspace_bytes < 0 || budget <= 0 ||
        (args.tokens > 0 && (!chosen || !args.q || !args.out)) || (args.workspace_bytes > 0 && !args.workspace)) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (args.num_kv_heads != 1 || args.value_dim <= 0 || args.window != 0 || args.ring != 0 ||
        args.head_dim > kMaxAttentionDim) {
        return KRASIS_ERR_SHAPE;
    }
    return check_spans(args, INT64_MAX);
}

class Gather {
  public:
    Gather(const krasis_attention_args &args, const int32_t *chosen, int64_t budget, int64_t block)
        : args_(args),
          chosen_(chosen),
          budget_(budget),
          block_(block),
          width_(budget + block - 1),
          piece_bytes_(aligned(width_ * row_bytes(args))) {
        const int64_t row_bytes =
            piece_bytes_ + aligned(krasis_attention_workspace_bytes(1, width_, args.num_heads, args.head_dim));
        most_ = smaller(kRoundRows, args.workspace_bytes / row_bytes);
    }
    bool has_room() const { return most_ > 0; }
    bool take() {
        first_row_ += count_;
        for (count_ = 0; count_ < most_ && next_span_ < args_.num_spans;) {
            const krasis_span &span = args_.spans[next_span_];
            if (next_row_ >= span.rows) {
                ++next_span_;
                next_row_ = 0;
                continue;
            }
            rows_[count_++] = {&span, span.start + next_row_++};
        }
        return count_ > 0;
    }
    int32_t run(krasis_pool *pool) {
        const int64_t chunks = (width_ + kGatherKeys - 1) / kGatherKeys;
        parallel_rows(pool, count_ * chunks, kGatherKeys * args_.head_dim, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task) lay(task / chunks, task % chunks * kGatherKeys);
        });
        if (is_wrong_.load()) return KRASIS_ERR_RANGE;
        krasis_span spans[kRoundRows];
        for (int64_t i = 0; i < count_; ++i) spans[i] = {i, 1, num_keys(i) - 1, piece(i), piece(i)};
        krasis_attention_args part = args_;
        part.q += first_row_ * args_.ldq;
        part.out += first_row_ * args_.num_heads * args_.value_dim;
        part.tokens = part.num_spans = count_;
        part.spans = spans;
        part.keys_offset_bytes = part.values_offset_bytes = 0;
        part.capacity = width_;
        part.workspace = piece(most_);
        part.workspace_bytes = args_.workspace_bytes - most_ * piece_bytes_;
        return krasis_attention(pool, &part);
    }

  private:
    uint8_t *piece(int64_t index) const { return static_cast<uint8_t *>(args_.workspace) + index * piece_bytes_; }
    int64_t num_keys(int64_t index) const { return chosen_keys(rows_[index].position + 1, budget_, block_); }
    // Keys [first, +kGatherKeys) of a row's choice.
    void lay(int64_t index, int64_t first) {
        const Row &row = rows_[index];
        const int64_t bytes = row_bytes(args_), end = smaller(num_keys(index), first + kGatherKeys);
        const uint8_t *keys = static_cast<const uint8_t *>(layer_keys(args_, *row.span));
        const int32_t *chosen = chosen_ + (first_row_ + index) * width_;
        uint8_t *to = piece(index) + first * bytes;
        for (int64_t key = first; key < end; ++key, to += bytes) {
            if (chosen[key] < 0 || chosen[key] > row.position) {
                is_wrong_.store(true);
                return;
            }
            std::memcpy(to, keys + chosen[key] * bytes, static_cast<size_t>(bytes));
        }
    }

    const krasis_attention_args &args_;
    const int32_t *chosen_;
    int64_t budget_, block_, width_, piece_bytes_, most_;
    Row rows_[kRoundRows];
    int64_t count_ = 0, first_row_ = 0, next_span_ = 0, next_row_ = 0;
    std::atomic<bool> is_wrong_{false};
};

}  // namespace

int32_t krasis_attention_chosen(krasis_pool *pool, const krasis_attention_args *args, const int32_t *chosen,
                                int64_t budget, int64_t block) {
    if (!pool || !args) return KRASIS_ERR_ARGUMENT;
    if (const int32_t status = check(*args, chosen, budget, block)) return status;
    if (args->tokens == 0) return KRASIS_OK;
    Gather gather(*args, chosen, budget, block);
    if (!gather.has_room()) return KRASIS_ERR_MEMORY;
    while (gather.take()) {
        if (const int32_t status = gather.run(pool)) return status;
    }
    return KRASIS_OK;
}
