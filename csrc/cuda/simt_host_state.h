// simt_host_state.h: what the parts of the host shim share.
#pragma once

#include <cstdint>
#include <vector>

#include "simt.h"

namespace krasis::simt {

enum class Wait : uint8_t { kNone, kLanes, kBlock, kDone };

struct AsyncCopy {
    uint8_t *shared;
    const uint8_t *global;
    bool valid;
};

// Of a warp's 16 rows of a warpgroup's product.
struct Product {
    float (*d)[4];
    int num_tiles;  // of eight columns
    const uint32_t *a;
    const uint8_t *tile;
    int k16;
    float (*to_float)(uint16_t);
};

struct Thread {
    unsigned index = 0;
    Wait wait = Wait::kNone;
    const char *collective_name = nullptr;
    void *argument = nullptr;
    unsigned num_barriers = 0, num_waits = 0;
    bool has_waited = false;                        // for the launches ahead
    unsigned num_lanes_waiting = 0;                 // of the warp; lane 0's counts
    const char *warp_collective = nullptr;          // in which they wait
    std::vector<AsyncCopy> open;                    // issued, not committed
    std::vector<std::vector<AsyncCopy>> committed;  // oldest first
    std::vector<Product> open_products;
    std::vector<std::vector<Product>> committed_products;
    void *stack_pointer = nullptr;
    void *fake_stack = nullptr;  // AddressSanitizer's
};

// Four bytes of shared memory: who touched them last, and in which interval between barriers.
struct Cell {
    enum State : uint8_t { kEmpty, kPending, kWritten };
    static constexpr int32_t kNobody = -1, kSeveral = -2, kAtomic = -3;
    State state = kEmpty;
    int32_t writer = kNobody, reader = kNobody;
    uint32_t write_interval = 0, read_interval = 0;
};

struct Block {
    unsigned index = 0, num_blocks = 0, num_threads = 0;
    unsigned num_at_barrier = 0;
    bool is_beside = false;  // began before the launches ahead had ended
    uint32_t interval = 1;   // counts barriers
    std::vector<Thread> threads;
    uint8_t *shared = nullptr;
    size_t shared_bytes = 0;
    std::vector<Cell> cells;
};

extern Block block;

struct Text {
    char text[96];
};
Text describe_thread(const Thread &thread);
void reset_cells();
// A read that several lanes share: nobody's own writes excuse it.
void watch_read_by(const void *shared, size_t bytes, int32_t reader);
// A thread that ended its block with a cp.async or a product it never waited for; null if there is none.
const Thread *thread_with_open_copies();

}  // namespace krasis::simt
