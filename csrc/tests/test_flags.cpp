// test_flags.cpp: two threads that hand a buffer to and fro by flags; timeouts; refusals.
#include <chrono>
#include <cstdint>
#include <thread>

#include "../krasis.h"
#include "test.h"

namespace {

constexpr int64_t kSecond = 1000000000;

// Each side adds one to what the other left: plain memory, so that the sanitizers would see a race.
void ping_pong() {
    alignas(64) uint64_t there = 0;
    alignas(64) uint64_t back = 0;
    int64_t word = 0;
    constexpr uint64_t kRounds = 20000;
    int32_t worst = KRASIS_OK;
    std::thread other([&] {
        for (uint64_t round = 1; round <= kRounds; ++round) {
            if (int32_t status = krasis_wait_flag(&there, round, 20 * kSecond)) worst = status;
            ++word;
            krasis_store_flag(&back, round);
        }
    });
    bool in_step = true;
    for (uint64_t round = 1; round <= kRounds; ++round) {
        ++word;
        CHECK(krasis_store_flag(&there, round) == KRASIS_OK);
        CHECK(krasis_wait_flag(&back, round, 20 * kSecond) == KRASIS_OK);
        in_step &= word == static_cast<int64_t>(2 * round);
    }
    other.join();
    CHECK(in_step);
    CHECK(worst == KRASIS_OK);
}

void timeouts() {
    uint64_t flag = 4;
    CHECK(krasis_wait_flag(&flag, 4, 0) == KRASIS_OK);
    CHECK(krasis_wait_flag(&flag, 3, 0) == KRASIS_OK);
    CHECK(krasis_wait_flag(&flag, 5, 0) == KRASIS_ERR_TIMEOUT);
    const auto start = std::chrono::steady_clock::now();
    CHECK(krasis_wait_flag(&flag, 5, kSecond / 50) == KRASIS_ERR_TIMEOUT);
    CHECK(std::chrono::steady_clock::now() - start >= std::chrono::milliseconds(20));
    // Longer than the spinning time: it yields, and still sees the flag.
    std::thread late([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        krasis_store_flag(&flag, UINT64_MAX);
    });
    CHECK(krasis_wait_flag(&flag, 5, 20 * kSecond) == KRASIS_OK);
    late.join();
    CHECK(flag == UINT64_MAX);
}

void refusals() {
    uint64_t flag = 0;
    auto *odd = reinterpret_cast<uint64_t *>(reinterpret_cast<uintptr_t>(&flag) + 4);
    CHECK(krasis_wait_flag(nullptr, 0, 0) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_wait_flag(odd, 0, 0) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_wait_flag(&flag, 1, -1) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_store_flag(nullptr, 1) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_store_flag(odd, 1) == KRASIS_ERR_ARGUMENT);
}

}  // namespace

int main() {
    ping_pong();
    timeouts();
    refusals();
    return test::finish("flags");
}
