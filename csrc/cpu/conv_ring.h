// conv_ring.h: what a causal depthwise convolution of some channels looks back at, row after row of one sequence.
#pragma once

#include <cstring>

#include "delta.h"
#include "simd.h"

namespace krasis::KRASIS_ISA_NAMESPACE {

// columns, taps: rows of `channels` floats, the oldest token's first, of which the ring has `width` at these addresses.
class ConvRing {
  public:
    KRASIS_INLINE ConvRing(const float *columns, int64_t conv_width, int64_t channels, int64_t width, bool is_start)
        : before_(conv_width - 1), channels_(channels), width_(width) {
        for (int64_t j = 0; j < before_; ++j) {
            if (is_start) {
                std::memset(past_[j], 0, bytes());
            } else {
                std::memcpy(past_[j], columns + j * channels_, bytes());
            }
        }
    }

    // 16 channels of a row from channel i on, which is kept for later rows: what they and those before make together.
    KRASIS_INLINE V16 mix(int64_t i, V16 now, const float *taps) {
        V16 sum = V16::zero();
        for (int64_t j = 0, at = oldest_; j < before_; ++j, at = next(at)) {
            sum = fma(V16::load(past_[at] + i), V16::load(taps + j * channels_ + i), sum);
        }
        sum = fma(now, V16::load(taps + before_ * channels_ + i), sum);
        if (before_ > 0) now.store(past_[oldest_] + i);
        return sum;
    }

    // All channels of the row are done.
    KRASIS_INLINE void end_row() {
        if (before_ > 0) oldest_ = next(oldest_);
    }

    KRASIS_INLINE void keep(float *columns) const {
        for (int64_t j = 0, at = oldest_; j < before_; ++j, at = next(at)) {
            std::memcpy(columns + j * channels_, past_[at], bytes());
        }
    }

  private:
    KRASIS_INLINE int64_t next(int64_t at) const { return at + 1 == before_ ? 0 : at + 1; }
    KRASIS_INLINE size_t bytes() const { return static_cast<size_t>(width_) * sizeof(float); }

    alignas(64) float past_[kMaxConvWidth - 1][kMaxDeltaDim];  // the oldest is replaced by the newest
    int64_t before_, channels_, width_, oldest_ = 0;
};

}  // namespace krasis::KRASIS_ISA_NAMESPACE
