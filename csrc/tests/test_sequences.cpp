// test_sequences.cpp: rows of several sequences in one call, in buffers without a byte to spare: each sequence gets the
// bits of a call of its own, whatever the threads and the instruction set. Values are checked in Python.
#include <algorithm>
#include <memory>

#include "test.h"

namespace {

using test::Buffer;
using test::Pool;
using test::Random;

constexpr int64_t kHeads = 6, kKvHeads = 2, kCapacity = 700;

struct Part {
    int64_t start, rows;
};

struct Variant {
    int64_t head_dim, rotary_dims, window;
    int32_t norm, style, kv_dtype;
    bool bias, sinks;
    float clip;
};

struct Sequences {
    Variant v;
    std::vector<Part> parts;
    int64_t rows = 0, row_size;
    Buffer<float> qkv, bias, q_norm, k_norm, cos, sin, sinks;
    std::vector<Buffer<uint8_t>> keys, values;

    Sequences(Random &random, const Variant &variant, std::vector<Part> spans)
        : v(variant), parts(std::move(spans)), row_size((kHeads + 2 * kKvHeads) * v.head_dim) {
        const auto fill = [&](Buffer<float> &to, int64_t size) {
            to.resize(size);
            for (float &value : to) value = random.normal();
        };
        int64_t longest = 0;
        for (const Part &part : parts) {
            rows += part.rows;
            longest = part.start + part.rows > longest ? part.start + part.rows : longest;
            const int64_t bytes = kKvHeads * kCapacity * row_bytes();
            keys.emplace_back(bytes);
            values.emplace_back(bytes);
        }
        fill(qkv, rows * row_size);
        fill(bias, row_size);
        fill(q_norm, v.norm == KRASIS_QK_NORM_FLAT ? kHeads * v.head_dim : v.head_dim);
        fill(k_norm, v.norm == KRASIS_QK_NORM_FLAT ? kKvHeads * v.head_dim : v.head_dim);
        fill(cos, longest * v.rotary_dims / 2);
        fill(sin, longest * v.rotary_dims / 2);
        fill(sinks, kHeads);
    }
    int64_t row_bytes() const {
        if (v.kv_dtype == KRASIS_I8) return v.head_dim + 4;
        return v.head_dim * (v.kv_dtype == KRASIS_F16 ? 2 : 4);
    }
    // The memory of each part as a ring, which holds what the first row sees before the part; elsewhere NaN.
    std::vector<Buffer<uint8_t>> as_rings(const std::vector<Buffer<uint8_t>> &whole, int64_t ring) const {
        const int64_t row = row_bytes();
        std::vector<Buffer<uint8_t>> found;
        for (size_t i = 0; i < parts.size(); ++i) {
            Buffer<uint8_t> &to = found.emplace_back(kKvHeads * ring * row);
            std::fill(to.begin(), to.end(), uint8_t{0xff});
            for (int64_t head = 0; head < kKvHeads; ++head) {
                for (int64_t p = std::max<int64_t>(0, parts[i].start - v.window + 1); p < parts[i].start; ++p) {
                    std::copy_n(whole[i].begin() + (head * kCapacity + p) * row, row,
                                to.begin() + (head * ring + p % ring) * row);
                }
            }
        }
        return found;
    }
    // Parts [begin, end), whose first row is first_row, in one call: their output. ring: 0 or a ring's positions.
    Buffer<float> run(krasis_pool *pool, size_t begin, size_t end, int64_t first_row, int64_t ring = 0) {
        std::vector<krasis_span> spans;
        std::vector<Buffer<uint8_t>> ring_keys, ring_values;
        if (ring > 0) {
            ring_keys = as_rings(keys, ring);
            ring_values = as_rings(values, ring);
        }
        int64_t row = 0, longest = 0;
        for (size_t i = begin; i < end; ++i) {
            Buffer<uint8_t> &k = ring > 0 ? ring_keys[i] : keys[i], &v_memory = ring > 0 ? ring_values[i] : values[i];
            spans.push_back({row, parts[i].rows, parts[i].start, k.data(), v_memory.data()});
            row += parts[i].rows;
            longest = std::max(longest, parts[i].start + parts[i].rows);
        }
        Buffer<float> own(qkv.begin() + first_row * row_size, qkv.begin() + (first_row + row) * row_size);
        krasis_qkv_args store{};
        store.qkv = own.data();
        store.tokens = row;
        store.num_heads = kHeads;
        store.num_kv_heads = kKvHeads;
        store.head_dim = v.head_dim;
        store.bias = v.bias ? bias.data() : nullptr;
        store.norm = v.norm;
        store.q_norm = q_norm.data();
        store.k_norm = k_norm.data();
        store.eps = 1e-6f;
        store.clip = v.clip;
        store.rope_style = v.style;
        store.cos = cos.data();
        store.sin = sin.data();
        store.rotary_dims = v.rotary_dims;
        store.max_positions = v.rotary_dims > 0 ? static_cast<int64_t>(cos.size()) / (v.rotary_dims / 2) : 0;
        store.spans = spans.data();
        store.num_spans = static_cast<int64_t>(spans.size());
        store.capacity = ring > 0 ? ring : kCapacity;
        store.ring = ring;
        store.kv_dtype = v.kv_dtype;
        CHECK_OK(krasis_qk_norm_rope_store(pool, &store));
        Buffer<float> out(row * kHeads * v.head_dim);
        Buffer<uint8_t> workspace(krasis_attention_workspace_bytes(row, longest, kHeads, v.head_dim));
        krasis_attention_args attend{};
        attend.q = own.data();
        attend.ldq = row_size;
        attend.tokens = row;
        attend.num_heads = kHeads;
        attend.num_kv_heads = kKvHeads;
        attend.head_dim = v.head_dim;
        attend.spans = spans.data();
        attend.num_spans = store.num_spans;
        attend.capacity = store.capacity;
        attend.ring = ring;
        attend.kv_dtype = v.kv_dtype;
        attend.scale = 0.2f;
        attend.window = v.window;
        attend.sinks = v.sinks ? sinks.data() : nullptr;
        attend.out = out.data();
        attend.workspace = workspace.data();
        attend.workspace_bytes = static_cast<int64_t>(workspace.size());
        CHECK_OK(krasis_attention(pool, &attend));
        return out;
    }
};

// Positions modulo the size of a ring that has no row to spare: the bits of a cache of all positions.
void rings_have_the_same_bits() {
    const Variant variants[] = {
        {48, 20, 100, KRASIS_QK_NORM_FLAT, KRASIS_ROPE_HALF, KRASIS_F32, true, true, 1.5f},
        {32, 32, 64, KRASIS_QK_NORM_HEAD, KRASIS_ROPE_HALF, KRASIS_F16, false, false, 0.0f},
        {512, 32, 1, KRASIS_QK_NORM_NONE, KRASIS_ROPE_HALF, KRASIS_F16, false, false, 0.0f},
        {16, 16, 70, KRASIS_QK_NORM_HEAD, KRASIS_ROPE_HALF, KRASIS_I8, false, true, 0.0f},
    };
    Random random(13);
    for (const Variant &variant : variants) {
        const int64_t ring = 192, most = ring - variant.window + 1;
        Sequences sequences(random, variant,
                            {{699, 1}, {0, 70}, {300, 4}, {255, 1}, {256, 2}, {0, 1}, {500, most}, {150, most}});
        for (int32_t isa : test::available_isas()) {
            Pool pool(3, isa);
            const Buffer<float> whole = sequences.run(pool, 0, sequences.parts.size(), 0);
            CHECK(test::same_bits(sequences.run(pool, 0, sequences.parts.size(), 0, ring), whole));
        }
    }
}

void each_alone_and_together() {
    const Variant variants[] = {
        {32, 32, 0, KRASIS_QK_NORM_HEAD, KRASIS_ROPE_HALF, KRASIS_F16, false, false, 0.0f},
        {48, 20, 100, KRASIS_QK_NORM_FLAT, KRASIS_ROPE_HALF, KRASIS_F32, true, true, 1.5f},
        {64, 32, 0, KRASIS_QK_NORM_NONE, KRASIS_ROPE_INTERLEAVED, KRASIS_F16, true, false, 0.0f},
        {16, 0, 64, KRASIS_QK_NORM_HEAD, KRASIS_ROPE_HALF, KRASIS_F32, false, true, 0.0f},
        {48, 48, 0, KRASIS_QK_NORM_FLAT, KRASIS_ROPE_HALF, KRASIS_I8, true, false, 1.0f},
    };
    Random random(12);
    for (const Variant &variant : variants) {
        Sequences sequences(random, variant, {{699, 1}, {0, 70}, {300, 4}, {255, 1}, {256, 2}, {0, 1}, {500, 200}});
        std::unique_ptr<Buffer<float>> first;
        for (int32_t isa : test::available_isas()) {
            for (int32_t threads : {1, 3}) {
                Pool pool(threads, isa);
                const Buffer<float> out = sequences.run(pool, 0, sequences.parts.size(), 0);
                if (!first) first = std::make_unique<Buffer<float>>(out);
                CHECK(test::same_bits(out, *first));
                int64_t row = 0;
                for (size_t i = 0; i < sequences.parts.size(); ++i) {
                    const int64_t size = kHeads * variant.head_dim, rows = sequences.parts[i].rows;
                    const Buffer<float> want(first->begin() + row * size, first->begin() + (row + rows) * size);
                    CHECK(test::same_bits(sequences.run(pool, i, i + 1, row), want));
                    row += rows;
                }
            }
        }
    }
}

}  // namespace

int main() {
    each_alone_and_together();
    rings_have_the_same_bits();
    return test::finish("sequences");
}
