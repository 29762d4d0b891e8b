// test_phases.cpp: how kernels tell the pool which rows their units stand for. Linked with a pool that notes the phases
// and runs them one after the other.
#include "cpu/pool.h"
#include "reference.h"

struct krasis_pool {
    int32_t isa;
    std::vector<krasis::Phase> seen;
    test::Buffer<uint8_t> scratch;
};

int32_t krasis_pool_isa(const krasis_pool *pool) { return pool->isa; }
int32_t krasis_pool_has_amx(const krasis_pool *) { return 0; }
int32_t krasis_pool_num_threads(const krasis_pool *) { return 1; }

namespace krasis {

PoolSession::PoolSession(krasis_pool *pool) : pool_(pool) {}
PoolSession::~PoolSession() = default;
void *PoolSession::scratch(size_t bytes) {
    pool_->scratch.resize(bytes);
    return pool_->scratch.data();
}
void PoolSession::run(const Phase *phases, int64_t num_phases) { parallel_phases(pool_, phases, num_phases); }

void parallel_phases(krasis_pool *pool, const Phase *phases, int64_t num_phases) {
    for (int64_t i = 0; i < num_phases; ++i) {
        pool->seen.push_back(phases[i]);
        phases[i].fn(phases[i].context, 0, phases[i].count, 0);
    }
}
void parallel_run(krasis_pool *, int64_t count, int64_t, TaskFn fn, void *context) { fn(context, 0, count, 0); }

}  // namespace krasis

namespace {

using krasis::Phase;
using test::Acts;
using test::Buffer;
using test::Random;

bool is(const Phase &phase, int64_t count, int64_t period, bool mirrored) {
    return phase.count == count && phase.period == period && phase.mirrored == mirrored;
}

// One token and three experts: a run of units an expert, in w13 and in w2.
void experts() {
    constexpr int64_t kHidden = 256, kIntermediate = 192;
    Random random(51);
    krasis_pool pool{KRASIS_ISA_AVX2, {}, {}};
    const test::Tiles w13{KRASIS_TILES_Q8, 2 * kIntermediate, kHidden, nullptr};
    const test::Tiles w2{KRASIS_TILES_Q8, kHidden, kIntermediate, nullptr};
    Buffer<uint8_t> blob(4 * (w13.bytes() + w2.bytes()));
    Acts acts(random, 1, kHidden);
    const krasis_acts view = acts.view(0, 1);
    const int32_t ids[3] = {3, 0, 2};
    const float weights[3] = {1, 1, 1};
    Buffer<float> out(kHidden);
    Buffer<uint8_t> workspace(krasis_moe_workspace_bytes(1, kHidden, kIntermediate, 4, 3));
    krasis_moe_args args{};
    args.blob = blob.data();
    args.expert_stride_bytes = w13.bytes() + w2.bytes();
    args.tiles = KRASIS_TILES_Q8;
    args.num_experts = 4;
    args.hidden = kHidden;
    args.intermediate = kIntermediate;
    args.top_k = 3;
    args.acts = &view;
    args.ids = ids;
    args.weights = weights;
    args.out = out.data();
    args.workspace = workspace.data();
    args.workspace_bytes = static_cast<int64_t>(workspace.size());
    CHECK_OK(krasis_moe(&pool, &args));
    CHECK(pool.seen.size() == 3);
    CHECK(is(pool.seen[0], 3 * kIntermediate / 32, kIntermediate / 32, false));
    CHECK(is(pool.seen[1], 3 * kHidden / 32, kHidden / 32, true));
    CHECK(pool.seen[2].period == 0);
}

// All strips of a dense weight are one run.
void int8_rows() {
    Random random(52);
    for (int64_t tokens : {1, 40}) {
        krasis_pool pool{KRASIS_ISA_AVX2, {}, {}};
        Acts acts(random, tokens, 64);
        const krasis_acts view = acts.view(0, tokens);
        Buffer<int8_t> weight(160 * 64);
        Buffer<float> scales(160), out(tokens * 160);
        CHECK_OK(krasis_gemm_int8_rows(&pool, &view, weight.data(), scales.data(), 160, out.data(), 160, 0));
        CHECK(is(pool.seen.back(), pool.seen.back().count, pool.seen.back().count, false));
        CHECK(tokens > 1 || pool.seen.back().count == 5);
        if (pool.seen.size() > 1) CHECK(pool.seen[0].period == 0);
    }
}

}  // namespace

int main() {
    experts();
    int8_rows();
    return test::finish("phases");
}
