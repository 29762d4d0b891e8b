// tiles.h: the eight AMX tile registers behind a few functions, and a twin of them in plain C++.
//
// The twin (KRASIS_AMX_TWIN) is for tests: it does what the instructions do, on memory that sanitizers watch, so that
// the kernels are checked on machines without AMX too. Inline assembly, not intrinsics: GCC 12's do not say that a tile
// load reads memory, so stores before it might move behind it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace krasis::amx {

constexpr int kTiles = 8, kTileRows = 16, kTileBytes = 64;

// What ldtilecfg reads: bytes a row and rows of each tile.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

#if defined(KRASIS_AMX_TWIN)

struct TwinTiles {
    TileShapes shapes;
    uint8_t data[kTiles][kTileRows][kTileBytes];
    bool configured = false;

    // The processor raises an invalid opcode where this ends the program.
    void demand(bool right) const {
        if (!right || !configured) std::abort();
    }
};

inline TwinTiles &twin() {
    static thread_local TwinTiles tiles;
    return tiles;
}

inline void configure_tiles(const TileShapes &shapes) {
    TwinTiles &tiles = twin();
    tiles.shapes = shapes;
    tiles.configured = true;
    tiles.demand(shapes.palette == 1);
    for (int i = 0; i < kTiles; ++i) tiles.demand(shapes.rows[i] <= kTileRows && shapes.row_bytes[i] <= kTileBytes);
    std::memset(tiles.data, 0, sizeof tiles.data);
}

inline void release_tiles() { twin().configured = false; }

template <int kTile>
void zero_tile() {
    twin().demand(kTile < kTiles);
    std::memset(twin().data[kTile], 0, sizeof twin().data[kTile]);
}

template <int kTile, int kScale>
void load_tile(const void *from, int64_t unit) {
    TwinTiles &tiles = twin();
    const int64_t stride_bytes = kScale * unit;
    tiles.demand(tiles.shapes.rows[kTile] > 0);
    std::memset(tiles.data[kTile], 0, sizeof tiles.data[kTile]);
    for (int64_t row = 0; row < tiles.shapes.rows[kTile]; ++row) {
        std::memcpy(tiles.data[kTile][row], static_cast<const uint8_t *>(from) + row * stride_bytes,
                    tiles.shapes.row_bytes[kTile]);
    }
}

template <int kTile, int kScale>
void store_tile(void *to, int64_t unit) {
    TwinTiles &tiles = twin();
    const int64_t stride_bytes = kScale * unit;
    tiles.demand(tiles.shapes.rows[kTile] > 0);
    for (int64_t row = 0; row < tiles.shapes.rows[kTile]; ++row) {
        std::memcpy(static_cast<uint8_t *>(to) + row * stride_bytes, tiles.data[kTile][row],
                    tiles.shapes.row_bytes[kTile]);
    }
}

template <int kSum, int kA, int kB>
void add_products() {
    TwinTiles &tiles = twin();
    const TileShapes &shapes = tiles.shapes;
    tiles.demand(kSum != kA && kSum != kB && kA != kB && shapes.rows[kSum] == shapes.rows[kA] &&
                 shapes.row_bytes[kSum] == shapes.row_bytes[kB] && shapes.row_bytes[kA] == 4 * shapes.rows[kB]);
    for (int m = 0; m < shapes.rows[kSum]; ++m) {
        for (int n = 0; n < shapes.row_bytes[kSum] / 4; ++n) {
            int32_t sum;
            std::memcpy(&sum, &tiles.data[kSum][m][4 * n], sizeof sum);
            for (int k = 0; k < shapes.row_bytes[kA]; ++k) {
                sum += static_cast<int8_t>(tiles.data[kA][m][k]) *
                       static_cast<int8_t>(tiles.data[kB][k / 4][4 * n + k % 4]);
            }
            std::memcpy(&tiles.data[kSum][m][4 * n], &sum, sizeof sum);
        }
    }
}

#else

inline void configure_tiles(const TileShapes &shapes) { __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory"); }

// Also puts the tiles back to what a context switch need not save.
inline void release_tiles() { __asm__ volatile("tilerelease" : : : "memory"); }

template <int kTile>
inline __attribute__((always_inline)) void zero_tile() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// The stride is kScale * unit: one register serves all tiles of a loop.
template <int kTile, int kScale>
inline __attribute__((always_inline)) void load_tile(const void *from, int64_t unit) {
    __asm__ volatile("tileloadd (%0,%1,%c3), %%tmm%c2" : : "r"(from), "r"(unit), "i"(kTile), "i"(kScale) : "memory");
}

template <int kTile, int kScale>
inline __attribute__((always_inline)) void store_tile(void *to, int64_t unit) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,%c3)" : : "r"(to), "r"(unit), "i"(kTile), "i"(kScale) : "memory");
}

// Tile kSum [m][n] of int32 += tile kA, int8 [m][k], times tile kB, int8 [k/4][n][4].
template <int kSum, int kA, int kB>
inline __attribute__((always_inline)) void add_products() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

#endif

}  // namespace krasis::amx
