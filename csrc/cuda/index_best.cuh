// index_best.cuh: the best of a row's scores, exactly: three histograms of their bits find the last one that is taken.
#pragma once

#include "index_scores.cuh"

namespace krasis::cuda {

inline constexpr int kBestThreads = 512, kBestWarps = kBestThreads / 32, kBestEach = 4;
inline constexpr int kBestBins = 1 << 11;
// int32 [kBestBins], counts; [2][kBestWarps], sums of a warp's; the bin found, and how many of it are taken.
inline constexpr int kBestSumsAt = kBestBins, kBestFoundAt = kBestSumsAt + 2 * kBestWarps;
inline constexpr int kBestSharedBytes = 4 * (kBestFoundAt + 2);

// A number that is the larger the better a score is; both zeros are one.
KRASIS_DEVICE uint32_t rank_of(float score) {
    const uint32_t bits = float_bits(score + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Sum over the lanes up to and including this one.
KRASIS_DEVICE int sum_up_to(int value) {
    const int lane = static_cast<int>(simt::thread_x() % 32);
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = simt::shuffle_up(value, distance);
        if (lane >= distance) value += other;
    }
    return value;
}

struct BestWorker {
    const float *scores;
    int count, thread;
    int32_t *cells;
    uint32_t least = 0, known = 0;  // the high bits of the last rank that is taken, and which these are
    int left;                       // taken of those that have the known bits

    KRASIS_DEVICE BestWorker(const float *row, int num_scores, int budget)
        : scores(row), count(num_scores), left(budget) {
        thread = static_cast<int>(simt::thread_x());
        cells = reinterpret_cast<int32_t *>(simt::shared_memory());
    }

    // The bin, from the highest on, in which the last one lies. One warp.
    KRASIS_DEVICE void find_bin(int bins) const {
        int rest = left;
        for (int top = bins; top > 0; top -= 32) {
            const int bin = top - 1 - thread, own = simt::shared_load<int32_t>(cells + bin), sum = sum_up_to(own);
            if (sum >= rest && sum - own < rest) {
                simt::shared_store(cells + kBestFoundAt, bin);
                simt::shared_store(cells + kBestFoundAt + 1, rest - (sum - own));
            }
            if (simt::ballot(sum >= rest)) return;
            rest -= simt::shuffle(sum, 31);
        }
    }

    KRASIS_DEVICE void narrow(int shift, int bins) {
        for (int bin = thread; bin < bins; bin += kBestThreads) simt::shared_store(cells + bin, 0);
        simt::sync_threads();
        const auto mask = static_cast<uint32_t>(bins - 1);
        for (int i = thread; i < count; i += kBestThreads) {
            const uint32_t rank = rank_of(scores[i]);
            if ((rank & known) == least) simt::shared_atomic_add(cells + (rank >> shift & mask), 1);
        }
        simt::sync_threads();
        if (thread < 32) find_bin(bins);
        simt::sync_threads();
        least |= static_cast<uint32_t>(simt::shared_load<int32_t>(cells + kBestFoundAt)) << shift;
        left = simt::shared_load<int32_t>(cells + kBestFoundAt + 1);
        known |= mask << shift;
    }

    // Numbers of better ones (low half) and of equal ones among this thread's.
    KRASIS_DEVICE int flags(int begin) const {
        int found = 0;
        for (int i = begin; i < begin + kBestEach && i < count; ++i) {
            const uint32_t rank = rank_of(scores[i]);
            found += rank > least ? 1 : rank == least ? 1 << 16 : 0;
        }
        return found;
    }

    KRASIS_DEVICE void write(int32_t *chosen) const {
        int better = 0, equal = 0, buffer = 0;  // before the ones that are looked at
        for (int begin = 0; begin < count; begin += kBestThreads * kBestEach, buffer ^= 1) {
            const int first = begin + thread * kBestEach, own = flags(first), sum = sum_up_to(own);
            int32_t *sums = cells + kBestSumsAt + buffer * kBestWarps;
            if (thread % 32 == 31) simt::shared_store(sums + thread / 32, sum);
            simt::sync_threads();
            int at_better = better + ((sum - own) & 0xffff), at_equal = equal + ((sum - own) >> 16);
            for (int warp = 0; warp < kBestWarps; ++warp) {
                const int other = simt::shared_load<int32_t>(sums + warp);
                if (warp < thread / 32) {
                    at_better += other & 0xffff;
                    at_equal += other >> 16;
                }
                better += other & 0xffff;
                equal += other >> 16;
            }
            for (int i = first; i < first + kBestEach && i < count; ++i) {
                const uint32_t rank = rank_of(scores[i]);
                const int place = at_better + (at_equal < left ? at_equal : left);
                if (rank > least || (rank == least && at_equal < left)) chosen[place] = i;
                at_better += rank > least;
                at_equal += rank == least;
            }
        }
    }
};

// One block a row.
KRASIS_KERNEL(kBestThreads, 1)
index_best_kernel(const krasis_cuda_choose_args p) {
    const int64_t row = simt::block_x();
    const int count = index_keys(p, row);
    int32_t *chosen = p.chosen + row * p.budget;
    if (count <= p.budget) {
        for (int i = static_cast<int>(simt::thread_x()); i < count; i += kBestThreads) chosen[i] = i;
        return;
    }
    BestWorker worker(p.scores + row * p.score_columns, count, static_cast<int>(p.budget));
    worker.narrow(21, 1 << 11);
    worker.narrow(10, 1 << 11);
    worker.narrow(0, 1 << 10);
    worker.write(chosen);
}

}  // namespace krasis::cuda
