// attention_kernel.h: online softmax over blocks of keys, compiled once per instruction set.
#pragma once

#include "attention_tiles.h"
#include "cache_bytes.h"
#include "spans.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

namespace {

constexpr float kNone = -__builtin_inff();

// Everything a task of up to kTaskRows rows of up to kMaxDim channels needs besides its inputs: 280 KiB of the thread's
// stack, of which head_dim 128 touches half; for wide heads 460 KiB, of which latent attention leaves 150 alone.
template <int kMaxDim, int kTaskRows>
struct Scratch {
    static constexpr int kStride =
        kMaxDim + 16;  // floats between keys: an odd number of lines, so that sets do not clash
    alignas(64) float queries[kTaskRows * kMaxDim];    // panels of [dim][rows of the panel], scaled
    alignas(64) float out[kTaskRows * kMaxDim];        // [rows][value width], not yet divided by sum
    alignas(64) float scores[kTaskRows * kBlockKeys];  // [rows][kBlockKeys]
    alignas(64) float keys[kBlockKeys * kStride];      // [kBlockKeys][kStride]
    alignas(64) float values[kBlockKeys * kMaxDim];    // F16 caches: [kBlockKeys][dim]
    float max[kTaskRows], sum[kTaskRows];
};
using NarrowScratch = Scratch<kNarrowDim, kMaxRows>;
using WideScratch = Scratch<kMaxAttentionDim, kMaxWideRows>;

KRASIS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

KRASIS_INLINE float exp_of(float x) { return _mm256_cvtss_f32(exp(V8::set1(x)).v); }

// Packs the rows of a task into panels; rows of padding are zero.
void load_queries(const AttentionSpan &span, const AttentionTask &task, float *packed) {
    const krasis_attention_args &args = *span.args;
    const int64_t dim = args.head_dim, rows = task.num_tokens * task.num_heads;
    const V8 scale = V8::set1(args.scale);
    for (int64_t first = 0; first < rows;) {
        const int64_t width = panel_width(rows - first);
        for (int64_t row = first; row < first + width; row += 8) {
            const float *q[8];
            for (int i = 0; i < 8; ++i) {
                const int64_t token = task.first_token + (row + i) / task.num_heads;
                const int64_t head = task.first_head + (row + i) % task.num_heads;
                q[i] = row + i < rows ? span.q + token * args.ldq + head * dim : nullptr;
            }
            for (int64_t d = 0; d < dim; d += 8) {
                V8 block[8];
                for (int i = 0; i < 8; ++i) block[i] = q[i] ? mul(V8::load(q[i] + d), scale) : V8::zero();
                transpose8(block);
                for (int i = 0; i < 8; ++i) block[i].store(packed + first * dim + (d + i) * width + row - first);
            }
        }
        first += width;
    }
}

template <class S>
void score_block(const S &scratch, int64_t rows, int64_t num_keys, int64_t dim, const Ahead &ahead, float *scores) {
    const Ahead nothing;
    for (int64_t first = 0; first < rows;) {
        const int64_t width = panel_width(rows - first);
        const float *queries = scratch.queries + first * dim;
        float *to = scores + first * kBlockKeys;
        const Ahead &now = first == 0 ? ahead : nothing;
        if (width == kPanelRows) {
            score_panel<V, 2, S::kStride>(queries, scratch.keys, num_keys, dim, now, to);
        } else if (width == kLanes) {
            score_panel<V, 1, S::kStride>(queries, scratch.keys, num_keys, dim, now, to);
        } else {
            score_panel<V8, 1, S::kStride>(queries, scratch.keys, num_keys, dim, now, to);
        }
        first += width;
    }
}

// One row of scores -> weights, of which those in [first, num_keys) count, one at least; updates the row's maximum, sum
// and output.
void softmax_scores(float *scores, int64_t first, int64_t num_keys, int64_t dim, float &row_max, float &row_sum,
                    float *out) {
    for (int64_t key = 0; key < first; ++key) scores[key] = kNone;
    for (int64_t key = num_keys; key < kBlockKeys; ++key) scores[key] = kNone;
    V16 x[4];
    for (int i = 0; i < 4; ++i) x[i] = V16::load(scores + 16 * i);
    const float block_max = hmax(max(max(x[0], x[1]), max(x[2], x[3])));
    if (block_max > row_max) {
        const float shrink = exp_of(row_max - block_max);
        row_max = block_max;
        row_sum *= shrink;
        const V factor = V::set1(shrink);
        int64_t d = 0;
        for (; d + kLanes <= dim; d += kLanes) mul(V::load(out + d), factor).store(out + d);
    }
    const V16 shift = V16::set1(row_max);
    for (int i = 0; i < 4; ++i) {
        x[i] = exp(sub(x[i], shift));
        x[i].store(scores + 16 * i);
    }
    row_sum += hsum(add(add(x[0], x[1]), add(x[2], x[3])));
}

template <class Cache>
void load_keys(const krasis_attention_args &args, const Cache *keys, int64_t num_keys, int64_t stride, float *to) {
    const int64_t dim = args.head_dim;
    for (int64_t key = 0; key < num_keys; ++key) {
        for (int64_t d = 0; d < dim; d += 8) load8(keys + key * dim + d).store(to + key * stride + d);
    }
}

void load_keys(const krasis_attention_args &args, const int8_t *keys, int64_t num_keys, int64_t stride, float *to) {
    const int64_t dim = args.head_dim, first = value_width(args);  // of a latent's row; else all of it
    for (int64_t key = 0; key < num_keys; ++key, keys += row_bytes(args), to += stride) {
        load_bytes(keys, keys + dim, first, to);
        if (first < dim) load_bytes(keys + first, keys + dim + kScaleBytes, dim - first, to + first);
    }
}

Values load_values(const krasis_attention_args &args, const float *values, int64_t, float *) {
    return {values, args.head_dim};
}

Values load_values(const krasis_attention_args &args, const uint16_t *values, int64_t num_keys, float *buffer) {
    for (int64_t i = 0; i < num_keys * args.head_dim; i += 16) V16::load_f16(values + i).store(buffer + i);
    return {buffer, args.head_dim};
}

Values load_values(const krasis_attention_args &args, const int8_t *values, int64_t num_keys, float *buffer) {
    load_keys(args, values, num_keys, args.head_dim, buffer);
    return {buffer, args.head_dim};
}

// Keys [first, end) of a block that a query sees; none if first >= end.
struct Visible {
    int64_t first, end;
    Visible(int64_t window, int64_t position, int64_t begin, int64_t num_keys)
        : first(first_key(window, position) - begin), end(smaller(position + 1 - begin, num_keys)) {}
    bool none() const { return first >= end || end <= 0; }
};

// The block of keys at begin (none at or beyond end) for all rows of the task; a row uses those that it sees. A weight
// before a row's window is 0, which changes no sum. Keys before all rows' windows are not multiplied: in a ring, others
// may have taken their place.
template <class Cache, class S>
void attend_block(const AttentionSpan &span, const AttentionTask &task, int64_t begin, int64_t end, S &scratch) {
    const krasis_attention_args &args = *span.args;
    const int64_t num_keys = smaller(end - begin, kBlockKeys);
    const int64_t dim = args.head_dim, bytes = row_bytes(args), heads = task.num_heads, rows = task.num_tokens * heads;
    const int64_t width = value_width(args);
    const bool latent = args.value_dim > 0;  // a value is the beginning of its key
    const auto rows_of = [&](const void *memory, int64_t position) {
        const int64_t row = task.kv_head * args.capacity + row_of(args, position);
        return reinterpret_cast<const Cache *>(static_cast<const uint8_t *>(memory) + row * bytes);
    };
    const Cache *v_cache = rows_of(span.values, begin);
    load_keys(args, rows_of(span.keys, begin), num_keys, S::kStride, scratch.keys);
    const Ahead wanted = latent ? Ahead{} : Ahead{v_cache, num_keys, bytes};
    score_block(scratch, rows, num_keys, dim, wanted, scratch.scores);
    const int64_t position = span.start + task.first_token, last = position + task.num_tokens - 1;
    for (int64_t row = 0; row < rows; ++row) {
        const Visible visible(args.window, position + row / heads, begin, num_keys);
        if (visible.none()) continue;
        softmax_scores(scratch.scores + row * kBlockKeys, visible.first, visible.end, width, scratch.max[row],
                       scratch.sum[row], scratch.out + row * width);
    }
    const int64_t unseen = Visible(args.window, position, begin, num_keys).first;  // by any row
    const int64_t skipped = unseen > 0 ? unseen : 0;
    Values values = latent ? Values{scratch.keys, S::kStride} : load_values(args, v_cache, num_keys, scratch.values);
    values.data += skipped * values.stride;
    const float *weights = scratch.scores + skipped;
    if (position + 1 - begin >= num_keys && !Visible(args.window, last, begin, num_keys).none()) {
        const int64_t left = smaller(end - begin - num_keys, kBlockKeys);
        const Ahead next{rows_of(span.keys, begin + num_keys), left, bytes};
        return add_values(rows, weights, values, num_keys - skipped, width, next, scratch.out);
    }
    for (int64_t token = 0; token < task.num_tokens; ++token) {  // every token sees another number of keys
        const Visible visible(args.window, position + token, begin, num_keys);
        if (visible.none()) continue;
        const int64_t row = token * heads;
        add_values(heads, weights + row * kBlockKeys, values, visible.end - skipped, width, Ahead{},
                   scratch.out + row * width);
    }
}

// Keys of one split, from nothing, into scratch.out, max and sum.
template <class S>
void run_split(const AttentionSpan &span, const AttentionTask &task, int64_t split, S &scratch) {
    const krasis_attention_args &args = *span.args;
    const int64_t rows = task.num_tokens * task.num_heads;
    for (int64_t row = 0; row < rows; ++row) {
        scratch.max[row] = kNone;
        scratch.sum[row] = 0.0f;
    }
    for (int64_t i = 0; i < rows * value_width(args); i += kLanes) V::zero().store(scratch.out + i);
    const int64_t position = span.start + task.first_token;
    const int64_t end = smaller(position + task.num_tokens, (split + 1) * kSplitKeys);
    const int64_t seen = first_key(args.window, position) / kBlockKeys * kBlockKeys;  // by the first token, or later
    for (int64_t begin = seen > split * kSplitKeys ? seen : split * kSplitKeys; begin < end; begin += kBlockKeys) {
        if (args.kv_dtype == KRASIS_F16) {
            attend_block<uint16_t>(span, task, begin, end, scratch);
        } else if (args.kv_dtype == KRASIS_I8) {
            attend_block<int8_t>(span, task, begin, end, scratch);
        } else {
            attend_block<float>(span, task, begin, end, scratch);
        }
    }
}

// The splits that a query sees keys of.
struct Splits {
    int64_t first, end;
    Splits(int64_t window, int64_t position)
        : first(first_key(window, position) / kSplitKeys), end(num_splits(position + 1)) {}
};

// Adds one split's (out, max, sum) to a row's running total. The first split comes to kNone, 0 and zeros.
void merge(const float *out, float part_max, float part_sum, int64_t dim, float *total, float &row_max,
           float &row_sum) {
    const float largest = part_max > row_max ? part_max : row_max;
    const float keep = exp_of(row_max - largest), take = exp_of(part_max - largest);
    row_max = largest;
    row_sum = row_sum * keep + part_sum * take;
    const V keeps = V::set1(keep), takes = V::set1(take);
    for (int64_t d = 0; d < dim; d += kLanes) {
        fma(V::load(out + d), takes, mul(V::load(total + d), keeps)).store(total + d);
    }
}

void zero_row(float *total, int64_t dim) {
    for (int64_t d = 0; d < dim; d += kLanes) V::zero().store(total + d);
}

// Divides a row by its sum of weights, to which the head's sink belongs.
void finish_row(const krasis_attention_args &args, int64_t head, float *total, float row_max, float sum) {
    float factor = 1.0f / sum;
    if (args.sinks) {
        const float sink = args.sinks[head], largest = sink > row_max ? sink : row_max;
        const float keep = exp_of(row_max - largest);
        factor = keep / (sum * keep + exp_of(sink - largest));
    }
    const V inverse = V::set1(factor);
    for (int64_t d = 0; d < value_width(args); d += kLanes) mul(V::load(total + d), inverse).store(total + d);
}

template <class S>
void run_task(const AttentionSpan &span, const AttentionTask &task) {
    S scratch;
    float max[kMaxRows], sum[kMaxRows];
    const krasis_attention_args &args = *span.args;
    const int64_t dim = value_width(args), rows = task.num_tokens * task.num_heads;
    const auto head_of = [&](int64_t row) { return task.first_head + row % task.num_heads; };
    const auto total = [&](int64_t row) {
        const int64_t token = task.first_token + row / task.num_heads;
        return span.out + (token * args.num_heads + head_of(row)) * dim;
    };
    load_queries(span, task, scratch.queries);
    for (int64_t row = 0; row < rows; ++row) {
        max[row] = kNone;
        sum[row] = 0.0f;
        zero_row(total(row), dim);
    }
    const int64_t position = span.start + task.first_token;
    const int64_t end = num_splits(position + task.num_tokens);
    for (int64_t split = Splits(args.window, position).first; split < end; ++split) {
        run_split(span, task, split, scratch);
        for (int64_t row = 0; row < rows; ++row) {
            const Splits own(args.window, position + row / task.num_heads);
            if (split < own.first || split >= own.end) continue;
            merge(scratch.out + row * dim, scratch.max[row], scratch.sum[row], dim, total(row), max[row], sum[row]);
        }
    }
    for (int64_t row = 0; row < rows; ++row) finish_row(args, head_of(row), total(row), max[row], sum[row]);
}

template <class S>
void run_lone_split(const AttentionSpan &span, const AttentionTask &task, int64_t split) {
    S scratch;
    const int64_t dim = value_width(*span.args);
    load_queries(span, task, scratch.queries);
    run_split(span, task, split, scratch);
    for (int64_t row = 0; row < task.num_tokens * task.num_heads; ++row) {
        const int64_t token = task.first_token + row / task.num_heads;
        const int64_t index = token * span.args->num_heads + task.first_head + row % task.num_heads;
        float *partial = span.partials + (index * span.splits + split - span.first_split) * (dim + kPartialTail);
        for (int64_t d = 0; d < dim; d += kLanes) V::load(scratch.out + row * dim + d).store(partial + d);
        partial[dim] = scratch.max[row];
        partial[dim + 1] = scratch.sum[row];
    }
}

}  // namespace

void attend_task(const AttentionSpan &span, const AttentionTask &task) {
    return is_wide(*span.args) ? run_task<WideScratch>(span, task) : run_task<NarrowScratch>(span, task);
}

void attend_split(const AttentionSpan &span, const AttentionTask &task, int64_t split) {
    if (is_wide(*span.args)) return run_lone_split<WideScratch>(span, task, split);
    run_lone_split<NarrowScratch>(span, task, split);
}

void merge_splits(const AttentionSpan &span, int64_t row) {
    const krasis_attention_args &args = *span.args;
    const int64_t dim = value_width(args);
    const Splits own(args.window, span.start + row / args.num_heads);
    float *total = span.out + row * dim;
    float max = kNone, sum = 0.0f;
    zero_row(total, dim);
    for (int64_t split = own.first; split < own.end; ++split) {
        const float *partial = span.partials + (row * span.splits + split - span.first_split) * (dim + kPartialTail);
        merge(partial, partial[dim], partial[dim + 1], dim, total, max, sum);
    }
    finish_row(args, row % args.num_heads, total, max, sum);
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
