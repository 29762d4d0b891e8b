// latent_tile.cuh: what attention over latents (latent_attention.cuh) is told, and how a block of it is cut.
#pragma once

#include "krasis_cuda.h"
#include "simt.h"

namespace krasis::cuda {

inline constexpr int kLatentMaxSplits = 128;
inline constexpr int kLatentKeys = 32;       // of a stage; a split has a multiple of so many
inline constexpr int kLatentStatistics = 2;  // of a split of a head: the maximum, and the sum of exponentials below it
inline constexpr int kLatentRope = 64;       // at most, of a key's channels behind the latent
inline constexpr float kNothing = -__builtin_inff();  // the maximum of no scores

struct LatentParams {
    const uint8_t *q_latent, *q_rope;  // 16-bit
    uint8_t *out;
    const uint8_t *cache;                                // of all rows, if rows is null
    const krasis_cuda_row *rows;                         // [num_rows]
    const int32_t *chosen;                               // [num_rows, budget], or null: all that a row sees
    float *statistics;                                   // [num_rows, num_heads, splits, 2]
    float *sums;                                         // [num_rows, num_heads, splits, kv_rank]
    int64_t start, keys_offset, rope_stride, rope_head;  // in bytes but for start
    int64_t num_queries;                                 // of all rows
    int32_t capacity, num_heads, tiles_per_row, tile_queries, kv_rank, rope_dim, splits, budget;
    bool by_row;  // a tile is of one row
    float scale;
};

// Queries [begin, end), counted as row * num_heads + head.
struct LatentQueries {
    int64_t begin, end;
};

// Those of a tile.
KRASIS_DEVICE LatentQueries latent_queries(const LatentParams &p, int64_t tile) {
    const int64_t row = p.by_row ? tile / p.tiles_per_row : 0;
    const int64_t last = p.by_row ? (row + 1) * p.num_heads : p.num_queries;
    const int64_t begin = row * p.num_heads + (p.by_row ? tile % p.tiles_per_row : tile) * p.tile_queries;
    return {begin, begin + p.tile_queries < last ? begin + p.tile_queries : last};
}

KRASIS_DEVICE int64_t latent_tile(const LatentParams &p, int64_t query) {
    if (!p.by_row) return query / p.tile_queries;
    return query / p.num_heads * p.tiles_per_row + query % p.num_heads / p.tile_queries;
}

// How many keys a row's query attends to; a position outside of the cache counts as its nearest end.
KRASIS_DEVICE int latent_keys(const LatentParams &p, int64_t row) {
    const int64_t position = p.rows ? p.rows[row].position : p.start + row;
    const int seen = position < 0 ? 0 : position < p.capacity ? static_cast<int>(position) + 1 : p.capacity;
    return p.chosen && seen > p.budget ? p.budget : seen;
}

// How many a tile's last row sees: no other sees more.
KRASIS_DEVICE int latent_tile_keys(const LatentParams &p, const LatentQueries &queries) {
    return latent_keys(p, (queries.end - 1) / p.num_heads);
}

KRASIS_DEVICE int latent_keys_per_split(int count, int splits) {
    return ((count - 1) / splits / kLatentKeys + 1) * kLatentKeys;
}

KRASIS_DEVICE int latent_active_splits(int count, int splits) {
    return count == 0 ? 0 : (count - 1) / latent_keys_per_split(count, splits) + 1;
}

// exp(x - maximum), where the maximum of nothing is kNothing.
KRASIS_DEVICE float below(float x, float maximum) { return x == kNothing ? 0.0f : simt::exp_float(x - maximum); }

template <class Type_, int kRank_, int kRowTiles_, bool kChosen_ = false>
struct LatentTile {
    using Type = Type_;
    static constexpr bool kChosen = kChosen_;
    static constexpr int kRank = kRank_, kRowTiles = kRowTiles_;  // the latent's channels, rounded up; 16 queries each
    static constexpr int kWidth = kRank + kLatentRope, kSteps = kWidth / 16;
    static constexpr int kQuarterSteps = kSteps / 4;
    static constexpr int kWarps = 8, kThreads = 32 * kWarps;
    static constexpr int kHeads = 16 * kRowTiles;
    static constexpr int kStages = 2;
    static constexpr int kRowBytes = 2 * kWidth, kRowChunks = kRowBytes / 16;
    static constexpr int kStageBytes = kLatentKeys * kRowBytes;
    static constexpr int kCopies = kLatentKeys * kRowChunks / kThreads;
    static constexpr int kColumns = kRank / kWarps, kColumnSteps = kColumns / 16;  // of a warp
    static constexpr int kPartsAt = kStages * kStageBytes;                         // float [quarter][head][key]
    static constexpr int kWeightsAt = kPartsAt + 4 * kHeads * kLatentKeys * 4;     // 16-bit [value, rest][head][key]
    static constexpr int kWeightBytes = kHeads * kLatentKeys * 2;
    static constexpr int kFactorsAt = kWeightsAt + 2 * kWeightBytes;  // float [head]
    static constexpr int kSharedBytes = kFactorsAt + kHeads * 4;
    static_assert(kSteps % 4 == 0 && kRowChunks % 8 == 0 && kLatentKeys * kRowChunks % kThreads == 0);
    static_assert(kColumns % 16 == 0 && kSharedBytes <= 96 * 1024);  // what every target has
};

}  // namespace krasis::cuda
