// simt_host_mma.cpp: ldmatrix and mma with the fragment layouts that the PTX ISA documents for m8n8.b16 and m16n8k16.
#include "simt_host_state.h"

namespace krasis::simt {
namespace {

template <int kMatrices>
struct LoadArgument {
    const uint8_t *row;
    uint32_t out[kMatrices];
};

template <int kMatrices, bool kTransposed = false>
void load_matrices(const char *name, uint32_t *r, const void *shared_row) {
    using Argument = LoadArgument<kMatrices>;
    Argument own{static_cast<const uint8_t *>(shared_row), {}};
    collective(name, &own, [](void *const *lanes) {
        for (int matrix = 0; matrix < kMatrices; ++matrix) {
            for (int row = 0; row < 8; ++row) {
                const uint8_t *source = static_cast<Argument *>(lanes[8 * matrix + row])->row;
                // The row goes to four lanes: even the thread that wrote it needs a barrier before.
                watch_read_by(source, 16, Cell::kSeveral);
                for (int column = 0; column < 8; ++column) {
                    // Lane 4i + j holds columns 2j and 2j + 1 of row i; transposed, rows 2j and 2j + 1 of column i.
                    const int major = kTransposed ? column : row, minor = kTransposed ? row : column;
                    auto *to = &static_cast<Argument *>(lanes[4 * major + minor / 2])->out[matrix];
                    memcpy(reinterpret_cast<uint8_t *>(to) + minor % 2 * 2, source + 2 * column, 2);
                }
            }
        }
    });
    memcpy(r, own.out, sizeof(own.out));
}

struct TransposeArgument {
    uint32_t in, out;
};

struct MmaArgument {
    float *d;
    const uint32_t *a, *b;
};

// Most of a test's time is spent here, on arrays of fixed size: sanitizers would only slow it down.
[[gnu::no_sanitize_address, gnu::no_sanitize_undefined, gnu::noinline, gnu::optimize("O3")]]
void product(const float (&a)[16][16], const float (&b)[16][8], float (&d)[16][8]) {
    for (int m = 0; m < 16; ++m) {
        float sum[8];
        for (int n = 0; n < 8; ++n) sum[n] = d[m][n];
        for (int k = 0; k < 16; ++k) {
            for (int n = 0; n < 8; ++n) sum[n] += a[m][k] * b[k][n];
        }
        for (int n = 0; n < 8; ++n) d[m][n] = sum[n];
    }
}

// Lane l holds, with g = l / 4 and q = l % 4:
//   a[0] row g, a[1] row g+8, columns 2q, 2q+1; a[2] row g, a[3] row g+8, columns 2q+8, 2q+9
//   b[0] rows 2q, 2q+1, column g; b[1] rows 2q+8, 2q+9, column g
//   d[0], d[1] row g, columns 2q, 2q+1; d[2], d[3] row g+8
template <class Type>
void multiply(void *const *lanes) {
    float a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
        const auto *own = static_cast<const MmaArgument *>(lanes[lane]);
        const int g = lane / 4, q = lane % 4;
        for (int half = 0; half < 2; ++half) {
            for (int i = 0; i < 4; ++i) {
                a[g + 8 * (i % 2)][2 * q + half + 8 * (i / 2)] =
                    Type::to_float(static_cast<uint16_t>(own->a[i] >> (16 * half)));
            }
            for (int i = 0; i < 2; ++i) {
                b[2 * q + half + 8 * i][g] = Type::to_float(static_cast<uint16_t>(own->b[i] >> (16 * half)));
            }
        }
        for (int i = 0; i < 4; ++i) d[g + 8 * (i / 2)][2 * q + i % 2] = own->d[i];
    }
    product(a, b, d);
    for (int lane = 0; lane < kWarp; ++lane) {
        float *own = static_cast<MmaArgument *>(lanes[lane])->d;
        for (int i = 0; i < 4; ++i) own[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
    }
}

}  // namespace

void ldmatrix_x4(uint32_t (&r)[4], const void *shared_row) { load_matrices<4>("ldmatrix.x4", r, shared_row); }
void ldmatrix_x4_transposed(uint32_t (&r)[4], const void *shared_row) {
    load_matrices<4, true>("ldmatrix.x4.trans", r, shared_row);
}
void ldmatrix_x2(uint32_t (&r)[2], const void *shared_row) {
    // Lanes 16 to 31 name no row.
    load_matrices<2>("ldmatrix.x2", r, shared_row);
}

uint32_t transpose_8x8(uint32_t own) {
    TransposeArgument argument{own, 0};
    collective("movmatrix", &argument, [](void *const *lanes) {
        for (int row = 0; row < 8; ++row) {
            for (int column = 0; column < 8; ++column) {
                const uint32_t word = static_cast<TransposeArgument *>(lanes[4 * row + column / 2])->in;
                const uint32_t element = word >> (16 * (column % 2)) & 0xffffu;
                static_cast<TransposeArgument *>(lanes[4 * column + row / 2])->out |= element << (16 * (row % 2));
            }
        }
    });
    return argument.out;
}

void mma(Bf16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    MmaArgument own{d, a, b};
    collective("mma.bf16", &own, multiply<Bf16>);
}
void mma(F16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    MmaArgument own{d, a, b};
    collective("mma.f16", &own, multiply<F16>);
}

}  // namespace krasis::simt
