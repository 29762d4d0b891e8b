// test_handover.cpp: epochs, flags and the values that travel with them, with a second thread as the other side.
#include <chrono>
#include <thread>
#include <vector>

#include "array.h"
#include "krasis_cuda.h"
#include "numeric.h"
#include "suites.h"

namespace test {
namespace {

constexpr int64_t kSecond = 1000000000;

// Host memory that kernels address directly.
template <class T>
class Pinned {
  public:
    explicit Pinned(size_t count, T value = T{}) : size_(count) {
#if KRASIS_SIMT_DEVICE
        CHECK_CUDA(cudaHostAlloc(&data_, count * sizeof(T), cudaHostAllocPortable));
#else
        data_ = static_cast<T *>(::operator new(count * sizeof(T), std::align_val_t{256}));
#endif
        for (size_t i = 0; i < count; ++i) data_[i] = value;
    }
    ~Pinned() {
#if KRASIS_SIMT_DEVICE
        cudaFreeHost(data_);
#else
        ::operator delete(data_, std::align_val_t{256});
#endif
    }
    Pinned(const Pinned &) = delete;
    Pinned &operator=(const Pinned &) = delete;
    T &operator[](size_t i) { return data_[i]; }
    T *data() { return data_; }
    size_t size() const { return size_; }

  private:
    T *data_ = nullptr;
    size_t size_;
};

void finish_stream() {
#if KRASIS_SIMT_DEVICE
    CHECK_CUDA(cudaDeviceSynchronize());
#endif
}

uint64_t load(uint64_t &word) { return __atomic_load_n(&word, __ATOMIC_ACQUIRE); }
void store(uint64_t &word, uint64_t value) { __atomic_store_n(&word, value, __ATOMIC_RELEASE); }
void wait_for(uint64_t &word, uint64_t value) {
    while (load(word) < value) std::this_thread::yield();
}

void check_epochs() {
    Array<uint64_t> epoch(1, 41);
    Pinned<uint64_t> flag(2, 0);
    uint64_t *on_device = epoch.upload();
    CHECK_OK(krasis_cuda_advance(on_device, nullptr));
    CHECK_OK(krasis_cuda_signal(flag.data(), on_device, nullptr));
    CHECK_OK(krasis_cuda_advance(on_device, nullptr));
    finish_stream();
    CHECK(flag[0] == 42 && flag[1] == 0);
    CHECK_OK(krasis_cuda_signal(flag.data() + 1, on_device, nullptr));
    finish_stream();
    CHECK(flag[0] == 42 && flag[1] == 43);
}

// Sizes that are and are not whole 16-byte words, and addresses that are not.
void check_send() {
    Random random(1);
    constexpr size_t kSizes[] = {4100, 8, 3, 0};
    constexpr size_t kOffsets[] = {0, 4200, 4301, 4400};
    Array<uint32_t> source(5000);
    for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<uint32_t>(random.next());
    Pinned<uint32_t> sent(5000, 0xabababab);
    Array<uint64_t> epoch(1, 7);
    Pinned<uint64_t> flag(1, 0);
    krasis_cuda_send_args args{};
    uint32_t *from = source.upload();
    for (int i = 0; i < 4; ++i) {
        args.sources[i] = from + kOffsets[i];
        args.destinations[i] = sent.data() + kOffsets[i];
        args.num_bytes[i] = static_cast<int64_t>(4 * kSizes[i]);
    }
    args.flag = flag.data();
    args.epoch = epoch.upload();
    CHECK_OK(krasis_cuda_send(&args, nullptr));
    wait_for(flag[0], 7);
    std::vector<char> covered(sent.size(), 0);
    for (int i = 0; i < 4; ++i) {
        for (size_t j = 0; j < kSizes[i]; ++j) covered[kOffsets[i] + j] = 1;
    }
    for (size_t i = 0; i < sent.size(); ++i) CHECK(sent[i] == (covered[i] ? source[i] : 0xabababab));
    finish_stream();

    auto wrong = args;
    wrong.num_bytes[1] = 6;
    CHECK(krasis_cuda_send(&wrong, nullptr) == KRASIS_ERR_SHAPE);
    wrong = args;
    wrong.destinations[0] = nullptr;
    CHECK(krasis_cuda_send(&wrong, nullptr) == KRASIS_ERR_ARGUMENT);
    wrong = args;
    wrong.flag = nullptr;
    CHECK(krasis_cuda_send(&wrong, nullptr) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_cuda_send(nullptr, nullptr) == KRASIS_ERR_ARGUMENT);
}

void check_add() {
    for (int64_t count : {4, 1024, 400004}) {
        const auto size = static_cast<size_t>(count);
        Array<float> hidden(size);
        Pinned<float> x(size);
        for (size_t i = 0; i < size; ++i) hidden[i] = static_cast<float>(i), x[i] = 0.5f;
        CHECK_OK(krasis_cuda_add(hidden.upload(), x.data(), count, nullptr));
        hidden.download();
        for (size_t i = 0; i < size; ++i) CHECK(hidden[i] == static_cast<float>(i) + 0.5f);
    }
    Array<float> hidden(8);
    CHECK(krasis_cuda_add(hidden.upload(), hidden.device(), 6, nullptr) == KRASIS_ERR_SHAPE);
    CHECK(krasis_cuda_add(nullptr, hidden.device(), 8, nullptr) == KRASIS_ERR_ARGUMENT);
    CHECK_OK(krasis_cuda_add(nullptr, nullptr, 0, nullptr));
}

// Layers as decode has them: the device sends a row, the other side answers, the device adds the answer. All values
// are whole numbers that a float holds.
void check_round_trips() {
    constexpr size_t kCount = 260;
    constexpr uint64_t kRounds = 30;
    Array<float> hidden(kCount, 1.0f);
    Array<uint64_t> epoch(1, 0);
    Pinned<float> out(kCount), in(kCount);
    Pinned<uint64_t> there(1, 0), back(1, 0), timeouts(1, 0);
    float *row = hidden.upload();
    uint64_t *counter = epoch.upload();
    auto expected = [](size_t i, uint64_t rounds) {
        return static_cast<float>(1 + rounds * i + rounds * (rounds + 1) / 2);
    };
    bool in_step = true;
    std::thread other([&] {
        for (uint64_t round = 1; round <= kRounds; ++round) {
            wait_for(there[0], round);
            for (size_t i = 0; i < kCount; ++i) in_step &= out[i] == expected(i, round - 1);
            for (size_t i = 0; i < kCount; ++i) in[i] = static_cast<float>(i + round);
            if (round % 8 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
            store(back[0], round);
        }
    });
    const krasis_cuda_send_args send{{row}, {out.data()}, {kCount * sizeof(float)}, there.data(), counter};
    const krasis_cuda_receive_args receive{back.data(), counter, 20 * kSecond, timeouts.data(),
                                           5,           row,     in.data(),    kCount};
    for (uint64_t round = 1; round <= 24; ++round) {
        CHECK_OK(krasis_cuda_advance(counter, nullptr));
        CHECK_OK(krasis_cuda_send(&send, nullptr));
        CHECK_OK(krasis_cuda_receive(&receive, nullptr));
    }
    for (uint64_t round = 25; round <= kRounds; ++round) {  // the same in parts
        CHECK_OK(krasis_cuda_advance(counter, nullptr));
        CHECK_OK(krasis_cuda_send(&send, nullptr));
        CHECK_OK(krasis_cuda_wait(back.data(), counter, 20 * kSecond, timeouts.data(), nullptr));
        CHECK_OK(krasis_cuda_add(row, in.data(), kCount, nullptr));
    }
    finish_stream();
    other.join();
    CHECK(in_step && timeouts[0] == 0);
    hidden.download();
    for (size_t i = 0; i < kCount; ++i) CHECK(hidden[i] == expected(i, kRounds));
}

void check_timeouts() {
    Array<float> hidden(8, 1.0f);
    Array<uint64_t> epoch(1, 3);
    Pinned<float> x(8, 5.0f);
    Pinned<uint64_t> flag(1, 2), timeouts(1, 0);
    krasis_cuda_receive_args args{flag.data(), epoch.upload(),  kSecond / 100, timeouts.data(),
                                  6,           hidden.upload(), x.data(),      8};
    auto seconds = [&] {
        const auto start = std::chrono::steady_clock::now();
        CHECK_OK(krasis_cuda_receive(&args, nullptr));
        finish_stream();
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    CHECK(seconds() >= 0.01);
    CHECK(timeouts[0] == 6);
    args.timeout_ns = 600 * kSecond;  // the first timeout ends all waits
    CHECK(seconds() < 60);
    CHECK(timeouts[0] == 6);
    hidden.download();
    for (size_t i = 0; i < 8; ++i) CHECK(hidden[i] == 1.0f);
    timeouts[0] = 0;
    flag[0] = 4;  // past the epoch is as good
    CHECK(seconds() < 60);
    CHECK(timeouts[0] == 0);
    hidden.download();
    for (size_t i = 0; i < 8; ++i) CHECK(hidden[i] == 6.0f);
    CHECK_OK(krasis_cuda_wait(flag.data(), epoch.device(), 0, timeouts.data(), nullptr));
    flag[0] = 0;
    CHECK_OK(krasis_cuda_wait(flag.data(), epoch.device(), 0, timeouts.data(), nullptr));
    finish_stream();
    CHECK(timeouts[0] == 1);

    args.tag = 0;
    CHECK(krasis_cuda_receive(&args, nullptr) == KRASIS_ERR_ARGUMENT);
    args.tag = 1;
    args.count = 6;
    CHECK(krasis_cuda_receive(&args, nullptr) == KRASIS_ERR_SHAPE);
    CHECK(krasis_cuda_wait(flag.data(), epoch.device(), -1, timeouts.data(), nullptr) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_cuda_wait(flag.data(), nullptr, 1, timeouts.data(), nullptr) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_cuda_advance(nullptr, nullptr) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_cuda_signal(nullptr, epoch.device(), nullptr) == KRASIS_ERR_ARGUMENT);
}

// Two rows of another rank, more columns than a block has threads times eight: only experts held here stay, all are
// counted; a flag that does not come leaves no expert at all.
void check_take() {
    constexpr int64_t kRows = 2, kColumns = 4104, kTopK = 3;
    constexpr int32_t kIds[] = {4, 0, 2, 1, 4, -1}, kOwn[] = {4, -1, 2, -1, 4, -1};
    Pinned<float> normed(kRows * kColumns, 0.0f), weights(kRows * kTopK, 0.0f);
    Pinned<int32_t> ids(kRows * kTopK, 0);
    for (size_t i = 0; i < kRows * kColumns; ++i) normed[i] = 0.25f * static_cast<float>(static_cast<int>(i % 37) - 18);
    for (size_t i = 0; i < kRows * kTopK; ++i) {
        ids[i] = kIds[i];
        weights[i] = 1.0f + static_cast<float>(i);
    }
    Array<uint8_t> held(5, 0);
    held[2] = held[4] = 1;
    Array<uint64_t> epoch(1, 7);
    Pinned<uint64_t> flag(1, 7), timeouts(1, 0);
    Array<uint16_t> x(kRows * kColumns);
    Array<int32_t> own_ids(kRows * kTopK, 9);
    Array<float> own_weights(kRows * kTopK, 9.0f);
    Array<int64_t> counts(5, 10);
    Array<float> zeros(kRows * kColumns, 9.0f);
    krasis_cuda_take_args args{flag.data(),
                               epoch.upload(),
                               kSecond / 100,
                               timeouts.data(),
                               3,
                               normed.data(),
                               ids.data(),
                               weights.data(),
                               held.upload(),
                               kRows,
                               kColumns,
                               kTopK,
                               5,
                               KRASIS_BF16,
                               x.upload(),
                               own_ids.upload(),
                               own_weights.upload(),
                               counts.upload(),
                               zeros.upload()};
    CHECK_OK(krasis_cuda_take(&args, nullptr));
    finish_stream();
    x.download();
    own_ids.download();
    own_weights.download();
    counts.download();
    zeros.download();
    for (size_t i = 0; i < kRows * kColumns; ++i) CHECK(zeros[i] == 0.0f);
    for (size_t i = 0; i < kRows * kColumns; ++i) CHECK(x[i] == krasis::bf16_from_float(normed[i]));
    for (size_t i = 0; i < kRows * kTopK; ++i) CHECK(own_ids[i] == kOwn[i] && own_weights[i] == weights[i]);
    constexpr int64_t kCounts[] = {11, 11, 11, 10, 12};
    for (size_t i = 0; i < 5; ++i) CHECK(counts[i] == kCounts[i]);

    flag[0] = 6;
    args.counts = nullptr;
    args.zeros = nullptr;
    CHECK_OK(krasis_cuda_take(&args, nullptr));
    finish_stream();
    own_ids.download();
    own_weights.download();
    CHECK(timeouts[0] == 3);
    for (size_t i = 0; i < kRows * kTopK; ++i) CHECK(own_ids[i] == -1 && own_weights[i] == 0.0f);

    args.columns = 4100;
    CHECK(krasis_cuda_take(&args, nullptr) == KRASIS_ERR_SHAPE);
    args.columns = kColumns;
    args.dtype = KRASIS_F32;
    CHECK(krasis_cuda_take(&args, nullptr) == KRASIS_ERR_ARGUMENT);
    args.dtype = KRASIS_F16;
    args.tag = 0;
    CHECK(krasis_cuda_take(&args, nullptr) == KRASIS_ERR_ARGUMENT);
    CHECK(krasis_cuda_take(nullptr, nullptr) == KRASIS_ERR_ARGUMENT);
}

#if !KRASIS_SIMT_DEVICE
// Without the barrier, threads would add before the first one has seen the flag.
void check_races() {
    Array<float> hidden(8, 1.0f), x(8, 1.0f);
    Array<uint64_t> epoch(1, 0), flag(1, 0), timeouts(1, 0);
    const krasis_cuda_receive_args args{flag.upload(),   epoch.upload(), 0, timeouts.upload(), 1,
                                        hidden.upload(), x.upload(),     8};
    krasis::simt::planned_fault = {krasis::simt::Fault::kNoBarrier, 0};
    CHECK(krasis_cuda_receive(&args, nullptr) == KRASIS_ERR_CUDA);
    krasis::simt::planned_fault = {};
}
#endif

}  // namespace

void run_handover() {
    check_epochs();
    check_send();
    check_add();
    check_round_trips();
    check_timeouts();
    check_take();
#if !KRASIS_SIMT_DEVICE
    check_races();
#endif
}

}  // namespace test
