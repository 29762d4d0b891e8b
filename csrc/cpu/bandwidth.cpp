// bandwidth.cpp: how fast the threads of a pool can read memory: the ceiling for decode.
#include <atomic>
#include <chrono>
#include <cstring>

#include "pool.h"

namespace {

constexpr int64_t kPieceBytes = 256 * 1024;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kAheadBytes = 6528;

// One word of every line: that moves the line, and nothing but memory can be the limit.
uint64_t read_piece(const uint8_t *data, int64_t bytes) {
    uint64_t sum[2] = {};
    for (int64_t i = 0; i + kLineBytes <= bytes; i += kLineBytes) {
        __builtin_prefetch(data + i + kAheadBytes);
        uint64_t word;
        std::memcpy(&word, data + i, sizeof word);
        sum[i / kLineBytes % 2] += word;
    }
    return sum[0] + sum[1] + (bytes % kLineBytes ? data[bytes - 1] : 0);
}

}  // namespace

int32_t krasis_read_bandwidth(krasis_pool *pool, const void *address, int64_t bytes, double *seconds) {
    if (!pool || !seconds || bytes < 0 || (bytes > 0 && !address)) return KRASIS_ERR_ARGUMENT;
    const uint8_t *data = static_cast<const uint8_t *>(address);
    std::atomic<uint64_t> sink{0};
    auto read = [&](int64_t begin, int64_t end, int32_t) {
        const int64_t from = begin * kPieceBytes;
        const int64_t to = end * kPieceBytes < bytes ? end * kPieceBytes : bytes;
        sink.fetch_xor(read_piece(data + from, to - from), std::memory_order_relaxed);
    };
    const krasis::Phase phase = krasis::make_phase(read, (bytes + kPieceBytes - 1) / kPieceBytes, 1, 64);
    const auto start = std::chrono::steady_clock::now();
    krasis::parallel_phases(pool, &phase, 1);
    *seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return KRASIS_OK;
}
