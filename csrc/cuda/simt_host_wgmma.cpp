// simt_host_wgmma.cpp: products of a warpgroup. A warp's part of one, 16 rows of A times the whole tile, needs no other
// warp, so each warp performs its own; when it waits for them, not before: what touches sums, fragments or the tile too
// early gives wrong results here, too.
#include "simt_host_state.h"

namespace krasis::simt {
namespace {

constexpr int kRowBytes = 128;

// Where the tile has the eight k of a row.
const uint8_t *chunk_of(const Product &product, int row, int half) {
    return product.tile + row * kRowBytes + ((2 * product.k16 + half) ^ row % 8) * 16;
}

void watch_tile(const Product &product) {
    if (reinterpret_cast<uintptr_t>(product.tile) % 1024) fail("a tile of wgmma begins at no multiple of 1024 bytes");
    for (int row = 0; row < 8 * product.num_tiles; ++row) {
        for (int half = 0; half < 2; ++half) watch_read_by(chunk_of(product, row, half), 16, Cell::kSeveral);
    }
}

// The products of lanes that each hold their part of one. Sanitizers would only slow it down.
[[gnu::no_sanitize_address, gnu::no_sanitize_undefined]]
void perform(const Product *const (&lanes)[kWarp]) {
    const Product &any = *lanes[0];
    watch_tile(any);
    float a[16][16], b[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
        for (int i = 0; i < 8; ++i) {
            const int row = lane / 4 + 8 * (i / 2 % 2), column = 2 * (lane % 4) + i % 2 + 8 * (i / 4);
            a[row][column] = any.to_float(static_cast<uint16_t>(lanes[lane]->a[i / 2] >> (16 * (i % 2))));
        }
    }
    for (int t = 0; t < any.num_tiles; ++t) {
        for (int column = 0; column < 8; ++column) {
            for (int k = 0; k < 16; ++k) {
                uint16_t bits;
                memcpy(&bits, chunk_of(any, 8 * t + column, k / 8) + k % 8 * 2, 2);
                b[k][column] = any.to_float(bits);
            }
        }
        for (int lane = 0; lane < kWarp; ++lane) {
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
                float sum = lanes[lane]->d[t][i];
                for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
                lanes[lane]->d[t][i] = sum;
            }
        }
    }
}

struct RecordArgument {
    Thread *thread;
    Product product;
};

void record(const Product &product) {
    RecordArgument argument{current, product};
    collective("wgmma", &argument, [](void *const *lanes) {
        watch_tile(static_cast<RecordArgument *>(lanes[0])->product);
        for (int lane = 0; lane < kWarp; ++lane) {
            auto *own = static_cast<RecordArgument *>(lanes[lane]);
            own->thread->open_products.push_back(own->product);
        }
    });
}

struct WaitArgument {
    Thread *thread;
    size_t pending;
};

void perform_oldest(void *const *lanes) {
    Thread *threads[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) threads[lane] = static_cast<WaitArgument *>(lanes[lane])->thread;
    for (size_t i = 0; i < threads[0]->committed_products.front().size(); ++i) {
        const Product *products[kWarp];
        for (int lane = 0; lane < kWarp; ++lane) products[lane] = &threads[lane]->committed_products.front()[i];
        perform(products);
    }
    for (Thread *thread : threads) thread->committed_products.erase(thread->committed_products.begin());
}

}  // namespace

void wgmma_record(Bf16, float (*d)[4], int num_tiles, const uint32_t *a, const uint8_t *tile, int k16) {
    record({d, num_tiles, a, tile, k16, [](uint16_t bits) { return bf16_to_float(bits); }});
}
void wgmma_record(F16, float (*d)[4], int num_tiles, const uint32_t *a, const uint8_t *tile, int k16) {
    record({d, num_tiles, a, tile, k16, [](uint16_t bits) { return f16_to_float(bits); }});
}

void wgmma_commit() {
    current->committed_products.push_back(std::move(current->open_products));
    current->open_products.clear();
}

void wgmma_wait_for(int pending) {
    WaitArgument argument{current, static_cast<size_t>(pending)};
    collective("wgmma.wait", &argument, [](void *const *lanes) {
        const auto *first = static_cast<WaitArgument *>(lanes[0]);
        while (first->thread->committed_products.size() > first->pending) perform_oldest(lanes);
    });
}

}  // namespace krasis::simt
