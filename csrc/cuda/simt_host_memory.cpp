// simt_host_memory.cpp: shared memory with a watch on every four bytes, and cp.async that arrives as late as allowed.
#include "simt_host_state.h"

namespace krasis::simt {
namespace {

// Ends the launch with what happened to a cell, and, if another had to do with it, to whom.
[[noreturn]] void fail_at(size_t cell, const char *what, int32_t other = Cell::kNobody) {
    if (other == Cell::kNobody) fail("shared memory at byte %zu %s", 4 * cell, what);
    if (other == Cell::kSeveral) fail("shared memory at byte %zu %s: several threads", 4 * cell, what);
    if (other == Cell::kAtomic) fail("shared memory at byte %zu %s: an atomic", 4 * cell, what);
    fail("shared memory at byte %zu %s: thread %d", 4 * cell, what, other);
}

struct Range {
    size_t begin, end;  // cells
};

Range cells_of(const void *shared, size_t bytes) {
    const auto *address = static_cast<const uint8_t *>(shared);
    if (address < block.shared || address + bytes > block.shared + block.shared_bytes) {
        fail("access outside of the block's shared memory");
    }
    const size_t offset = static_cast<size_t>(address - block.shared);
    if (offset % (bytes < 16 ? bytes : 16)) fail_at(offset / 4, "gets a misaligned access");
    return {offset / 4, (offset + bytes + 3) / 4};
}

void claim(size_t index, int32_t writer, Cell::State state) {
    Cell &cell = block.cells[index];
    if (cell.state == Cell::kPending) fail_at(index, "is written while a cp.async to it is under way");
    if (cell.reader != Cell::kNobody && cell.reader != writer && cell.read_interval == block.interval) {
        fail_at(index, "is overwritten, but was read since the last barrier by another", cell.reader);
    }
    if (cell.state == Cell::kWritten && cell.writer != writer && cell.write_interval == block.interval) {
        fail_at(index, "is written, but was also since the last barrier by another", cell.writer);
    }
    cell.state = state;
    cell.writer = writer;
    cell.write_interval = block.interval;
}

int32_t own_index() { return static_cast<int32_t>(current->index); }

}  // namespace

void reset_cells() { block.cells.assign((block.shared_bytes + 3) / 4, Cell{}); }

void watch_read_by(const void *shared, size_t bytes, int32_t reader) {
    const Range range = cells_of(shared, bytes);
    for (size_t i = range.begin; i < range.end; ++i) {
        Cell &cell = block.cells[i];
        if (cell.state == Cell::kEmpty) fail_at(i, "is read, but nothing was written there");
        if (cell.state == Cell::kPending) fail_at(i, "is read before its cp.async was waited for");
        if (cell.writer != reader && cell.write_interval == block.interval) {
            fail_at(i, "is read, but was written since the last barrier by another", cell.writer);
        }
        const bool shared_read = cell.read_interval == block.interval && cell.reader != Cell::kNobody;
        cell.reader = shared_read && cell.reader != reader ? Cell::kSeveral : reader;
        cell.read_interval = block.interval;
    }
}

void watch_read(const void *shared, size_t bytes) { watch_read_by(shared, bytes, own_index()); }

void watch_write(const void *shared, size_t bytes) {
    const Range range = cells_of(shared, bytes);
    for (size_t i = range.begin; i < range.end; ++i) claim(i, own_index(), Cell::kWritten);
}

int32_t shared_atomic_add(int32_t *shared, int32_t value) {
    const size_t index = cells_of(shared, 4).begin;
    if (block.cells[index].state == Cell::kEmpty) fail_at(index, "is added to, but nothing was written there");
    claim(index, Cell::kAtomic, Cell::kWritten);
    const int32_t before = *shared;
    *shared += value;
    return before;
}

void cp_async16(void *shared, const void *global, bool valid) {
    const Range range = cells_of(shared, 16);
    if (valid && reinterpret_cast<uintptr_t>(global) % 16) fail("cp.async reads from a misaligned address");
    for (size_t i = range.begin; i < range.end; ++i) claim(i, own_index(), Cell::kPending);
    memset(shared, 0xff, 16);
    current->open.push_back({static_cast<uint8_t *>(shared), static_cast<const uint8_t *>(global), valid});
}

void cp_async_commit() {
    current->committed.push_back(std::move(current->open));
    current->open.clear();
}

void cp_async_wait_for(int pending) {
    const bool faulty = planned_fault.fault != Fault::kNone && current->num_waits++ >= planned_fault.from;
    if (faulty && planned_fault.fault == Fault::kNoWait) return;
    if (faulty && planned_fault.fault == Fault::kWaitOneLess) ++pending;
    auto &groups = current->committed;
    while (groups.size() > static_cast<size_t>(pending)) {
        for (const AsyncCopy &copy : groups.front()) {
            const Range range = cells_of(copy.shared, 16);
            for (size_t i = range.begin; i < range.end; ++i) {
                block.cells[i].state = Cell::kWritten;
                block.cells[i].write_interval = block.interval;
            }
            copy.valid ? memcpy(copy.shared, copy.global, 16) : memset(copy.shared, 0, 16);
        }
        groups.erase(groups.begin());
    }
}

const Thread *thread_with_open_copies() {
    for (const Thread &thread : block.threads) {
        bool pending = !thread.open.empty();
        for (const auto &group : thread.committed) pending |= !group.empty();
        if (pending || !thread.open_products.empty() || !thread.committed_products.empty()) return &thread;
    }
    return nullptr;
}

}  // namespace krasis::simt
