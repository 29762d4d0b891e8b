// test_moe.cpp: krasis_moe against double precision on dequantised weights; bits independent of batch, threads, ISA.
#include <memory>

#include "reference.h"

namespace {

using test::Acts;
using test::Buffer;
using test::Pool;
using test::Random;
using test::Tiles;

struct MoeCase {
    int32_t format;
    int64_t experts, hidden, intermediate, top_k;
    Acts acts;
    Buffer<uint8_t> blob;
    int64_t stride;
    Buffer<int32_t> ids;
    Buffer<float> weights, start;
    Buffer<float> gate_bias, up_bias, down_bias;  // empty: none
    int64_t num_pairs = 0;

    MoeCase(Random &random, int32_t tiles, int64_t tokens, int64_t e, int64_t h, int64_t i, int64_t k,
            bool repeats = false)
        : format(tiles), experts(e), hidden(h), intermediate(i), top_k(k), acts(random, tokens, h) {
        stride = (w13(0).bytes() + w2(0).bytes() + 4095) / 4096 * 4096;
        blob.resize(e * stride);
        for (int64_t x = 0; x < e; ++x) {
            w13(x).fill(random);
            w2(x).fill(random);
        }
        ids.resize(tokens * k);
        weights.resize(tokens * k);
        start.resize(tokens * h);
        for (float &value : start) value = random.normal();
        for (int64_t t = 0; t < tokens; ++t) route(random, t, repeats);
    }
    void route(Random &random, int64_t t, bool repeats) {
        for (int64_t j = 0; j < top_k; ++j) {
            int32_t id;
            do {
                id = static_cast<int32_t>(random.below(experts));
            } while (!repeats && std::find(&ids[t * top_k], &ids[t * top_k] + j, id) != &ids[t * top_k] + j);
            ids[t * top_k + j] = id;
            weights[t * top_k + j] = static_cast<float>(random.uniform());
        }
        for (int64_t j = 0; j < top_k; ++j) {  // only now, so that the search above ends
            if (random.below(8) == 0) ids[t * top_k + j] = -1;
            num_pairs += ids[t * top_k + j] >= 0;
        }
    }
    void add_biases(Random &random) {
        for (Buffer<float> *bias : {&gate_bias, &up_bias}) bias->resize(experts * intermediate);
        down_bias.resize(experts * hidden);
        for (Buffer<float> *bias : {&gate_bias, &up_bias, &down_bias}) {
            for (float &value : *bias) value = random.normal();
        }
    }
    Tiles w13(int64_t e) { return {format, 2 * intermediate, hidden, blob.data() + e * stride}; }
    Tiles w2(int64_t e) { return {format, hidden, intermediate, blob.data() + e * stride + w13(e).bytes()}; }

    // One expert applied to one token; the intermediate quantised to int8 per 32, or not.
    std::vector<double> expert(int64_t e, int64_t t, bool quantized) {
        const Tiles in = w13(e), down = w2(e);
        std::vector<double> middle(intermediate), out(hidden);
        const auto dot = [&](int64_t row) {
            double sum = 0;
            for (int64_t i = 0; i < hidden; ++i) sum += acts.value(t, i) * in.code(row, i) * in.scale(row, i);
            return sum;
        };
        for (int64_t i = 0; i < intermediate; ++i) {
            double gate = dot(i / 16 * 32 + i % 16), up = dot(i / 16 * 32 + 16 + i % 16);
            if (!gate_bias.empty()) gate += gate_bias[e * intermediate + i];
            if (!up_bias.empty()) up += up_bias[e * intermediate + i];
            middle[i] = gate / (1 + std::exp(-gate)) * up;
        }
        for (int64_t b = 0; quantized && b < intermediate; b += 32) {
            double most = 0;
            for (int64_t i = b; i < b + 32; ++i) most = std::max(most, std::abs(middle[i]));
            const double step = most / 127;
            for (int64_t i = b; i < b + 32 && step > 0; ++i) middle[i] = std::nearbyint(middle[i] / step) * step;
        }
        for (int64_t r = 0; r < hidden; ++r) {
            if (!down_bias.empty()) out[r] = down_bias[e * hidden + r];
            for (int64_t i = 0; i < intermediate; ++i) out[r] += middle[i] * down.code(r, i) * down.scale(r, i);
        }
        return out;
    }
    // Norm of the error over the norm of what was added, all tokens together.
    double relative_error(const Buffer<float> &got, bool quantized) {
        double error = 0, norm = 0;
        for (int64_t t = 0; t < acts.tokens; ++t) {
            std::vector<double> sum(hidden);
            for (int64_t j = 0; j < top_k; ++j) {
                if (ids[t * top_k + j] < 0) continue;
                const std::vector<double> one = expert(ids[t * top_k + j], t, quantized);
                for (int64_t r = 0; r < hidden; ++r) sum[r] += weights[t * top_k + j] * one[r];
            }
            for (int64_t r = 0; r < hidden; ++r) {
                const double difference = got[t * hidden + r] - (start[t * hidden + r] + sum[r]);
                error += difference * difference;
                norm += sum[r] * sum[r];
            }
        }
        return norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
    }
    krasis_moe_args arguments(const krasis_acts *view, int64_t t, Buffer<float> &out, Buffer<uint8_t> &workspace,
                              int64_t *executed) {
        krasis_moe_args args{};
        args.blob = blob.data();
        args.expert_stride_bytes = stride;
        args.tiles = format;
        args.num_experts = experts;
        args.hidden = hidden;
        args.intermediate = intermediate;
        args.top_k = top_k;
        args.acts = view;
        args.ids = ids.data() + t * top_k;
        args.weights = weights.data() + t * top_k;
        args.out = out.data() + t * hidden;
        args.workspace = workspace.data();
        args.workspace_bytes = static_cast<int64_t>(workspace.size());
        args.executed = executed;
        args.gate_bias = gate_bias.empty() ? nullptr : gate_bias.data();
        args.up_bias = up_bias.empty() ? nullptr : up_bias.data();
        args.down_bias = down_bias.empty() ? nullptr : down_bias.data();
        return args;
    }
    Buffer<float> run(krasis_pool *pool, int64_t batch) {
        Buffer<float> out = start;
        int64_t executed = 5;
        for (int64_t t = 0; t < acts.tokens; t += batch) {
            const krasis_acts view = acts.view(t, std::min(batch, acts.tokens - t));
            Buffer<uint8_t> workspace(krasis_moe_workspace_bytes(view.tokens, hidden, intermediate, experts, top_k),
                                      0xff);
            const krasis_moe_args args = arguments(&view, t, out, workspace, &executed);
            CHECK_OK(krasis_moe(pool, &args));
        }
        CHECK(executed == 5 + num_pairs);
        return out;
    }
};

void compare(MoeCase &c, bool check_values = true) {
    std::unique_ptr<Buffer<float>> first;
    for (int32_t isa : test::available_isas()) {
        for (int32_t threads : {1, 2, 3, 5}) {
            Pool pool(threads, isa);
            const Buffer<float> out = c.run(pool, std::max<int64_t>(c.acts.tokens, 1));
            if (!first) first = std::make_unique<Buffer<float>>(out);
            CHECK(test::same_bits(out, *first));
            if (threads == 2) CHECK(test::same_bits(c.run(pool, 1), *first));
            if (threads == 3) CHECK(test::same_bits(c.run(pool, 3), *first));
        }
    }
    if (!check_values) return;
    CHECK(c.relative_error(*first, true) < 2e-3);
    CHECK(c.relative_error(*first, false) < 2e-2);
}

void shapes() {
    Random random(21);
    struct Shape {
        int64_t tokens, experts, hidden, intermediate, top_k;
    };
    const Shape shapes[] = {{0, 4, 64, 64, 2},  {1, 4, 64, 64, 1},  {1, 8, 256, 128, 8}, {2, 8, 128, 64, 2},
                            {3, 3, 192, 64, 3}, {7, 8, 64, 192, 2}, {13, 2, 64, 64, 2},  {37, 5, 128, 64, 4},
                            {65, 1, 64, 64, 1}, {5, 300, 64, 64, 4}};
    for (int32_t format : {KRASIS_TILES_Q8, KRASIS_TILES_I4, KRASIS_TILES_MXFP4}) {
        for (const Shape &s : shapes) {
            MoeCase c(random, format, s.tokens, s.experts, s.hidden, s.intermediate, s.top_k);
            compare(c);
            c.add_biases(random);
            compare(c);
        }
        MoeCase repeated(random, format, 6, 3, 64, 64, 3, true);
        compare(repeated);
        MoeCase one(random, format, 1, 2, 64, 64, 2, true);
        one.ids[0] = one.ids[1] = 1;
        one.num_pairs = 2;
        compare(one);
    }
}

// Several chunks of tokens, several ranges of columns, groups of many panels and several weight groups.
void large() {
    Random random(22);
    MoeCase chunks(random, KRASIS_TILES_Q8, 2 * 16384 / 8 + 5, 16, 64, 64, 8);
    MoeCase ranges(random, KRASIS_TILES_I4, 700, 16, 512, 64, 8);
    MoeCase deep(random, KRASIS_TILES_Q8, 26, 2, 1536, 64, 2);
    MoeCase biased(random, KRASIS_TILES_MXFP4, 700, 16, 512, 64, 8);
    biased.add_biases(random);
    for (MoeCase *c : {&chunks, &ranges, &deep, &biased}) {
        std::unique_ptr<Buffer<float>> first;
        for (int32_t isa : test::available_isas()) {
            Pool pool(3, isa);
            const Buffer<float> out = c->run(pool, c->acts.tokens);
            if (!first) first = std::make_unique<Buffer<float>>(out);
            CHECK(test::same_bits(out, *first));
            CHECK(test::same_bits(c->run(pool, 11), *first));
        }
    }
}

// Experts of a few tokens beside experts of many (which AMX multiplies), of all formats; last sets of blocks that are
// not full, biases.
void many_tokens() {
    Random random(26);
    for (int32_t format : {KRASIS_TILES_Q8, KRASIS_TILES_I4, KRASIS_TILES_MXFP4}) {
        MoeCase c(random, format, 90, 7, 32 * 19, 96, 3);
        if (format == KRASIS_TILES_MXFP4) c.add_biases(random);
        for (int64_t t = 0; t < 60; ++t) c.ids[t * 3] = c.ids[t * 3] < 0 ? -1 : 6;  // an expert met by most tokens
        Buffer<float> first;
        for (int32_t isa : test::available_isas()) {
            Pool pool(2, isa);
            const Buffer<float> out = c.run(pool, 90);
            if (first.empty()) first = out;
            CHECK(test::same_bits(out, first));
            CHECK(test::same_bits(c.run(pool, 37), first));
            CHECK(test::same_bits(c.run(pool, 1), first));
        }
    }
}

// The terms of a token are added in slot order, each by one fma, and the sum then goes onto what was there: the same
// bits must come from the slots run one by one.
void slot_order() {
    Random random(25);
    for (int32_t isa : test::available_isas()) {
        Pool pool(2, isa);
        MoeCase c(random, KRASIS_TILES_Q8, 5, 6, 96, 64, 4);
        const Buffer<float> whole = c.run(pool, 5), start = c.start;
        const Buffer<int32_t> ids = c.ids;
        const Buffer<float> weights = c.weights;
        Buffer<float> sum(start.size());
        c.weights.assign(weights.size(), 1.0f);
        for (int64_t j = 0; j < 4; ++j) {
            c.ids.assign(ids.size(), -1);
            c.num_pairs = 0;
            for (int64_t t = 0; t < 5; ++t) {
                c.ids[t * 4 + j] = ids[t * 4 + j];
                c.num_pairs += ids[t * 4 + j] >= 0;
            }
            c.start.assign(start.size(), 0.0f);
            const Buffer<float> one = c.run(pool, 5);
            for (int64_t i = 0; i < 5 * 96; ++i) {
                if (ids[i / 96 * 4 + j] >= 0) sum[i] = std::fma(weights[i / 96 * 4 + j], one[i], sum[i]);
            }
        }
        for (size_t i = 0; i < sum.size(); ++i) sum[i] = start[i] + sum[i];
        CHECK(test::same_bits(whole, sum));
    }
}

// Gates far outside the range of exp, and infinite or NaN activations scales, which must show in the result.
void extremes() {
    Random random(23);
    for (int32_t isa : test::available_isas()) {
        Pool pool(2, isa);
        MoeCase c(random, KRASIS_TILES_Q8, 2, 2, 64, 64, 2);
        for (float &scale : c.acts.scale) scale *= 1e4f;
        for (int32_t &id : c.ids) id = std::abs(id) % 2;
        c.num_pairs = 4;
        for (float value : c.run(pool, 2)) CHECK(std::isfinite(value));
        CHECK(c.relative_error(c.run(pool, 2), true) < 2e-3);
        c.acts.scale[0] = std::nanf("");
        const Buffer<float> out = c.run(pool, 2);
        CHECK(std::isnan(out[0]));
        CHECK(std::isfinite(out[64]));
    }
}

void arguments() {
    Random random(24);
    MoeCase c(random, KRASIS_TILES_Q8, 2, 4, 64, 64, 2);
    Pool pool(1, KRASIS_ISA_AUTO);
    const krasis_acts view = c.acts.view(0, 2);
    Buffer<float> out = c.start;
    Buffer<uint8_t> workspace(krasis_moe_workspace_bytes(2, 64, 64, 4, 2) + 64);
    int64_t executed = 0;
    const krasis_moe_args good = c.arguments(&view, 0, out, workspace, &executed);
    const auto status = [&](auto change) {
        krasis_moe_args args = good;
        change(args);
        return krasis_moe(pool, &args);
    };
    CHECK(krasis_moe(nullptr, &good) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_moe(pool, nullptr) == KRASIS_ERR_ARGUMENT);
    CHECK(status([](krasis_moe_args &a) { a.acts = nullptr; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status([](krasis_moe_args &a) { a.blob = nullptr; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status([](krasis_moe_args &a) { a.ids = nullptr; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status([](krasis_moe_args &a) { a.weights = nullptr; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status([](krasis_moe_args &a) { a.out = nullptr; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status([](krasis_moe_args &a) { a.workspace = nullptr; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status([](krasis_moe_args &a) { a.workspace = static_cast<uint8_t *>(a.workspace) + 4; }) ==
          KRASIS_ERR_ARGUMENT);
    CHECK(status([](krasis_moe_args &a) { a.workspace_bytes = 100; }) == KRASIS_ERR_MEMORY);
    CHECK(status([](krasis_moe_args &a) { a.tiles = 3; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status([](krasis_moe_args &a) { a.top_k = 5; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status([](krasis_moe_args &a) { a.hidden = 128; }) == KRASIS_ERR_ARGUMENT);
    CHECK(status([](krasis_moe_args &a) { a.intermediate = 48; }) == KRASIS_ERR_SHAPE);
    CHECK(status([](krasis_moe_args &a) { a.expert_stride_bytes = 1088; }) == KRASIS_ERR_SHAPE);
    CHECK(status([](krasis_moe_args &a) { a.num_experts = 0; }) == KRASIS_ERR_ARGUMENT);
    CHECK(executed == 0 && test::same_bits(out, c.start));
    c.ids[3] = 4;
    CHECK(krasis_moe(pool, &good) == KRASIS_ERR_RANGE);
    c.ids[3] = -2;
    CHECK(krasis_moe(pool, &good) == KRASIS_ERR_RANGE);
    CHECK(executed == 0 && test::same_bits(out, c.start));
    CHECK(krasis_moe_workspace_bytes(1, 64, 64, 4, 5) < 0);
    CHECK(krasis_moe_workspace_bytes(-1, 64, 64, 4, 2) < 0);
    // 200 000 tokens of the largest model fit in a bounded workspace.
    CHECK(krasis_moe_workspace_bytes(200000, 4096, 1536, 128, 8) < int64_t{256} << 20);
}

}  // namespace

int main() {
    many_tokens();
    if (!test::kAmxTwin) {  // the rest has little to do with it
        shapes();
        large();
        slot_order();
        extremes();
        arguments();
    }
    test::say_amx();
    return test::finish("moe");
}
