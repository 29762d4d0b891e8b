// test_numa_kernels.cpp: kernels whose weights are split by node give the bits they give on one node.
#include <memory>

#include "made_up_nodes.h"
#include "reference.h"

namespace {

using test::Acts;
using test::Buffer;
using test::Pool;
using test::Random;

Buffer<float> moe(krasis_pool *pool, Acts &acts, Buffer<uint8_t> &blob, int32_t tiles, const Buffer<int32_t> &ids) {
    constexpr int64_t kExperts = 6, kIntermediate = 192, kTopK = 3;
    Buffer<float> out(acts.tokens * acts.k, 1.0f), weights(acts.tokens * kTopK, 0.25f);
    Buffer<uint8_t> workspace(krasis_moe_workspace_bytes(acts.tokens, acts.k, kIntermediate, kExperts, kTopK));
    const krasis_acts view = acts.view(0, acts.tokens);
    krasis_moe_args args{};
    args.blob = blob.data();
    args.expert_stride_bytes = static_cast<int64_t>(blob.size()) / kExperts;
    args.tiles = tiles;
    args.num_experts = kExperts;
    args.hidden = acts.k;
    args.intermediate = kIntermediate;
    args.top_k = kTopK;
    args.acts = &view;
    args.ids = ids.data();
    args.weights = weights.data();
    args.out = out.data();
    args.workspace = workspace.data();
    args.workspace_bytes = static_cast<int64_t>(workspace.size());
    CHECK_OK(krasis_moe(pool, &args));
    return out;
}

// 8192 tokens make several ranges of columns.
void experts() {
    Random random(41);
    for (int32_t tiles : {KRASIS_TILES_Q8, KRASIS_TILES_I4}) {
        Buffer<uint8_t> blob;
        const test::Tiles w13{tiles, 384, 352, nullptr}, w2{tiles, 352, 192, nullptr};
        const int64_t stride = w13.bytes() + w2.bytes();
        blob.resize(6 * stride);
        for (int64_t e = 0; e < 6; ++e) {
            test::Tiles{tiles, 384, 352, blob.data() + e * stride}.fill(random);
            test::Tiles{tiles, 352, 192, blob.data() + e * stride + w13.bytes()}.fill(random);
        }
        for (int64_t tokens : {1, 5, 8192}) {
            Acts acts(random, tokens, 352);
            Buffer<int32_t> ids(tokens * 3);
            for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>((i / 3 + i % 3 * 2) % 6);
            std::unique_ptr<Buffer<float>> first;
            for (int32_t isa : test::available_isas()) {
                for (int32_t n : {1, 2, 3, 4}) {
                    Pool pool(test::pool_on_nodes(3, isa, test::made_up_nodes(n)));
                    const Buffer<float> out = moe(pool, acts, blob, tiles, ids);
                    if (!first) first = std::make_unique<Buffer<float>>(out);
                    CHECK(test::same_bits(out, *first));
                }
            }
            CHECK((*first)[0] != 1.0f);
        }
    }
}

void int8_rows() {
    Random random(42);
    constexpr int64_t kK = 320, kN = 224;
    Buffer<int8_t> weight(kN * kK);
    Buffer<float> scales(kN, 0.01f);
    for (int8_t &code : weight) code = static_cast<int8_t>(random.next());
    for (int64_t tokens : {1, 2, 70}) {
        Acts acts(random, tokens, kK);
        const krasis_acts view = acts.view(0, tokens);
        std::unique_ptr<Buffer<float>> first;
        for (int32_t isa : test::available_isas()) {
            for (int32_t n : {1, 2, 3, 4, 9}) {
                Pool pool(test::pool_on_nodes(4, isa, test::made_up_nodes(n)));
                Buffer<float> out(tokens * kN);
                CHECK_OK(krasis_gemm_int8_rows(pool, &view, weight.data(), scales.data(), kN, out.data(), kN, 0));
                if (!first) first = std::make_unique<Buffer<float>>(out);
                CHECK(test::same_bits(out, *first));
            }
        }
        CHECK((*first)[0] != 0.0f);
    }
}

}  // namespace

int main() {
    experts();
    int8_rows();
    return test::finish("numa_kernels");
}
