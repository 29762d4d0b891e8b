// pack_mxfp4.cpp: MXFP4 blocks into tiles, and into Marlin's, without loss: nibbles change places, scales are copied.
#include <algorithm>
#include <cstring>

#include "pack.h"

namespace krasis {
namespace {

constexpr int64_t kSourceBytes = 17;  // a scale, then byte j = elements j (low) and 16 + j
constexpr int kLargestScale = 252;    // 6 * 2^(252 - 127) is below 2^128
constexpr int kLargestOnGpu = 192;    // what kernels compute with there: krasis_cuda.h
constexpr uint32_t kLowNibbles = 0x0f0f0f0fu;
constexpr int64_t kTileCodes = KRASIS_MXFP4_TILE_BYTES - KRASIS_TILE_ROWS;

// 2^exponent, which is that of a normal number.
double power_of_two(int exponent) {
    const uint64_t bits = static_cast<uint64_t>(1023 + exponent) << 52;
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// By the byte of two nibbles, the sum of the squares of their values, each doubled.
struct Squares {
    int32_t of[256];

    constexpr Squares() : of() {
        constexpr int32_t kSquares[8] = {0, 1, 4, 9, 16, 36, 64, 144};
        for (int byte = 0; byte < 256; ++byte) of[byte] = kSquares[byte & 7] + kSquares[byte >> 4 & 7];
    }
};
constexpr Squares kSquaresOf;

// What a block adds to the sum of all weights' squares.
double squares_of(const uint8_t *block) {
    int64_t sum = 0;
    for (int64_t i = 1; i < kSourceBytes; ++i) sum += kSquaresOf.of[block[i]];
    const double scale = power_of_two(block[0] - 128);
    return static_cast<double>(sum) * scale * scale;
}

// A row of a block into its place in a tile. row: in the tile.
void pack_row(const uint8_t *block, int64_t row, uint8_t *tile, PackPartial &out) {
    const int shift = row < 16 ? 0 : 4;
    const uint32_t kept = ~(kLowNibbles << shift);
    for (int64_t i = 0; i < 4; ++i) {
        uint32_t both;
        std::memcpy(&both, block + 1 + 4 * i, sizeof both);
        for (int64_t half = 0; half < 2; ++half) {
            const uint32_t nibbles = both >> (4 * half) & kLowNibbles;
            uint8_t *const at = tile + (4 * half + i) * 64 + row % 16 * 4;
            uint32_t word;
            std::memcpy(&word, at, sizeof word);
            word = (word & kept) | nibbles << shift;
            std::memcpy(at, &word, sizeof word);
        }
    }
    tile[kTileCodes + row] = block[0];
    out.squared_sum += squares_of(block);
}

// The words of 16 k and 64 columns. blocks: of the columns, stride bytes apart; half: 0 for the low nibbles.
void pack_marlin_words(const uint8_t *blocks, int64_t stride, int half, uint32_t *words) {
    for (int64_t at = 0; at < 128; ++at) {
        const int64_t lane = at / 4, column = at % 4 * 16 + lane / 4, r = lane % 4 * 2;
        uint32_t word = 0;
        for (int h = 0; h < 2; ++h) {
            const uint8_t *const own = blocks + (column + 8 * h) * stride + 1;
            for (int i = 0; i < 2; ++i) {
                const uint32_t even = own[r + 8 * i] >> (4 * half) & 15, odd = own[r + 8 * i + 1] >> (4 * half) & 15;
                word |= (even | odd << 16) << (4 * (2 * h + i));
            }
        }
        words[at] = word;
    }
}

}  // namespace

// Task: 64 rows of src, all of k.
void pack_marlin_from_mxfp4(const MarlinMxfp4Job &job, int64_t task, PackPartial &out) {
    const int64_t blocks = job.src.k / KRASIS_BLOCK_K, stride = blocks * kSourceBytes;
    const int64_t first = task * kMarlinStrip, column = job.n_offset + first;
    for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t *const source = job.src.data + first * stride + b * kSourceBytes;
        for (int64_t r = 0; r < kMarlinStrip; ++r) {
            const uint8_t *const block = source + r * stride;
            if (block[0] > kLargestOnGpu && (out.bad_row < 0 || first + r < out.bad_row)) out.bad_row = first + r;
            out.squared_sum += squares_of(block);
            job.scales[b * job.n_total + column + r % 8 * 8 + r / 8] = block[0];
        }
        for (int half = 0; half < 2; ++half) {
            pack_marlin_words(source, stride, half, job.codes + ((2 * b + half) * job.n_total + column) * 2);
        }
    }
}

// Task: part_rows rows of src, chunk_k columns.
void pack_tiles_from_mxfp4(const TilesJob &job, int64_t task, PackPartial &out) {
    const int64_t num_chunks = ceil_div(job.src.k, job.chunk_k), strip = task / num_chunks;
    const int64_t blocks = job.src.k / KRASIS_BLOCK_K, first = strip * job.part_rows;
    const int64_t begin = task % num_chunks * job.chunk_k / KRASIS_BLOCK_K;
    const int64_t end = std::min(begin + job.chunk_k / KRASIS_BLOCK_K, blocks);
    for (int64_t b = begin; b < end; ++b) {
        uint8_t *const tile = job.dst + (strip * blocks + b) * KRASIS_MXFP4_TILE_BYTES;
        for (int64_t r = 0; r < job.part_rows; ++r) {
            const uint8_t *const block = job.src.data + ((first + r) * blocks + b) * kSourceBytes;
            if (block[0] > kLargestScale && (out.bad_row < 0 || first + r < out.bad_row)) {
                out.bad_row = first + r;
            }
            pack_row(block, job.part_offset + r, tile, out);
        }
    }
}

}  // namespace krasis
