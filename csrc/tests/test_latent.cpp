// test_latent.cpp: latent attention of several sequences, in buffers without a byte to spare: values against float64,
// and the same bits whatever the threads, the instruction set and the other sequences of the call.
#include <algorithm>
#include <cmath>
#include <memory>

#include "reference.h"

namespace {

using test::Buffer;
using test::Pool;
using test::Random;

constexpr int64_t kCapacity = 300;

struct Part {
    int64_t start, rows;
};

struct Shape {
    int64_t heads, nope, rope, rank, value;
    int32_t style, kv_dtype;
};

Buffer<float> numbers(Random &random, int64_t size) {
    Buffer<float> made(size);
    for (float &value : made) value = random.normal();
    return made;
}

struct Weight {
    Buffer<int8_t> codes;
    Buffer<float> scales;
    int64_t k;
    Weight(Random &random, int64_t rows, int64_t columns) : codes(rows * columns), scales(rows), k(columns) {
        for (int8_t &code : codes) code = static_cast<int8_t>(random.between(-127, 127));
        for (float &scale : scales) scale = static_cast<float>(0.002 + 0.001 * random.uniform());
    }
    double at(int64_t row, int64_t column) const {
        const int64_t strip = (row / 32 * (k / 4) + column / 4) * 128;
        return codes[strip + row % 32 * 4 + column % 4] * static_cast<double>(scales[row]);
    }
};

struct Model {
    Shape s;
    std::vector<Part> parts;
    int64_t rows = 0, width, q_size, kv_size;
    Buffer<float> q, kv, norm, cos, sin;
    Weight to_latent, to_values;

    Model(Random &random, const Shape &shape, std::vector<Part> spans)
        : s(shape),
          parts(std::move(spans)),
          width(s.rank + s.rope),
          q_size(s.heads * (s.nope + s.rope)),
          kv_size(width),
          to_latent(random, s.heads * s.rank, s.nope),
          to_values(random, s.heads * s.value, s.rank) {
        for (const Part &part : parts) rows += part.rows;
        q = numbers(random, rows * q_size);
        kv = numbers(random, rows * kv_size);
        norm = numbers(random, s.rank);
        cos = numbers(random, kCapacity * s.rope / 2);
        sin = numbers(random, kCapacity * s.rope / 2);
    }
    // Parts [begin, end), whose first row is first_row, over caches: queries, attended latents and values.
    struct Result {
        Buffer<float> queries, attended, values;
    };
    Result run(krasis_pool *pool, size_t begin, size_t end, int64_t first_row,
               std::vector<Buffer<uint8_t>> &caches) const {
        std::vector<krasis_span> spans;
        int64_t row = 0, longest = 0;
        uint8_t nothing = 0;
        for (size_t i = begin; i < end; ++i) {
            spans.push_back({row, parts[i].rows, parts[i].start, caches[i].data(), &nothing});
            row += parts[i].rows;
            longest = std::max(longest, parts[i].start + parts[i].rows);
        }
        const Buffer<float> own_q(q.begin() + first_row * q_size, q.begin() + (first_row + row) * q_size);
        const Buffer<float> own_kv(kv.begin() + first_row * kv_size, kv.begin() + (first_row + row) * kv_size);
        Result result{Buffer<float>(row * s.heads * width), Buffer<float>(row * s.heads * s.rank),
                      Buffer<float>(row * s.heads * s.value)};
        Random random(1);
        test::Acts nope(random, row * s.heads, s.nope), gathered(random, row * s.heads, s.rank);
        const krasis_acts acts = nope.view(0, row * s.heads), latents = gathered.view(0, row * s.heads);
        krasis_latent_args store{};
        store.q = own_q.data();
        store.kv = own_kv.data();
        store.ldq = q_size;
        store.ldkv = kv_size;
        store.tokens = row;
        store.num_heads = s.heads;
        store.nope_dim = s.nope;
        store.rope_dim = s.rope;
        store.kv_rank = s.rank;
        store.norm = norm.data();
        store.eps = 1e-6f;
        store.rope_style = s.style;
        store.cos = cos.data();
        store.sin = sin.data();
        store.max_positions = kCapacity;
        store.rotary_dims = s.rope;
        store.temperature_scale = 0.1f;
        store.temperature_period = 100;
        store.spans = spans.data();
        store.num_spans = static_cast<int64_t>(spans.size());
        store.capacity = kCapacity;
        store.kv_dtype = s.kv_dtype;
        store.acts = &acts;
        store.queries = result.queries.data();
        CHECK_OK(krasis_latent_store(pool, &store));
        CHECK_OK(krasis_gemm_int8_heads(pool, &acts, to_latent.codes.data(), to_latent.scales.data(), s.heads, s.rank,
                                        result.queries.data(), width, s.heads * width));
        Buffer<uint8_t> workspace(krasis_attention_workspace_bytes(row, longest, s.heads, width));
        krasis_attention_args attend{};
        attend.q = result.queries.data();
        attend.ldq = s.heads * width;
        attend.tokens = row;
        attend.num_heads = s.heads;
        attend.num_kv_heads = 1;
        attend.head_dim = width;
        attend.value_dim = s.rank;
        attend.spans = spans.data();
        attend.num_spans = store.num_spans;
        attend.capacity = kCapacity;
        attend.kv_dtype = s.kv_dtype;
        attend.scale = 0.02f;
        attend.out = result.attended.data();
        attend.workspace = workspace.data();
        attend.workspace_bytes = static_cast<int64_t>(workspace.size());
        CHECK_OK(krasis_attention(pool, &attend));
        CHECK_OK(krasis_quantize_acts(pool, result.attended.data(), s.rank, &latents));
        CHECK_OK(krasis_gemm_int8_heads(pool, &latents, to_values.codes.data(), to_values.scales.data(), s.heads,
                                        s.value, result.values.data(), s.value, s.heads * s.value));
        return result;
    }
    std::vector<Buffer<uint8_t>> caches(Random &random) const {
        std::vector<Buffer<uint8_t>> made;
        for (size_t i = 0; i < parts.size(); ++i) {
            const Buffer<float> values = numbers(random, kCapacity * width);
            Buffer<uint8_t> cache(kCapacity * width * (s.kv_dtype == KRASIS_F16 ? 2 : 4));
            if (s.kv_dtype == KRASIS_F16) {  // 1 to 2, of random mantissas
                for (int64_t at = 0; at < kCapacity * width; ++at) {
                    const uint16_t half = static_cast<uint16_t>(0x3c00 | (random.below(1024)));
                    std::memcpy(cache.data() + 2 * at, &half, 2);
                }
            } else {
                std::memcpy(cache.data(), values.data(), cache.size());
            }
            made.push_back(cache);
        }
        return made;
    }
    double cached(const Buffer<uint8_t> &cache, int64_t at) const {
        if (s.kv_dtype == KRASIS_F16) {
            uint16_t half;
            std::memcpy(&half, cache.data() + 2 * at, 2);
            return test::half_to_float(half);
        }
        float value;
        std::memcpy(&value, cache.data() + 4 * at, 4);
        return value;
    }
};

bool near(double found, double expected, double tolerance) {
    return std::fabs(found - expected) <= tolerance * (1.0 + std::fabs(expected));
}

// The row's latent in the cache, its queries (within int8's error), and attention over the cache of those queries.
void check_row(const Model &model, const Model::Result &found, int64_t row, int64_t position,
               const Buffer<uint8_t> &cache) {
    const Shape &s = model.s;
    const float *kv = model.kv.data() + row * model.kv_size;
    double squares = 0;
    for (int64_t i = 0; i < s.rank; ++i) squares += static_cast<double>(kv[i]) * kv[i];
    const double inverse = 1.0 / std::sqrt(squares / static_cast<double>(s.rank) + 1e-6);
    const double tolerance = s.kv_dtype == KRASIS_F16 ? 1e-3 : 1e-5;
    for (int64_t i = 0; i < s.rank; ++i) {
        CHECK(near(model.cached(cache, position * model.width + i), kv[i] * inverse * model.norm[i], tolerance));
    }
    const double factor = 1.0 + 0.1 * std::log(1.0 + static_cast<double>(position / 100));
    for (int64_t head = 0; head < s.heads; ++head) {
        const float *q = model.q.data() + row * model.q_size + head * (s.nope + s.rope);
        const float *query = found.queries.data() + (row * s.heads + head) * model.width;
        for (int64_t i = 0; i < s.rank; i += 7) {
            double sum = 0, size = 0;
            for (int64_t k = 0; k < s.nope; ++k) {
                const double product = q[k] * factor * model.to_latent.at(head * s.rank + i, k);
                sum += product;
                size += product * product;
            }
            CHECK(std::fabs(query[i] - sum) <= 0.05 * std::sqrt(size) + 1e-6);
        }
        Buffer<double> weights(position + 1);
        double largest = -1e300, total = 0;
        for (int64_t key = 0; key <= position; ++key) {
            double score = 0;
            for (int64_t d = 0; d < model.width; ++d) score += query[d] * model.cached(cache, key * model.width + d);
            weights[key] = 0.02f * score;
            largest = std::max(largest, weights[key]);
        }
        for (double &weight : weights) total += weight = std::exp(weight - largest);
        for (int64_t d = 0; d < s.rank; d += 5) {
            double value = 0;
            for (int64_t key = 0; key <= position; ++key) {
                value += weights[key] * model.cached(cache, key * model.width + d);
            }
            CHECK(near(found.attended[(row * s.heads + head) * s.rank + d], value / total, 1e-4));
        }
    }
}

void each_alone_and_together() {
    const Shape shapes[] = {
        {6, 64, 32, 96, 32, KRASIS_ROPE_INTERLEAVED, KRASIS_F16},
        {40, 32, 64, 512, 64, KRASIS_ROPE_HALF, KRASIS_F32},
    };
    Random random(21);
    for (const Shape &shape : shapes) {
        const Model model(random, shape, {{299, 1}, {0, 9}, {257, 3}, {64, 2}});
        const auto before = model.caches(random);
        std::unique_ptr<Model::Result> first;
        for (int32_t isa : test::available_isas()) {
            for (int32_t threads : {1, 3}) {
                Pool pool(threads, isa);
                auto caches = before;
                const Model::Result all = model.run(pool, 0, model.parts.size(), 0, caches);
                if (!first) {
                    first = std::make_unique<Model::Result>(all);
                    int64_t row = 0;
                    for (size_t i = 0; i < model.parts.size(); ++i) {
                        for (int64_t t = 0; t < model.parts[i].rows; ++t, ++row) {
                            check_row(model, all, row, model.parts[i].start + t, caches[i]);
                        }
                    }
                }
                CHECK(test::same_bits(all.queries, first->queries));
                CHECK(test::same_bits(all.values, first->values));
                int64_t row = 0;
                for (size_t i = 0; i < model.parts.size(); ++i) {
                    auto own = before;
                    const Model::Result alone = model.run(pool, i, i + 1, row, own);
                    const int64_t size = shape.heads * shape.value, rows = model.parts[i].rows;
                    const Buffer<float> want(first->values.begin() + row * size,
                                             first->values.begin() + (row + rows) * size);
                    CHECK(test::same_bits(alone.values, want));
                    CHECK(test::same_bits(own[i], caches[i]));
                    row += rows;
                }
            }
        }
    }
}

}  // namespace

int main() {
    each_alone_and_together();
    return test::finish("latent");
}
