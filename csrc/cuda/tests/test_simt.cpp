// test_simt.cpp: the host shim itself. What it computes is compared with plain loops; every kind of mistake it promises
// to notice is made on purpose and must be reported.
#include <cmath>
#include <string>
#include <vector>

#include "check.h"
#include "simt.h"
#include "suites.h"

using namespace krasis;
namespace simt = krasis::simt;

namespace {

struct Params {
    const uint16_t *a, *b;
    float *d;
    int32_t *words;
    int mistake;
};

// d [16, 8] = a [16, 16] x b [16, 8] (b stored [8, 16]) in one warp, through shared memory and ldmatrix.
template <class Type>
void mma_kernel(Params p) {
    uint8_t *shared = simt::shared_memory();
    const int lane = static_cast<int>(simt::thread_x());
    simt::cp_async16(shared + 16 * lane, p.a + 8 * lane, true);  // row lane / 2, half lane % 2
    if (lane < 16) simt::cp_async16(shared + 512 + 16 * lane, p.b + 8 * lane, true);
    simt::cp_async_commit();
    simt::cp_async_wait<0>();
    simt::sync_threads();
    uint32_t a[4], b[2];
    simt::ldmatrix_x4(a, shared + (lane % 16) * 32 + lane / 16 * 16);
    simt::ldmatrix_x2(b, shared + 512 + (lane % 8) * 32 + lane / 8 % 2 * 16);
    float d[4] = {1, 1, 1, 1};
    simt::mma(Type{}, d, a, b);
    for (int i = 0; i < 4; ++i) p.d[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = d[i];
}

template <class Type>
void check_mma() {
    test::Random random(7);
    std::vector<uint16_t, test::Aligned<uint16_t>> a(256), b(128);
    for (auto &v : a) v = Type::from_float(random.normal());
    for (auto &v : b) v = Type::from_float(random.normal());
    std::vector<float> d(128, std::nanf(""));
    const char *error = nullptr;
    CHECK((simt::launch<mma_kernel<Type>>({1, 32, 768}, Params{a.data(), b.data(), d.data(), nullptr, 0}, nullptr,
                                          &error)));
    for (int m = 0; m < 16; ++m) {
        for (int n = 0; n < 8; ++n) {
            double sum = 1;
            for (int k = 0; k < 16; ++k) sum += double(Type::to_float(a[m * 16 + k])) * Type::to_float(b[n * 16 + k]);
            CHECK(std::fabs(d[m * 8 + n] - sum) < 1e-5);
        }
    }
}

void waiting_kernel(Params p) {
    if (simt::thread_x() != 40 || p.mistake == 0) simt::wait_for_previous();
}

// A kernel that may begin early and has a thread that does not wait.
void check_waits() {
    const char *error = nullptr;
    CHECK((simt::launch_beside<waiting_kernel>({2, 64, 0}, Params{}, nullptr, &error)));
    Params mistaken{};
    mistaken.mistake = 1;
    CHECK((simt::launch<waiting_kernel>({2, 64, 0}, mistaken, nullptr, &error)));
    CHECK((!simt::launch_beside<waiting_kernel>({2, 64, 0}, mistaken, nullptr, &error)));
    CHECK(std::string(error).find("thread 40: ended without having waited") != std::string::npos);
}

void collectives_kernel(Params p) {
    const int thread = static_cast<int>(simt::thread_x()), lane = thread % 32;
    int32_t *out = p.words + 8 * thread + 512 * static_cast<int>(simt::block_x());
    out[0] = simt::shuffle(thread, 5);
    out[1] = simt::shuffle_up(thread, 4);
    out[2] = simt::shuffle_xor(thread, 9);
    out[3] = static_cast<int32_t>(simt::ballot(lane % 3 == 0));
    auto *shared = reinterpret_cast<int32_t *>(simt::shared_memory());
    if (thread == 0) simt::shared_store(shared, 0);
    simt::sync_threads();
    simt::shared_atomic_add(shared, thread);
    simt::sync_threads();
    out[4] = simt::shared_load<int32_t>(shared);
    out[5] = static_cast<int32_t>(simt::num_threads());
    out[6] = static_cast<int32_t>(simt::num_blocks());
}

void check_collectives() {
    std::vector<int32_t> words(1024, -1);
    const char *error = nullptr;
    CHECK((simt::launch<collectives_kernel>({2, 64, 16}, Params{nullptr, nullptr, nullptr, words.data(), 0}, nullptr,
                                            &error)));
    uint32_t thirds = 0;
    for (int lane = 0; lane < 32; lane += 3) thirds |= 1u << lane;
    for (int i = 0; i < 128; ++i) {
        const int thread = i % 64, lane = thread % 32, warp = thread - lane;
        const int32_t *out = &words[8 * i];
        CHECK(out[0] == warp + 5);
        CHECK(out[1] == (lane < 4 ? thread : thread - 4));
        CHECK(out[2] == warp + (lane ^ 9));
        CHECK(out[3] == static_cast<int32_t>(thirds));
        CHECK(out[4] == 63 * 64 / 2 && out[5] == 64 && out[6] == 2);
    }
}

enum Mistake {
    kNone,
    kReadEmpty,
    kReadPending,
    kReadWithoutBarrier,
    kLdmatrixWithoutBarrier,
    kOverwriteRead,
    kTwoWriters,
    kOverwritePending,
    kNeverWaited,
    kMissingBarrier,
    kMissingLane,
    kMixedCollectives,
    kBarrierInBranch,
    kOutside,
    kMisaligned,
    kWaitTooFew,
    kCount
};

void mistaken_kernel(Params p) {
    uint8_t *shared = simt::shared_memory();
    const int thread = static_cast<int>(simt::thread_x());
    uint8_t *own = shared + 16 * thread, *next = shared + 16 * ((thread + 1) % 64);
    const bool wait = p.mistake != kReadPending && p.mistake != kNeverWaited && p.mistake != kOverwritePending;
    if (p.mistake == kReadEmpty) simt::shared_load<uint32_t>(own);
    simt::cp_async16(own, p.a + 8 * thread, true);
    simt::cp_async_commit();
    simt::cp_async16(shared + 1024 + 16 * thread, p.a, false);
    simt::cp_async_commit();
    if (p.mistake == kWaitTooFew) simt::cp_async_wait<1>();
    if (wait && p.mistake != kWaitTooFew) simt::cp_async_wait<0>();
    if (p.mistake == kReadPending) simt::shared_load<uint32_t>(own);
    if (p.mistake == kOverwritePending) simt::shared_store<uint32_t>(own, 1);
    if (p.mistake == kReadWithoutBarrier) {
        simt::ballot(true);  // all lanes of the warp have written
        simt::shared_load<uint32_t>(shared + 16 * (thread ^ 1));
    }
    uint32_t r[4];
    if (p.mistake == kLdmatrixWithoutBarrier) simt::ldmatrix_x4(r, own);
    if (p.mistake == kMissingBarrier && thread == 40) return;
    if (p.mistake == kMissingLane && thread == 3) return;
    if (p.mistake == kBarrierInBranch && thread < 32) simt::sync_threads();
    if (p.mistake == kMixedCollectives && thread % 2) {
        simt::ballot(true);
    } else {
        simt::shuffle(1, 0);
    }
    simt::sync_threads();
    if (p.mistake != kNeverWaited) {
        CHECK(simt::shared_load<uint16_t>(next) == p.a[8 * ((thread + 1) % 64)]);
        CHECK(simt::shared_load<uint32_t>(shared + 1024 + 16 * thread) == 0);  // cleared, or caught by kWaitTooFew
    }
    if (p.mistake == kOverwriteRead) simt::shared_store<uint32_t>(own, 1);
    simt::sync_threads();
    if (p.mistake == kTwoWriters) simt::shared_store<uint32_t>(shared, static_cast<uint32_t>(thread));
    if (p.mistake == kOutside) simt::shared_load<uint32_t>(shared + 2048);
    if (p.mistake == kMisaligned) simt::shared_load<simt::Words4>(shared + 8);
}

// Each mistake must be noticed and named.
void check_mistakes() {
    const char *expected[kCount] = {};
    expected[kReadEmpty] = "nothing was written there";
    expected[kReadPending] = "before its cp.async was waited for";
    expected[kReadWithoutBarrier] = "is read, but was written since the last barrier";
    expected[kLdmatrixWithoutBarrier] = "is read, but was written since the last barrier";
    expected[kOverwriteRead] = "was read since the last barrier";
    expected[kTwoWriters] = "is written, but was also";
    expected[kOverwritePending] = "while a cp.async to it is under way";
    expected[kNeverWaited] = "ended with a cp.async not waited for";
    expected[kMissingBarrier] = "ended";
    expected[kMissingLane] = "ended";
    expected[kMixedCollectives] = "other lanes wait in";
    expected[kBarrierInBranch] = "barrier";
    expected[kOutside] = "outside";
    expected[kMisaligned] = "misaligned";
    expected[kWaitTooFew] = "before its cp.async was waited for";
    std::vector<uint16_t, test::Aligned<uint16_t>> a(512);
    for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<uint16_t>(i);
    for (int mistake = 0; mistake < kCount; ++mistake) {
        const char *error = nullptr;
        const bool ok = simt::launch<mistaken_kernel>(
            {2, 64, 2048}, Params{a.data(), nullptr, nullptr, nullptr, mistake}, nullptr, &error);
        CHECK(ok == (mistake == kNone));
        if (ok || mistake == kNone) continue;
        const bool named = std::string(error).find(expected[mistake]) != std::string::npos;
        if (!named) std::printf("mistake %d reported as: %s\n", mistake, error);
        CHECK(named);
    }
}

void check_conversions() {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const auto half = static_cast<uint16_t>(bits);
        const float f = f16_to_float(half), b = bf16_to_float(half);
        if (!std::isnan(f)) CHECK(f16_from_float(f) == half);
        if (!std::isnan(b)) CHECK(bf16_from_float(b) == half);
        const int exponent = half >> 10 & 31, fraction = half & 1023;
        const double value = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
        if (exponent < 31) CHECK(std::fabs(f) == value && std::signbit(f) == bool(half >> 15));
    }
    // Between two neighbours: to the nearer, ties to the even one.
    for (uint16_t half = 0; half < 0x7bff; ++half) {
        const auto next = static_cast<uint16_t>(half + 1);
        const double low = f16_to_float(half), high = f16_to_float(next), middle = (low + high) / 2;
        CHECK(f16_from_float(static_cast<float>(middle)) == (half % 2 ? next : half));
        CHECK(f16_from_float(std::nextafterf(static_cast<float>(middle), 0)) == half);
        CHECK(f16_from_float(std::nextafterf(static_cast<float>(middle), 1e6f)) == next);
    }
    CHECK(f16_from_float(65520.0f) == 0x7c00 && f16_from_float(65519.0f) == 0x7bff);
    CHECK(bf16_from_float(bits_float(0x3f808000u)) == 0x3f80 && bf16_from_float(bits_float(0x3f818000u)) == 0x3f82);
    CHECK(std::isnan(f16_to_float(f16_from_float(std::nanf("")))) && (bf16_from_float(std::nanf("")) & 0x7f) != 0);
    CHECK(simt::byte_permute(0x33221100u, 0x77665544u, 0x7140u) == 0x77114400u);
    CHECK(simt::add2(Bf16{}, 0x43084307u, 0xc308c308u) == 0x0000bf80u);
}

}  // namespace

namespace test {

void run_simt() {
    check_waits();
    check_conversions();
    check_mma<Bf16>();
    check_mma<F16>();
    check_collectives();
    check_mistakes();
}

}  // namespace test
