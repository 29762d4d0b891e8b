// amx/gemm.cpp: a strip times panels by AMX tiles.
//
// A panel of up to 16 tokens is tile A [tokens][32 k], half a block of a strip is tile B [8 k4][16 rows][4 k]: the
// bytes of int8 blocks lie as tdpbssd reads them. 4-bit codes are first looked up as int8 in a small buffer, which
// serves all panels of a call. A tile of sums goes through memory, block after block, into the same float operations in
// the same order as avx512/gemm.cpp's, so the bits are the same. Codes are signed here: the panels' offsets are not
// used.
//
// A block has 32 k, because it has scales of its own: half of what a tile could take. A product and the storing of its
// sums occupy the tile unit for 16 cycles each whatever the number of tokens, and the float operations use the same
// port, so the gain over AVX-512 VNNI is a factor of two at most, not of eight, and panels of few tokens gain nothing.
#include <array>
#include <utility>

#include "../gemm_strip.h"
#include "tiles.h"

namespace krasis::avx512 {
void multiply_strip(StripFormat format, const uint8_t *strip, const uint8_t *panels, const PanelCut &cut, int64_t begin,
                    int64_t end, float *acc);
}

namespace krasis::amx {
namespace {

constexpr int64_t kSetBlocks = 16;  // blocks of weights that pass all panels before the next: codes of 16 KiB
constexpr int64_t kCodesRow = 128;  // [32 rows][4 k]
constexpr int64_t kHalfRows = 16;   // of a strip, that a tile holds
constexpr int64_t kFewTokens = 6;   // a last panel of so few is multiplied by AVX-512, which takes as many
constexpr int64_t kLineBytes = 64;

// Products of one panel and `blocks` blocks, into acc [width][32].
struct TileCall {
    const uint8_t *codes = nullptr;  // of the first block
    int64_t codes_stride = 0;        // bytes from block to block
    const float *scales = nullptr;   // [blocks][32], null: the blocks have none
    const uint8_t *panel = nullptr;
    float *acc = nullptr;
    int64_t blocks = 0;
    const uint8_t *fetch = nullptr;  // fetch_lines lines to prefetch beside each half of a block
    int64_t fetch_lines = 0;
};
using TileKernel = void (*)(const TileCall &call);

// Tiles 0, 1: sums of width tokens; 2, 3: activations; 4, 5: codes. Two of each, so that blocks overlap.
TileShapes shapes_of(int64_t width) {
    TileShapes shapes;
    for (int i : {0, 1, 2, 3}) shapes.rows[i] = static_cast<uint8_t>(width);
    for (int i : {4, 5}) shapes.rows[i] = kBlock / 4;
    for (int i : {0, 1, 4, 5}) shapes.row_bytes[i] = kTileBytes;
    for (int i : {2, 3}) shapes.row_bytes[i] = kBlock;
    return shapes;
}

// One panel against half the rows of each block.
template <bool kScaled, int kWidth>
struct Half {
    static constexpr int64_t kPanelStride = kWidth * kPanelTokenBytes;
    using Sums = int32_t[kWidth * kHalfRows];
    using Tokens = std::make_integer_sequence<int, kWidth>;

    const uint8_t *codes, *panel;         // of the next product
    const uint8_t *token_scales, *fetch;  // of the next sums, as are scales
    const float *scales;
    int64_t codes_stride, fetch_lines;
    int64_t unit = kBlock;  // of tile strides: activations 1, sums 2, codes 4

    KRASIS_INLINE Half(const TileCall &call, int64_t half)
        : codes(call.codes + half * kTileBytes),
          panel(call.panel),
          token_scales(call.panel + kWidth * kBlock),
          fetch(call.fetch + half * call.blocks * call.fetch_lines * kLineBytes),
          scales(kScaled ? call.scales + half * kHalfRows : nullptr),
          codes_stride(call.codes_stride),
          fetch_lines(call.fetch_lines) {
        __asm__("" : "+r"(unit));  // a register, not a constant to load again and again
    }

    template <int kOdd>
    KRASIS_INLINE void multiply() {
        zero_tile<kOdd>();
        load_tile<2 + kOdd, 1>(panel, unit);
        load_tile<4 + kOdd, 4>(codes, unit);
        add_products<kOdd, 2 + kOdd, 4 + kOdd>();
        panel += kPanelStride;
        codes += codes_stride;
    }

    KRASIS_INLINE void multiply_two() {
        multiply<0>();
        multiply<1>();
    }

    KRASIS_INLINE void store_two(Sums (&sums)[2]) const {
        store_tile<0, 2>(sums[0], unit);
        store_tile<1, 2>(sums[1], unit);
    }

    KRASIS_INLINE void finish_two(__m512 (&acc)[kWidth], const Sums (&sums)[2]) {
        finish(acc, sums[0]);
        finish(acc, sums[1]);
    }

    KRASIS_INLINE void finish(__m512 (&acc)[kWidth], const Sums &sums) {
        V16 scale = V16::zero();
        if constexpr (kScaled) {
            scale = V16::load(scales);
            scales += kStripRows;
        }
        convert(acc, sums, scale, Tokens{});
        token_scales += kPanelStride;
        for (int64_t i = 0; i < fetch_lines; ++i, fetch += kLineBytes) {
            _mm_prefetch(reinterpret_cast<const char *>(fetch), _MM_HINT_T0);
        }
    }

    // Indices are constants from the start, else GCC keeps the accumulators in memory.
    template <int... kToken>
    KRASIS_INLINE void convert(__m512 (&acc)[kWidth], const Sums &sums, V16 scale,
                               std::integer_sequence<int, kToken...>) const {
        ((acc[kToken] = add(acc[kToken], sums + kToken * kHalfRows, scale, token_scales + kToken * 4)), ...);
    }

    static KRASIS_INLINE __m512 add(__m512 acc, const int32_t *sums, V16 scale, const uint8_t *token_scale) {
        float value;
        std::memcpy(&value, token_scale, sizeof value);
        __m512 s = _mm512_set1_ps(value);
        if constexpr (kScaled) s = _mm512_mul_ps(scale.v, s);
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums)), s, acc);
    }

    template <int... kToken>
    static KRASIS_INLINE void load(__m512 (&acc)[kWidth], const float *from, std::integer_sequence<int, kToken...>) {
        ((acc[kToken] = _mm512_loadu_ps(from + kToken * kStripRows)), ...);
    }

    template <int... kToken>
    static KRASIS_INLINE void store(const __m512 (&acc)[kWidth], float *to, std::integer_sequence<int, kToken...>) {
        (_mm512_storeu_ps(to + kToken * kStripRows, acc[kToken]), ...);
    }
};

// While the sums of two blocks are converted, the products of the four after them are under way.
template <bool kScaled, int kWidth>
void kernel(const TileCall &call) {
    using H = Half<kScaled, kWidth>;
    alignas(64) typename H::Sums sums[2][2];
    const int64_t pairs = call.blocks / 2;
    for (int64_t half = 0; half < 2; ++half) {
        float *to = call.acc + half * kHalfRows;
        __m512 acc[kWidth];
        H::load(acc, to, typename H::Tokens{});
        H strip(call, half);
        for (int64_t i = 0; i < pairs; ++i) {
            strip.multiply_two();
            if (i >= 2) strip.finish_two(acc, sums[i % 2]);
            strip.store_two(sums[i % 2]);
        }
        for (int64_t i = std::max<int64_t>(pairs - 2, 0); i < pairs; ++i) strip.finish_two(acc, sums[i % 2]);
        if (call.blocks % 2 != 0) {
            strip.template multiply<0>();
            store_tile<0, 2>(sums[0][0], strip.unit);
            strip.finish(acc, sums[0][0]);
        }
        H::store(acc, to, typename H::Tokens{});
    }
}

// Of widths kFewTokens + 1 to kPanelTokens.
using TileKernels = std::array<TileKernel, kPanelTokens - kFewTokens>;

template <bool kScaled, int... kMore>
constexpr TileKernels kernels_of(std::integer_sequence<int, kMore...>) {
    return {kernel<kScaled, kFewTokens + 1 + kMore>...};
}

template <bool kScaled>
constexpr TileKernels kKernels = kernels_of<kScaled>(std::make_integer_sequence<int, kPanelTokens - kFewTokens>{});

// 4-bit codes of a block to int8: low nibbles are rows 0-15, high ones rows 16-31.
void look_up(__m512i values, const uint8_t *block, uint8_t *codes) {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int64_t k4 = 0; k4 < kBlock / 4; ++k4, block += kTileBytes, codes += kCodesRow) {
        const __m512i both = _mm512_loadu_si512(block);
        const __m512i low_codes = _mm512_and_si512(both, nibble);
        const __m512i high_codes = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
        _mm512_store_si512(codes, _mm512_shuffle_epi8(values, low_codes));
        _mm512_store_si512(codes + kTileBytes, _mm512_shuffle_epi8(values, high_codes));
    }
}

__m512i values_of(StripFormat format) {
    const __m128i int4 = _mm_setr_epi8(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m128i e2m1 = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);  // twice its value
    return _mm512_broadcast_i32x4(format == StripFormat::kI4 ? int4 : e2m1);
}

// What a set of blocks is made into before the panels pass.
struct PreparedSet {
    alignas(64) uint8_t codes[kSetBlocks * kStripRows * kBlock];  // of 4-bit formats; others are read where they are
    alignas(64) float scales[kSetBlocks * kStripRows];
};

template <StripFormat kFormat>
void prepare_scales(const uint8_t *block, int64_t blocks, float *scales) {
    for (; blocks > 0; --blocks, block += kBlockBytes<kFormat>, scales += kStripRows) {
        load_scales<kFormat>(block + kCodeBytes<kFormat>, 0).store(scales);
        load_scales<kFormat>(block + kCodeBytes<kFormat>, kHalfRows).store(scales + kHalfRows);
    }
}

TileCall prepare(StripFormat format, const uint8_t *first, int64_t blocks, PreparedSet &set) {
    TileCall call;
    call.blocks = blocks;
    call.scales = format == StripFormat::kRows ? nullptr : set.scales;
    if (format == StripFormat::kQ8) prepare_scales<StripFormat::kQ8>(first, blocks, set.scales);
    if (format == StripFormat::kI4) prepare_scales<StripFormat::kI4>(first, blocks, set.scales);
    if (format == StripFormat::kFp4) prepare_scales<StripFormat::kFp4>(first, blocks, set.scales);
    const int64_t block_bytes = strip_block_bytes(format);
    call.codes = first;
    call.codes_stride = block_bytes;
    if (format != StripFormat::kI4 && format != StripFormat::kFp4) return call;
    const __m512i values = values_of(format);
    call.codes = set.codes;
    call.codes_stride = kStripRows * kBlock;
    for (int64_t b = 0; b < blocks; ++b) look_up(values, first + b * block_bytes, set.codes + b * call.codes_stride);
    return call;
}

}  // namespace

void multiply_strip(StripFormat format, const uint8_t *strip, const uint8_t *panels, const PanelCut &cut, int64_t begin,
                    int64_t end, float *acc) {
    PreparedSet set;
    const int64_t block_bytes = strip_block_bytes(format), first_token = cut.first(begin);
    const int64_t num_tiled = cut.width(end - 1) > kFewTokens ? end - begin : end - begin - 1;
    const int64_t halves = 2 * std::max<int64_t>(num_tiled, 1);
    const int64_t lines = (block_bytes + halves * kLineBytes - 1) / (halves * kLineBytes);
    const TileKernels &kernels = format == StripFormat::kRows ? kKernels<false> : kKernels<true>;
    const int64_t end_token = cut.first(end - 1) + cut.width(end - 1);
    std::fill_n(acc, (end_token - first_token) * kStripRows, 0.0f);
    int64_t width = 0;
    for (int64_t b = 0; num_tiled > 0 && b < cut.blocks; b += kSetBlocks) {
        TileCall call = prepare(format, strip + b * block_bytes, std::min(kSetBlocks, cut.blocks - b), set);
        call.fetch = strip + (b + kSetBlocks) * block_bytes;  // each panel fetches its share of the next blocks
        call.fetch_lines = lines;
        for (int64_t p = begin; p < begin + num_tiled; ++p) {
            if (cut.width(p) != width) configure_tiles(shapes_of(width = cut.width(p)));
            call.panel = panels + cut.offset_bytes(p) + b * width * kPanelTokenBytes;
            call.acc = acc + (cut.first(p) - first_token) * kStripRows;
            kernels[static_cast<size_t>(width - kFewTokens - 1)](call);
            call.fetch += 2 * lines * call.blocks * kLineBytes;
        }
    }
    if (num_tiled > 0) release_tiles();
    if (begin + num_tiled < end) {
        const int64_t few = begin + num_tiled;
        avx512::multiply_strip(format, strip, panels, cut, few, end, acc + (cut.first(few) - first_token) * kStripRows);
    }
}

}  // namespace krasis::amx

#include "../gemm_units.h"
