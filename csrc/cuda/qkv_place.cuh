// qkv_place.cuh: how a pair of channels of q or k is turned, and where the keys and values of a row go.
#pragma once

#include "krasis_cuda.h"
#include "simt.h"

namespace krasis::cuda {

inline constexpr int kHeadThreads = 128;  // of a block that works head by head

// Where a row's keys and values go.
struct Place {
    int64_t position;
    void *keys, *values;
};

KRASIS_DEVICE Place place_of(const krasis_cuda_qkv_args &p, int64_t token) {
    if (!p.rows) return {(p.start_device ? *p.start_device : p.start) + token, p.k_cache, p.v_cache};
    const krasis_cuda_row row = p.rows[token];
    return {row.position, static_cast<uint8_t *>(row.keys) + p.keys_offset,
            static_cast<uint8_t *>(row.values) + p.values_offset};
}

// One given by the device could not be checked before the launch: nothing is written where it does not fit.
KRASIS_DEVICE bool fits(const krasis_cuda_qkv_args &p, int64_t position) {
    return position >= 0 && position < p.capacity && position < p.max_positions;
}

// The place of a head's entry in a cache, counted in entries.
template <bool kRing>
KRASIS_DEVICE int64_t entry_of(const krasis_cuda_qkv_args &p, int64_t head, int64_t position) {
    return kRing ? head * p.ring + position % p.ring : head * p.capacity + position;
}

// By an angle's cosine and sine.
KRASIS_DEVICE void turn_pair(float cosine, float sine, float &x, float &y) {
    const float turned = simt::multiply(x, cosine) - simt::multiply(y, sine);
    y = simt::multiply(y, cosine) + simt::multiply(x, sine);
    x = turned;
}

}  // namespace krasis::cuda
