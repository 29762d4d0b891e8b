// pack_tasks.h: the packing tasks of pack.h, for the instruction set of the including file.
#pragma once

#include <cstring>

#include "pack.h"
#include "pack_bytes.h"
#include "pack_search.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

// Weights are at most this many steps of a float16 scale: 65504 * levels.
KRASIS_INLINE float largest_weight(int32_t scale_dtype, int32_t num_bits) {
    return scale_dtype == KRASIS_F16 ? 65504.0f * (num_bits == 4 ? 8 : 127) : 0x1.fffffep127f;
}

// kLanes rows of k columns that begin here.
struct Place {
    int64_t row, column;
};

KRASIS_INLINE const uint8_t *element(const PackSource &src, Place at) {
    return src.data + (at.row * src.row_stride + at.column) * element_bytes(src.dtype);
}

// Loads what begins at `at`, transposed, and prefetches what begins at `next`. False, and the row in out, if any weight
// is not finite or above limit.
inline bool load_rows(const PackSource &src, Place at, Place next, int64_t k, float limit, float *w, float *absmax,
                      PackPartial &out) {
    load_transposed(src.dtype, element(src, at), element(src, next), src.row_stride * element_bytes(src.dtype), k, w,
                    absmax);
    const int lane = first_bad_lane(absmax, limit);
    if (lane >= 0 && (out.bad_row < 0 || at.row + lane < out.bad_row)) {
        out.bad_row = at.row + lane;
    }
    return lane < 0;
}

// Where a loop over columns will be in a while: kAhead blocks further, or at the row's last block.
constexpr int64_t kAhead = 4 * KRASIS_BLOCK_K;
KRASIS_INLINE Place ahead(const PackSource &src, Place at) {
    const int64_t column = at.column + kAhead;
    return {at.row, column < src.k ? column : src.k - KRASIS_BLOCK_K};
}

inline void add_sums(const GroupSums &sums, V magnitude, PackPartial &out) {
    alignas(64) float error[kLanes], sum[kLanes], most[kLanes], scale[kLanes];
    sums.squared_error.store(error);
    sums.squared_sum.store(sum);
    sums.max_abs_error.store(most);
    magnitude.store(scale);
    for (int lane = 0; lane < kLanes; ++lane) {
        const double squared_scale = static_cast<double>(scale[lane]) * scale[lane];
        out.squared_error += error[lane] * squared_scale;
        out.squared_sum += sum[lane] * squared_scale;
        out.max_abs_error = most[lane] > out.max_abs_error ? most[lane] : out.max_abs_error;
    }
}

// ---- Marlin ------------------------------------------------------------------------------------------------

// The scales of one group and strip of 64 columns, permuted as the kernel reads them.
inline void store_marlin_scales(const MarlinJob &job, int64_t group_index, int64_t column, const uint16_t *scales) {
    uint16_t *const out = job.scales + group_index * job.n_total + job.n_offset + column;
    if (job.group < job.src.k) {
        for (int i = 0; i < 8; ++i) {
            for (int j = 0; j < 8; ++j) {
                out[8 * i + j] = scales[i + 8 * j];
            }
        }
        return;
    }
    for (int a = 0; a < 64; a += 32) {
        for (int i = 0; i < 4; ++i) {
            for (int b = 0; b < 4; ++b) {
                out[a + 8 * i + 2 * b] = scales[a + 8 * b + 2 * i];
                out[a + 8 * i + 2 * b + 1] = scales[a + 8 * b + 2 * i + 1];
            }
        }
    }
}

inline void store_marlin_codes(const MarlinJob &job, int64_t row, int64_t column, const uint8_t *codes) {
    const int64_t words_a_tile = 32 * job.bits;
    const int64_t tiles_a_row = job.n_total / 64;
    for (int64_t k = 0; k < job.group; k += 16) {
        const int64_t tile = (column + k) / 16 * tiles_a_row + (job.n_offset + row) / 64;
        if (job.bits == 4) {
            marlin_tile_4(codes + k * 64, job.codes + tile * words_a_tile);
        } else {
            marlin_tile_8(codes + k * 64, job.codes + tile * words_a_tile);
        }
    }
}

// Task: 64 rows of src, chunk_k columns.
inline void marlin_task(const MarlinJob &job, int64_t task, uint8_t *scratch, PackPartial &out) {
    const FloatingPointMode mode;
    const int64_t num_chunks = ceil_div(job.src.k, job.chunk_k);
    const int64_t row = task / num_chunks * kMarlinStrip, begin = task % num_chunks * job.chunk_k;
    const int64_t end = begin + job.chunk_k < job.src.k ? begin + job.chunk_k : job.src.k;
    float *const w = reinterpret_cast<float *>(scratch);
    uint8_t *const codes = scratch + job.group * 16 * 4;
    const float limit = largest_weight(job.scale_dtype, job.bits);
    alignas(64) float absmax[kLanes];
    alignas(64) uint16_t scales[kMarlinStrip] = {};
    for (int64_t column = begin; column < end; column += job.group) {
        for (int64_t r = 0; r < kMarlinStrip; r += kLanes) {
            const Place next = r + kLanes < kMarlinStrip
                                   ? Place{row + r + kLanes, column}
                                   : Place{row, column + job.group < end ? column + job.group : column};
            if (!load_rows(job.src, {row + r, column}, next, job.group, limit, w, absmax, out)) {
                continue;  // the call fails; later columns may hold an earlier bad row
            }
            const Group group{w, job.group, job.importance ? job.importance + column : nullptr, V::load(absmax),
                              job.scale_dtype};
            const int64_t num_groups = job.src.k / job.group;
            const Scale scale = job.steps       ? given_scale(job.steps + (row + r) * num_groups + column / job.group,
                                                              num_groups, job.scale_dtype)
                                : job.bits == 4 ? search_scale(group)
                                                : absmax_scale(group);
            GroupSums sums;
            store_scales(scales + r, quantise(group, scale, job.bits, codes + r, 64, sums), job.scale_dtype);
            add_sums(sums, scale.magnitude, out);
        }
        store_marlin_scales(job, column / job.group, row, scales);
        store_marlin_codes(job, row, column, codes);
    }
}

// ---- CPU tiles ---------------------------------------------------------------------------------------------

KRASIS_INLINE uint8_t *tile_at(const TilesJob &job, int64_t strip, int64_t column, int64_t tile_bytes) {
    return job.dst + (strip * (job.src.k / KRASIS_BLOCK_K) + column / KRASIS_BLOCK_K) * tile_bytes;
}

// Quantises 32 columns with round half away from zero, four int8 to a word, words at out + (column / 4) * stride.
inline void quantise_q8(const float *w, V stored, V inverse, uint8_t *out, int64_t stride, GroupSums &sums) {
    const V sign_bit = V::set1(-0.0f), below_half = V::set1(0x1.fffffep-2f);
    const VI low_byte = VI::set1(0xff);
    sums = {V::zero(), V::zero(), V::zero()};
    for (int i = 0; i < KRASIS_BLOCK_K; i += 4) {
        VI word = VI::set1(0);
        for (int b = 3; b >= 0; --b) {
            const V x = V::load(w + (i + b) * kLanes);
            const V y = mul(x, inverse);
            // Adding the float below one half, then truncating, is exact: a tie rounds up in the addition.
            const V away = as_float((bits(y) & bits(sign_bit)) | bits(below_half));
            const VI q = truncated(add(y, away));
            const V error = fnma(stored, to_float(q), x);
            const V scaled_error = mul(error, inverse);
            sums.squared_error = fma(scaled_error, scaled_error, sums.squared_error);
            sums.squared_sum = fma(y, y, sums.squared_sum);
            sums.max_abs_error = max(sums.max_abs_error, abs(error));
            word = shift_left<8>(word) | (q & low_byte);
        }
        word.store(out + i / 4 * stride);
    }
}

// kLanes rows of a Q8 tile, as ggml's Q8_0: d = absmax / 127, codes by 1 / d before d is rounded to float16. A block
// whose 1 / d overflows (absmax < 4e-37, d is 0 as float16) has codes of 0.
inline void q8_rows(const float *w, V absmax, uint8_t *codes, uint16_t *scales, PackPartial &out) {
    const V d = div(absmax, V::set1(127));
    const V usable = V::set1(0x1.00001p-128f);
    const V inverse = where_less(d, usable, V::zero(), div(V::set1(1), max(d, usable)));
    GroupSums sums;
    quantise_q8(w, through_f16(d), inverse, codes, KRASIS_TILE_ROWS * 4, sums);
    d.store_f16(scales);
    add_sums(sums, d, out);
}

inline void i4_rows(const TilesJob &job, const float *w, Place at, V absmax, uint8_t *codes, uint16_t *scales,
                    PackPartial &out) {
    const int64_t num_blocks = job.src.k / KRASIS_BLOCK_K;
    const Group group{w, KRASIS_BLOCK_K, job.importance ? job.importance + at.column : nullptr, absmax, KRASIS_F16};
    const Scale scale =
        job.steps ? given_scale(job.steps + at.row * num_blocks + at.column / KRASIS_BLOCK_K, num_blocks, KRASIS_F16)
                  : search_scale(group);
    GroupSums sums;
    store_scales(scales, quantise(group, scale, 4, codes, 64, sums), KRASIS_F16);
    add_sums(sums, scale.magnitude, out);
}

// Task: part_rows rows of src, chunk_k columns.
inline void tiles_task(const TilesJob &job, int64_t task, uint8_t *scratch, PackPartial &out) {
    const FloatingPointMode mode;
    const bool q8 = job.tiles == KRASIS_TILES_Q8;
    const int64_t num_chunks = ceil_div(job.src.k, job.chunk_k), strip = task / num_chunks;
    const int64_t begin = task % num_chunks * job.chunk_k;
    const int64_t end = begin + job.chunk_k < job.src.k ? begin + job.chunk_k : job.src.k;
    float *const w = reinterpret_cast<float *>(scratch);
    uint8_t *const codes = scratch + KRASIS_BLOCK_K * 16 * 4;
    const float limit = largest_weight(KRASIS_F16, q8 ? 8 : 4);
    alignas(64) float absmax[kLanes];
    for (int64_t column = begin; column < end; column += KRASIS_BLOCK_K) {
        uint8_t *const tile = tile_at(job, strip, column, q8 ? KRASIS_Q8_TILE_BYTES : KRASIS_I4_TILE_BYTES);
        uint8_t *const tile_scales = tile + KRASIS_BLOCK_K * KRASIS_TILE_ROWS / (q8 ? 1 : 2) + job.part_offset * 2;
        alignas(64) uint16_t scales[KRASIS_TILE_ROWS] = {};
        for (int64_t r = 0; r < job.part_rows; r += kLanes) {
            const Place at{strip * job.part_rows + r, column};
            if (!load_rows(job.src, at, ahead(job.src, at), KRASIS_BLOCK_K, limit, w, absmax, out)) {
                continue;
            }
            if (q8) {
                q8_rows(w, V::load(absmax), tile + (job.part_offset + r) * 4, scales + r, out);
            } else {
                i4_rows(job, w, at, V::load(absmax), codes + r, scales + r, out);
            }
        }
        if (!q8) {
            i4_tile(codes, job.part_rows, job.part_offset, tile);
        }
        std::memcpy(tile_scales, scales, static_cast<size_t>(job.part_rows) * 2);
    }
}

// ---- CPU tiles from Q8_0 -----------------------------------------------------------------------------------

constexpr int64_t kQ8BlockBytes = 34;

// Adds (d * q)^2 over a block. False if the float16 scale is not finite.
inline bool q8_block_sum(const uint8_t *block, PackPartial &out) {
    uint16_t half;
    std::memcpy(&half, block, 2);
    const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(block + 2));
    const __m256i low = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(q));
    const __m256i high = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(q, 1));
    const __m256i squares = _mm256_add_epi32(_mm256_madd_epi16(low, low), _mm256_madd_epi16(high, high));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(squares), _mm256_extracti128_si256(squares, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
    const double d = _cvtsh_ss(half);
    out.squared_sum += d * d * _mm_cvtsi128_si32(sum);
    return (half & 0x7c00) != 0x7c00;
}

// Eight rows of blocks to the words [8 k4] (128 bytes apart) of a Q8 tile.
inline void q8_words(const uint8_t *block, int64_t row_bytes, uint8_t *out) {
    __m256 x[8];
    for (int r = 0; r < 8; ++r) {
        x[r] = _mm256_loadu_ps(reinterpret_cast<const float *>(block + r * row_bytes + 2));
    }
    transpose_8x8(x);
    for (int c = 0; c < 8; ++c) {
        _mm256_storeu_ps(reinterpret_cast<float *>(out + c * KRASIS_TILE_ROWS * 4), x[c]);
    }
}

// Task: part_rows rows of src, chunk_k columns.
inline void q8_0_task(const TilesJob &job, int64_t task, PackPartial &out) {
    const FloatingPointMode mode;
    const int64_t num_chunks = ceil_div(job.src.k, job.chunk_k), strip = task / num_chunks;
    const int64_t begin = task % num_chunks * job.chunk_k;
    const int64_t end = begin + job.chunk_k < job.src.k ? begin + job.chunk_k : job.src.k;
    const int64_t row_bytes = job.src.k / KRASIS_BLOCK_K * kQ8BlockBytes;
    for (int64_t column = begin; column < end; column += KRASIS_BLOCK_K) {
        uint8_t *const tile = tile_at(job, strip, column, KRASIS_Q8_TILE_BYTES);
        uint8_t *const scales = tile + KRASIS_BLOCK_K * KRASIS_TILE_ROWS + job.part_offset * 2;
        const int64_t first = strip * job.part_rows;
        const uint8_t *const block = job.src.data + first * row_bytes + column / KRASIS_BLOCK_K * kQ8BlockBytes;
        for (int64_t r = 0; r < job.part_rows; ++r) {
            if (!q8_block_sum(block + r * row_bytes, out) && (out.bad_row < 0 || first + r < out.bad_row)) {
                out.bad_row = first + r;
            }
            std::memcpy(scales + r * 2, block + r * row_bytes, 2);
        }
        for (int64_t r = 0; r < job.part_rows; r += 8) {
            q8_words(block + r * row_bytes, row_bytes, tile + (job.part_offset + r) * 4);
        }
    }
}

// ---- INT8 rows ---------------------------------------------------------------------------------------------

// Quantises 32 columns with round half to even, four int8 to a word, words at out + (column / 4) * 128.
inline void quantise_row_words(const float *w, V scale, V inverse, uint8_t *out, GroupSums &sums) {
    const V magic = V::set1(kMagic);
    const VI base = VI::set1(kMagicBits), low_byte = VI::set1(0xff);
    for (int i = 0; i < KRASIS_BLOCK_K; i += 4) {
        VI word = VI::set1(0);
        for (int b = 3; b >= 0; --b) {
            const V x = V::load(w + (i + b) * kLanes);
            const V y = mul(x, inverse);
            const V rounded = add(y, magic);
            const V error = fnma(scale, sub(rounded, magic), x);
            const V scaled_error = mul(error, inverse);
            sums.squared_error = fma(scaled_error, scaled_error, sums.squared_error);
            sums.squared_sum = fma(y, y, sums.squared_sum);
            sums.max_abs_error = max(sums.max_abs_error, abs(error));
            word = shift_left<8>(word) | ((bits(rounded) - base) & low_byte);
        }
        word.store(out + i / 4 * KRASIS_TILE_ROWS * 4);
    }
}

// Task: 32 rows of src. Two passes: the scales, then the codes. A row below 127 * 2^-126 counts as zero: scale 1.
inline void int8_rows_task(const RowsJob &job, int64_t task, uint8_t *scratch, PackPartial &out) {
    const FloatingPointMode mode;
    float *const w = reinterpret_cast<float *>(scratch);
    uint8_t *const strip = reinterpret_cast<uint8_t *>(job.dst) + task * KRASIS_TILE_ROWS * job.src.k;
    alignas(64) float absmax[kLanes];
    for (int64_t r = 0; r < KRASIS_TILE_ROWS; r += kLanes) {
        const int64_t row = task * KRASIS_TILE_ROWS + r;
        V most = V::zero();
        for (int64_t column = 0; column < job.src.k; column += KRASIS_BLOCK_K) {
            const Place at{row, column};
            load_rows(job.src, at, ahead(job.src, at), KRASIS_BLOCK_K, 0x1.fffffep127f, w, absmax, out);
            most = max(most, V::load(absmax));
        }
        if (out.bad_row >= 0) {
            return;
        }
        const V scale = div(most, V::set1(127)), least = V::set1(0x1p-126f);
        const V safe = where_less(scale, least, V::set1(1), scale);
        const V inverse = where_less(scale, least, V::zero(), div(V::set1(1), safe));
        for (int64_t column = 0; column < job.src.k; column += KRASIS_BLOCK_K) {
            const Place at{row, column};
            load_rows(job.src, at, at, KRASIS_BLOCK_K, 0x1.fffffep127f, w, absmax, out);
            GroupSums sums{V::zero(), V::zero(), V::zero()};
            quantise_row_words(w, safe, inverse, strip + column / 4 * KRASIS_TILE_ROWS * 4 + r * 4, sums);
            add_sums(sums, safe, out);
        }
        safe.store(job.scales + row);
    }
}

}  // namespace krasis::KRASIS_ISA_NAMESPACE
