// test_pool.cpp: every index exactly once, phases in order, no hang and no loss under stress.
#include <atomic>
#include <chrono>
#include <cmath>
#include <thread>

#include "cpu/pool.h"
#include "test.h"

namespace {

using test::Pool;
using test::Random;

void every_index_once(krasis_pool *pool, int64_t count, int64_t grain) {
    const int32_t num_threads = krasis_pool_num_threads(pool);
    std::vector<std::atomic<int>> seen(static_cast<size_t>(count));
    std::atomic<int> bad{0};
    krasis::parallel_for(pool, count, grain, [&](int64_t begin, int64_t end, int32_t thread) {
        if (thread < 0 || thread >= num_threads || begin >= end || begin % grain != 0 || end - begin > grain) ++bad;
        for (int64_t i = begin; i < end; ++i) ++seen[static_cast<size_t>(i)];
    });
    for (const auto &times : seen) bad += times != 1;
    CHECK(bad == 0);
}

void counts_and_grains() {
    Random random(1);
    for (int32_t threads : {1, 2, 3, 5, 9}) {
        Pool pool(threads, KRASIS_ISA_AUTO);
        for (int64_t count : {0, 1, 2, 7, 64, 1000}) {
            for (int64_t grain : {1, 3, 64, 5000}) every_index_once(pool, count, grain);
        }
        for (int i = 0; i < 300; ++i) every_index_once(pool, random.below(200), random.between(1, 20));
    }
}

// Phase p may only see what phase p - 1 left complete.
void phases_in_order() {
    Random random(2);
    for (int32_t threads : {1, 2, 4, 8}) {
        Pool pool(threads, KRASIS_ISA_AUTO);
        for (int round = 0; round < 300; ++round) {
            constexpr int kPhases = 6;
            struct Step {
                std::atomic<int64_t> total{0};
                int64_t expected_before = 0;
                Step *before = nullptr;
                std::atomic<int> *bad = nullptr;
            };
            std::atomic<int> bad{0};
            Step steps[kPhases];
            krasis::Phase phases[kPhases];
            for (int p = 0; p < kPhases; ++p) {
                steps[p].bad = &bad;
                steps[p].before = p > 0 ? &steps[p - 1] : nullptr;
                steps[p].expected_before = p > 0 ? phases[p - 1].count : 0;
                phases[p].context = &steps[p];
                phases[p].count = random.below(4) ? random.below(100) : 0;
                phases[p].grain = random.between(1, 4);
                phases[p].max_grain = random.below(30);
                phases[p].fn = [](void *context, int64_t begin, int64_t end, int32_t) {
                    Step &step = *static_cast<Step *>(context);
                    if (step.before && step.before->total.load() != step.expected_before) ++*step.bad;
                    step.total += end - begin;
                };
            }
            krasis::parallel_phases(pool, phases, kPhases);
            for (int p = 0; p < kPhases; ++p) CHECK(steps[p].total == phases[p].count);
            CHECK(bad == 0);
        }
    }
}

void several_callers() {
    Pool pool(3, KRASIS_ISA_AUTO);
    std::atomic<int64_t> total{0};
    std::vector<std::thread> callers;
    for (int c = 0; c < 4; ++c) {
        callers.emplace_back([&] {
            for (int i = 0; i < 500; ++i) {
                krasis::parallel_for(pool, 16, 1, [&](int64_t begin, int64_t end, int32_t) { total += end - begin; });
            }
        });
    }
    for (std::thread &caller : callers) caller.join();
    CHECK(total == 4 * 500 * 16);
}

// Threads asleep between jobs, threads still spinning, pools that never ran anything.
void many_small_jobs() {
    for (int32_t threads : {2, 6}) {
        Pool pool(threads, KRASIS_ISA_AUTO);
        std::atomic<int64_t> total{0};
        for (int i = 0; i < 20000; ++i) {
            krasis::parallel_for(pool, 4, 1, [&](int64_t begin, int64_t end, int32_t) { total += end - begin; });
            if (i % 4000 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
        }
        CHECK(total == 80000);
    }
    for (int i = 0; i < 200; ++i) {
        Pool pool(1 + i % 7, KRASIS_ISA_AUTO);
        if (i % 2) every_index_once(pool, 10, 1);
    }
}

// Spinning for long, not at all, and changed under way: nothing but time depends on it.
void spinning() {
    Pool pool(2, KRASIS_ISA_AUTO);
    std::atomic<int64_t> total{0};
    for (int64_t spin_ns : {int64_t{0}, int64_t{5'000'000}, int64_t{1'000'000'000}, int64_t{40'000}}) {
        CHECK(krasis_pool_set_spin(pool, spin_ns) == KRASIS_OK);
        for (int i = 0; i < 300; ++i) {
            krasis::parallel_for(pool, 4, 1, [&](int64_t begin, int64_t end, int32_t) { total += end - begin; });
            if (i % 100 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
        }
    }
    CHECK(total == 4 * 300 * 4);
    CHECK(krasis_pool_set_spin(pool, -1) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_pool_set_spin(pool, 1'000'000'001) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_pool_set_spin(nullptr, 0) == KRASIS_ERR_ARGUMENT);
    // A pool that still spins ends at once.
    const auto start = std::chrono::steady_clock::now();
    {
        Pool patient(2, KRASIS_ISA_AUTO);
        CHECK(krasis_pool_set_spin(patient, 1'000'000'000) == KRASIS_OK);
        krasis::parallel_for(patient, 4, 1, [&](int64_t, int64_t, int32_t) {});
    }
    CHECK(std::chrono::steady_clock::now() - start < std::chrono::milliseconds(900));
}

// Every piece of every phase is noted, with its time, and nothing after the end.
void times() {
    Pool pool(2, KRASIS_ISA_AUTO);
    krasis_pool_times found;
    double busy[2] = {-1, -1};
    CHECK(krasis_pool_time_end(pool, &found, busy) == KRASIS_ERR_RANGE);
    CHECK(krasis_pool_time_start(nullptr) == KRASIS_ERR_ARGUMENT);
    CHECK_OK(krasis_pool_time_start(pool));
    std::atomic<int64_t> sum{0};
    auto work = [&](int64_t begin, int64_t end, int32_t) {
        std::this_thread::sleep_for(std::chrono::microseconds(20));
        sum += end - begin;
    };
    const krasis::Phase phases[2] = {krasis::make_phase(work, 10, 1), krasis::make_phase(work, 7, 2)};
    for (int i = 0; i < 3; ++i) krasis::parallel_phases(pool, phases, 2);
    CHECK(krasis_pool_time_end(pool, nullptr, busy) == KRASIS_ERR_ARGUMENT);
    CHECK_OK(krasis_pool_time_end(pool, &found, busy));
    CHECK(sum == 3 * 17 && found.num_jobs == 3 && found.num_phases == 6 && found.num_pieces == 3 * 14);
    CHECK(busy[0] >= 0 && busy[1] >= 0 && busy[0] + busy[1] > 0 && busy[0] <= found.job_s && busy[1] <= found.job_s);
    const double by_phase = found.first_phases_s[0] + found.first_phases_s[1];
    CHECK(found.first_phases_s[0] > 0 && found.first_phases_s[1] > 0 && found.first_phases_s[2] == 0);
    CHECK(std::abs(by_phase - busy[0] - busy[1]) < 1e-9);
    CHECK(krasis_pool_time_end(pool, &found, busy) == KRASIS_ERR_RANGE);
}

void scratch() {
    Pool pool(2, KRASIS_ISA_AUTO);
    krasis::PoolSession session(pool);
    for (size_t bytes : {1, 5000, 100, 1 << 20}) {
        void *block = session.scratch(bytes);
        CHECK(block && reinterpret_cast<uintptr_t>(block) % 64 == 0);
        std::memset(block, 1, bytes);
    }
}

void arguments() {
    krasis_pool *pool = nullptr;
    CHECK(krasis_pool_create(1, KRASIS_ISA_AUTO, nullptr) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_pool_create(-1, KRASIS_ISA_AUTO, &pool) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_pool_create(1 << 20, KRASIS_ISA_AUTO, &pool) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_pool_create(1, 7, &pool) == KRASIS_ERR_ARGUMENT);
    CHECK(pool == nullptr);
    krasis_pool_destroy(nullptr);
    krasis_cpu_info info;
    CHECK(krasis_cpu_probe(nullptr) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_cpu_probe(&info) == KRASIS_OK);
    CHECK(info.num_logical_cpus >= 1 && info.num_numa_nodes >= 1 && info.brand[0] != '\0');
    CHECK(krasis_pool_create(0, KRASIS_ISA_AUTO, &pool) == KRASIS_OK);
    CHECK(krasis_pool_num_threads(pool) == info.num_logical_cpus);
    CHECK(krasis_pool_isa(pool) == (info.has_avx512_vnni ? KRASIS_ISA_AVX512_VNNI : KRASIS_ISA_AVX2));
    CHECK(krasis_pool_has_amx(pool) == (info.has_avx512_vnni && krasis_amx_declined() == 0));
    krasis_pool_destroy(pool);
    CHECK((krasis_pool_create(1, KRASIS_ISA_AMX_INT8, &pool) == KRASIS_OK) ==
          (info.has_avx512_vnni && krasis_amx_declined() == 0));
    krasis_pool_destroy(pool);
    CHECK(krasis_pool_create(1, KRASIS_ISA_AVX2, &pool) == KRASIS_OK);
    CHECK(krasis_pool_isa(pool) == KRASIS_ISA_AVX2 && krasis_pool_has_amx(pool) == 0);
    krasis_pool_destroy(pool);
    CHECK(krasis_pool_has_amx(nullptr) == 0);
    CHECK(info.has_amx_int8 || krasis_amx_declined() != 0);
}

}  // namespace

int main() {
    arguments();
    counts_and_grains();
    phases_in_order();
    several_callers();
    many_small_jobs();
    spinning();
    scratch();
    times();
    return test::finish("pool");
}
