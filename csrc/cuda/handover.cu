// handover.cu: how GPU and CPU, and the GPUs of a host, hand a layer's values to each other through pinned memory:
// copy, then set a flag; wait for a flag, then add, or take rows. What writes a flag is one block: it needs one writer,
// and the values are a few kilobytes.
#include "status.h"
#include "vector8.cuh"

namespace krasis::cuda {
namespace {

constexpr int kAdvanceThreads = 32;
constexpr int kSendThreads = 512, kReceiveThreads = 512, kTakeThreads = 512, kAddThreads = 256;
constexpr int kEagerLooks = 64;  // before resting between looks
constexpr uint32_t kRestNs = 200;

struct EpochParams {
    uint64_t *epoch;
};

KRASIS_KERNEL(kAdvanceThreads, 1)
advance_kernel(const EpochParams p) {
    simt::follow();
    if (simt::thread_x() == 0) *p.epoch += 1;
}

KRASIS_DEVICE bool is_16_bytes(const void *address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

template <class Word>
KRASIS_DEVICE void copy_words(void *to, const void *from, int64_t num_bytes) {
    const int64_t count = num_bytes / static_cast<int64_t>(sizeof(Word));
    for (int64_t i = simt::thread_x(); i < count; i += kSendThreads) {
        static_cast<Word *>(to)[i] = static_cast<const Word *>(from)[i];
    }
}

KRASIS_KERNEL(kSendThreads, 1)
send_kernel(const krasis_cuda_send_args p) {
    simt::follow();
    KRASIS_UNROLL
    for (int i = 0; i < KRASIS_CUDA_SEND_PIECES; ++i) {
        const bool wide = p.num_bytes[i] % 16 == 0 && is_16_bytes(p.sources[i]) && is_16_bytes(p.destinations[i]);
        if (wide) {
            copy_words<simt::Words4>(p.destinations[i], p.sources[i], p.num_bytes[i]);
        } else {
            copy_words<uint32_t>(p.destinations[i], p.sources[i], p.num_bytes[i]);
        }
    }
    // The barrier puts all threads' copies before the store, whose release covers them.
    simt::sync_threads();
    if (simt::thread_x() == 0) simt::store_release_system(p.flag, *p.epoch);
}

// In one thread of a block: whether the flag came. The first block adds tag to *timeouts if not.
template <class Args>
KRASIS_DEVICE bool wait_for(const Args &p) {
    if (simt::load_acquire_system(p.timeouts) != 0) return false;
    const uint64_t epoch = *p.epoch, start = simt::clock_ns();
    for (int looks = 0;; ++looks) {
        if (simt::load_acquire_system(p.flag) >= epoch) return true;
        if (looks < kEagerLooks) continue;
        if (simt::clock_ns() - start >= static_cast<uint64_t>(p.timeout_ns)) break;
        simt::rest_ns(kRestNs);
    }
    if (simt::block_x() == 0) *p.timeouts += p.tag;
    return false;
}

KRASIS_DEVICE void add_words(float *hidden, const float *x, int64_t begin, int64_t count, int64_t stride) {
    for (int64_t i = begin; i < count / 4; i += stride) {
        auto *to = reinterpret_cast<simt::Words4 *>(hidden) + i;
        const simt::Words4 added = reinterpret_cast<const simt::Words4 *>(x)[i];
        simt::Words4 sum = *to;
        KRASIS_UNROLL
        for (int j = 0; j < 4; ++j) sum.w[j] = float_bits(bits_float(sum.w[j]) + bits_float(added.w[j]));
        *to = sum;
    }
}

// shared: int32 [1], whether the flag came.
KRASIS_KERNEL(kReceiveThreads, 1)
receive_kernel(const krasis_cuda_receive_args p) {
    simt::follow();
    auto *came = reinterpret_cast<int32_t *>(simt::shared_memory());
    if (simt::thread_x() == 0) simt::shared_store(came, static_cast<int32_t>(wait_for(p)));
    simt::sync_threads();
    if (simt::shared_load<int32_t>(came)) add_words(p.hidden, p.x, simt::thread_x(), p.count, kReceiveThreads);
}

// A row a block. shared: int32 [1], whether the flag came.
KRASIS_KERNEL(kTakeThreads, 1)
take_kernel(const krasis_cuda_take_args p) {
    simt::follow();
    auto *came = reinterpret_cast<int32_t *>(simt::shared_memory());
    if (simt::thread_x() == 0) simt::shared_store(came, static_cast<int32_t>(wait_for(p)));
    simt::sync_threads();
    const bool is_there = simt::shared_load<int32_t>(came);
    const int64_t row = simt::block_x(), first = simt::thread_x();
    for (int64_t i = first; i < p.top_k; i += kTakeThreads) {
        const int64_t slot = row * p.top_k + i;
        const int32_t id = is_there ? p.ids[slot] : -1;
        const bool is_expert = id >= 0 && id < p.num_experts;
        p.own_ids[slot] = is_expert && p.held[id] ? id : -1;
        p.own_weights[slot] = is_there ? p.weights[slot] : 0;
        if (is_expert && p.counts) simt::global_atomic_add(reinterpret_cast<unsigned long long *>(p.counts + id), 1ull);
    }
    for (int64_t i = first * kVector; i < p.columns; i += kTakeThreads * kVector) {
        float values[kVector] = {};
        if (p.zeros) store8(p.zeros, row * p.columns + i, KRASIS_F32, values);
        if (!is_there) continue;
        load8(p.normed, row * p.columns + i, KRASIS_F32, values);
        store8(p.x, row * p.columns + i, p.dtype, values);
    }
}

struct AddParams {
    float *hidden;
    const float *x;
    int64_t count;
};

KRASIS_KERNEL(kAddThreads, 1)
add_kernel(const AddParams p) {
    simt::follow();
    const int64_t first = static_cast<int64_t>(simt::block_x()) * kAddThreads + simt::thread_x();
    add_words(p.hidden, p.x, first, p.count, static_cast<int64_t>(simt::num_blocks()) * kAddThreads);
}

bool is_flag(const uint64_t *word) { return word && reinterpret_cast<uintptr_t>(word) % sizeof(*word) == 0; }

int32_t launch_receive(const krasis_cuda_receive_args &a, void *stream) {
    const bool words = is_flag(a.flag) && is_flag(a.epoch) && is_flag(a.timeouts);
    if (!words || a.timeout_ns < 0 || a.tag == 0 || a.count < 0) return KRASIS_ERR_ARGUMENT;
    if (a.count > 0 && (!a.hidden || !a.x)) return KRASIS_ERR_ARGUMENT;
    if (a.count % 4 || !is_aligned(a.hidden) || !is_aligned(a.x)) return KRASIS_ERR_SHAPE;
    return launch_beside<receive_kernel>({1, kReceiveThreads, sizeof(int32_t)}, a, stream);
}

int32_t check_take(const krasis_cuda_take_args &a) {
    const bool words = is_flag(a.flag) && is_flag(a.epoch) && is_flag(a.timeouts);
    const bool counts = a.rows >= 0 && a.rows <= kMaxBlocks && a.columns > 0 && a.top_k > 0 && a.num_experts > 0;
    if (!words || a.timeout_ns < 0 || a.tag == 0 || !counts) return KRASIS_ERR_ARGUMENT;
    const bool tensors = a.normed && a.ids && a.weights && a.held && a.x && a.own_ids && a.own_weights;
    if (!tensors || (a.dtype != KRASIS_BF16 && a.dtype != KRASIS_F16)) return KRASIS_ERR_ARGUMENT;
    return a.columns % kVector || !is_aligned(a.normed) || !is_aligned(a.x) || !is_aligned(a.zeros) ? KRASIS_ERR_SHAPE
                                                                                                    : KRASIS_OK;
}

}  // namespace
}  // namespace krasis::cuda

int32_t krasis_cuda_advance(uint64_t *epoch, void *stream) {
    using namespace krasis::cuda;
    if (!is_flag(epoch)) return KRASIS_ERR_ARGUMENT;
    return launch_beside<advance_kernel>({1, kAdvanceThreads, 0}, EpochParams{epoch}, stream);
}

int32_t krasis_cuda_send(const krasis_cuda_send_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr || !is_flag(args->flag) || !is_flag(args->epoch)) return KRASIS_ERR_ARGUMENT;
    for (int i = 0; i < KRASIS_CUDA_SEND_PIECES; ++i) {
        const int64_t num_bytes = args->num_bytes[i];
        if (num_bytes == 0) continue;
        if (num_bytes < 0 || !args->sources[i] || !args->destinations[i]) return KRASIS_ERR_ARGUMENT;
        const auto addresses =
            reinterpret_cast<uintptr_t>(args->sources[i]) | reinterpret_cast<uintptr_t>(args->destinations[i]);
        if (num_bytes % 4 || addresses % 4) return KRASIS_ERR_SHAPE;
    }
    return launch_beside<send_kernel>({1, kSendThreads, 0}, *args, stream);
}

int32_t krasis_cuda_signal(uint64_t *flag, const uint64_t *epoch, void *stream) {
    const krasis_cuda_send_args args{{}, {}, {}, flag, epoch};
    return krasis_cuda_send(&args, stream);
}

int32_t krasis_cuda_receive(const krasis_cuda_receive_args *args, void *stream) {
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    return krasis::cuda::launch_receive(*args, stream);
}

int32_t krasis_cuda_take(const krasis_cuda_take_args *args, void *stream) {
    using namespace krasis::cuda;
    if (args == nullptr) return KRASIS_ERR_ARGUMENT;
    const int32_t status = check_take(*args);
    if (status != KRASIS_OK || args->rows == 0) return status;
    return launch_beside<take_kernel>({static_cast<unsigned>(args->rows), kTakeThreads, sizeof(int32_t)}, *args,
                                      stream);
}

int32_t krasis_cuda_wait(const uint64_t *flag, const uint64_t *epoch, int64_t timeout_ns, uint64_t *timeouts,
                         void *stream) {
    return krasis::cuda::launch_receive({flag, epoch, timeout_ns, timeouts, 1, nullptr, nullptr, 0}, stream);
}

int32_t krasis_cuda_add(float *hidden, const float *x, int64_t count, void *stream) {
    using namespace krasis::cuda;
    if (count < 0 || (count > 0 && (!hidden || !x))) return KRASIS_ERR_ARGUMENT;
    if (count % 4 || !is_aligned(hidden) || !is_aligned(x)) return KRASIS_ERR_SHAPE;
    const int64_t blocks = ceil_div(count / 4, kAddThreads);
    return launch_beside<add_kernel>({static_cast<unsigned>(blocks < 1024 ? blocks : 1024), kAddThreads, 0},
                                     AddParams{hidden, x, count}, stream);
}
