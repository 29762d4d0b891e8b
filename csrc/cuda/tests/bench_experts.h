// bench_experts.h: the grouped product at 1 to 2048 rows an expert, for every size of row block that makes sense there,
// beside the library's way: weights unpacked, rows gathered, products elsewhere (scripts/device), rows scattered.
#pragma once

#include "bench_tools.h"

namespace bench {

struct Model {
    const char *name;
    int64_t hidden, intermediate;
    bool mxfp4;
};

// Slots of experts drawn so that each has `rows`, sorted by the real kernel.
struct Routing {
    int64_t num_slots;
    int32_t num_experts, m_block;
    test::Array<int32_t> ids, sorted, blocks, first, counts, invalid;

    Routing(int64_t rows, int32_t experts, int32_t block)
        : num_slots(rows * experts),
          num_experts(experts),
          m_block(block),
          ids(static_cast<size_t>(num_slots)),
          sorted(static_cast<size_t>(krasis_cuda_align_max_blocks(num_slots, experts, m_block) * m_block)),
          blocks(static_cast<size_t>(krasis_cuda_align_max_blocks(num_slots, experts, m_block))),
          first(static_cast<size_t>(experts) + 1),
          counts(static_cast<size_t>(experts)),
          invalid(1) {
        for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i * 7 % static_cast<size_t>(experts));
        ids.upload();
    }

    void sort() {
        const krasis_cuda_align_args args{ids.device(),   num_slots,       num_experts,
                                          m_block,        sorted.device(), blocks.device(),
                                          first.device(), counts.device(), invalid.device()};
        CHECK_OK(krasis_cuda_moe_align(&args, stream()));
    }
};

struct Product {
    const Routing &routing;
    int64_t k, n, record_bytes;
    bool gated, mxfp4;
    Buffer records, activations, out;
    test::Array<const void *> table;

    Product(Routing &r, int64_t num_k, int64_t num_n, bool is_gated, bool is_mxfp4, int64_t num_records = 0)
        : routing(r),
          k(num_k),
          n(num_n),
          record_bytes(k * n / 2 + (is_mxfp4 ? k / 32 * n : k / 128 * n * 2)),
          gated(is_gated),
          mxfp4(is_mxfp4),
          records(record_bytes * std::max<int64_t>(num_records, r.num_experts), kAnyBits, 0),
          activations(r.num_slots / (gated ? kTopK : 1) * k * 2, kValueKeep, kValueSet),
          out(r.num_slots * n * 2, 0, 0),
          table(static_cast<size_t>(std::max<int64_t>(num_records, r.num_experts))) {
        for (int64_t e = 0; e < static_cast<int64_t>(table.size()); ++e) {
            uint8_t *record = records.data() + e * record_bytes;
            table[static_cast<size_t>(e)] = record;
            // Exponents of 116 to 119, or scales as bf16.
            fill_kernel<<<64, 256>>>(reinterpret_cast<uint32_t *>(record + k * n / 2), (record_bytes - k * n / 2) / 4,
                                     mxfp4 ? 0x03030303u : kValueKeep, mxfp4 ? 0x74747474u : kScaleSet);
        }
        table.upload();
    }

    // first_expert: whose weights the slots of expert 0 take, and so on.
    void run(int64_t first_expert = 0) {
        krasis_cuda_moe_gemm_args a{};
        a.activations = activations.data();
        a.activation_stride = k;
        a.slots_per_row = gated ? kTopK : 1;
        a.dtype = a.scale_dtype = a.out_dtype = KRASIS_BF16;
        a.gated = gated;
        a.expert_base = table.device() + first_expert;
        a.scales_offset = k * n / 2;
        a.m_block = routing.m_block;
        a.group = mxfp4 ? 32 : 128;
        if (mxfp4) a.scale_dtype = KRASIS_CUDA_E8M0;
        a.k = k;
        a.n = n;
        a.num_slots = routing.num_slots;
        a.num_experts = a.expert_end = routing.num_experts;
        a.sorted_slots = const_cast<Routing &>(routing).sorted.device();
        a.block_experts = const_cast<Routing &>(routing).blocks.device();
        a.first_block = const_cast<Routing &>(routing).first.device();
        a.out = out.data();
        a.out_stride = gated ? n / 2 : n;
        CHECK_OK(krasis_cuda_moe_gemm(&a, stream()));
    }

    double flops() const { return 2.0 * static_cast<double>(routing.num_slots) * static_cast<double>(k * n); }
    double weight_bytes() const { return static_cast<double>(record_bytes) * routing.num_experts; }
};

inline void bench_grouped(const Model &model, int64_t rows, int32_t m_block, double peak) {
    // Few experts where there are many rows, to bound the time; always more weights than fit the L2 cache.
    const int32_t experts = rows <= 256 ? 128 : 32;
    Routing routing(rows, experts, m_block);
    const double sort_s = median_seconds([&] { routing.sort(); });
    Product gate_up(routing, model.hidden, 2 * model.intermediate, true, model.mxfp4),
        down(routing, model.intermediate, model.hidden, false, model.mxfp4);
    const double gate_up_s = median_seconds([&] { gate_up.run(); }), down_s = median_seconds([&] { down.run(); });
    const double both = (gate_up.flops() + down.flops()) / (gate_up_s + down_s);
    std::printf(
        "%-10s %4lld rows x %3d experts, m_block %3d%c: sort %5.1f us, w13 %8.1f us %5.1f TFLOP/s %4.0f GB/s, "
        "w2 %8.1f us %5.1f TFLOP/s %4.0f GB/s, both %5.1f TFLOP/s = %4.1f %% of mma.sync\n",
        model.name, static_cast<long long>(rows), experts, m_block,
        m_block == krasis_cuda_moe_m_block(rows * experts, experts) ? '*' : ' ', sort_s * 1e6, gate_up_s * 1e6,
        gate_up.flops() / gate_up_s * 1e-12, gate_up.weight_bytes() / gate_up_s * 1e-9, down_s * 1e6,
        down.flops() / down_s * 1e-12, down.weight_bytes() / down_s * 1e-9, both * 1e-12, 100 * both / peak);
    std::fflush(stdout);
}

// One token's experts, each time others of 128: no cache holds their weights.
inline void bench_token(const Model &model) {
    constexpr int32_t kRecords = 128;
    Routing routing(1, kTopK, krasis_cuda_moe_m_block(kTopK, kRecords));
    routing.sort();
    Product gate_up(routing, model.hidden, 2 * model.intermediate, true, model.mxfp4, kRecords),
        down(routing, model.intermediate, model.hidden, false, model.mxfp4, kRecords);
    int64_t turn = 0;
    const auto next = [&] { return turn++ * kTopK % kRecords; };
    const double gate_up_s = median_seconds([&] { gate_up.run(next()); });
    const double down_s = median_seconds([&] { down.run(next()); });
    std::printf("%-10s one token, %d experts: w13 %6.1f us %5.0f GB/s, w2 %6.1f us %5.0f GB/s\n", model.name, kTopK,
                gate_up_s * 1e6, gate_up.weight_bytes() / gate_up_s * 1e-9, down_s * 1e6,
                down.weight_bytes() / down_s * 1e-9);
}

// The star marks what krasis_cuda_moe_m_block chooses.
inline void bench_experts(bool quick, double peak) {
    const Model models[] = {
        {"qwen3-30b", 2048, 768, false}, {"qwen3-235b", 4096, 1536, false}, {"gpt-oss", 2880, 2880, true}};
    for (const Model &model : models) {
        bench_token(model);
        for (int64_t rows : {1, 4, 8, 16, 32, 64, 128, 256, 625, 1024, 2048}) {
            if (quick && rows != 1 && rows != 64 && rows != 625) continue;
            for (int32_t m_block : {16, 32, 64, 128}) {
                const bool small = m_block >= rows / 16, large = m_block < 2 * rows || m_block == 16;
                if (small && large) bench_grouped(model, rows, m_block, peak);
            }
        }
    }
}

}  // namespace bench
