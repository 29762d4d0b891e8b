// matrix.h: arrays of any of the three float types.
#pragma once

#include "array.h"
#include "marlin_reference.h"

namespace test {

inline constexpr int32_t kDtypes[] = {KRASIS_BF16, KRASIS_F16, KRASIS_F32};

// A matrix of any of the three types.
struct Matrix {
    int32_t dtype;
    Array<uint8_t> bytes;

    Matrix(size_t count, int32_t type) : dtype(type), bytes(count * (type == KRASIS_F32 ? 4 : 2)) { bytes.poison(); }
    void set(size_t i, float value) {
        if (dtype == KRASIS_F32) {
            std::memcpy(bytes.data() + 4 * i, &value, 4);
        } else {
            const uint16_t bits = to_16(value, dtype);
            std::memcpy(bytes.data() + 2 * i, &bits, 2);
        }
    }
    double get(size_t i) const {
        if (dtype == KRASIS_F32) {
            float value;
            std::memcpy(&value, bytes.data() + 4 * i, 4);
            return value;
        }
        uint16_t bits;
        std::memcpy(&bits, bytes.data() + 2 * i, 2);
        return to_double(bits, dtype);
    }
    double rounding() const { return dtype == KRASIS_F32 ? 1e-6 : dtype == KRASIS_BF16 ? 0x1.02p-8 : 0x1.02p-11; }
};

}  // namespace test
