// bench_decode.h: the launches of a decoded token's layer, all experts resident: as one sequence in a graph, launch by
// launch and fused, each after the other and beside it, against the time that their bytes take.
#pragma once

#include <functional>
#include <string>

#include "bench_tools.h"

namespace bench {

struct DecodeShape {
    const char *name;
    int64_t hidden, heads, kv_heads, head_dim, experts, intermediate;
};

struct Launch {
    std::string name;
    double bytes;  // of weights
    std::function<void(int)> run;
};

// Weights of several layers, so that none is in a cache when its turn comes; the layers share their experts, of which
// each chooses others.
class DecodeLayers {
  public:
    static constexpr int kLayers = 6;
    static constexpr int64_t kCapacity = 40960, kKeys = 512, kTopK = 8;

    explicit DecodeLayers(const DecodeShape &shape)
        : s(shape),
          qkv_rows((s.heads + 2 * s.kv_heads) * s.head_dim),
          attended_size(s.heads * s.head_dim),
          w13_bytes(matrix_bytes(s.hidden, 2 * s.intermediate)),
          record_bytes(w13_bytes + matrix_bytes(s.intermediate, s.hidden)),
          qkv(kLayers * qkv_rows * s.hidden, kAnyBits, 0),
          output(kLayers * attended_size * s.hidden, kAnyBits, 0),
          // Of a trained size, so that hidden stays what it was from layer to layer.
          scales(std::max(qkv_rows, s.hidden) * 4, 0x007fffffu, 0x38000000u),
          router(kLayers * s.experts * s.hidden * 2, kValueKeep, kValueSet),
          records(s.experts * record_bytes, kAnyBits, 0),
          norm(std::max(s.hidden, s.head_dim) * 4, 0x007fffffu, 0x3f000000u),
          angles(kCapacity * s.head_dim * 4, 0x007fffffu, 0x3f000000u),
          cache(kLayers * 2 * s.kv_heads * kCapacity * s.head_dim * 2, kValueKeep, kValueSet),
          hidden(s.hidden * 4, 0x807fffffu, 0x3f800000u),
          x(s.hidden * 2, 0, 0),
          normed(s.hidden * 4, 0, 0),
          q(qkv_rows * 2, 0, 0),
          attended(attended_size * 2, 0, 0),
          logits(s.experts * 4, 0, 0),
          gated(kTopK * s.intermediate * 2, 0, 0),
          slots(kTopK * s.hidden * 2, 0, 0),
          workspace(krasis_cuda_attention_workspace_bytes(1, s.heads, s.head_dim, kCapacity), 0, 0),
          table(static_cast<size_t>(s.experts + kLayers * kTopK)),
          position(1, kKeys - 1),
          ids(kTopK),
          weights(kTopK),
          sorted(kTopK * 16),
          blocks(kTopK),
          first(static_cast<size_t>(s.experts) + 1),
          counts(static_cast<size_t>(s.experts)),
          invalid(1),
          arrivals(static_cast<size_t>(s.hidden / 64) + 1) {
        for (size_t e = 0; e < table.size(); ++e) {
            uint8_t *record = records.data() + static_cast<int64_t>(e) % s.experts * record_bytes;
            table[e] = record;
            if (e >= static_cast<size_t>(s.experts)) continue;
            set_scales(record + s.hidden * s.intermediate, w13_bytes - s.hidden * s.intermediate);
            set_scales(record + w13_bytes + s.hidden * s.intermediate / 2,
                       record_bytes - w13_bytes - s.hidden * s.intermediate / 2);
        }
        table.upload();
        position.upload();
        arrivals.upload();
        ids.upload();
        weights.upload();
    }

    std::vector<Launch> apart() {
        return {
            {"norm", 0, [this](int) { run_norm(x.data(), KRASIS_BF16); }},
            {"qkv", qkv_bytes(), [this](int layer) { run_dense(layer, true); }},
            {"q/k norm, rope, store", 0, [this](int layer) { run_rope(layer); }},
            {"attention", keys_bytes(), [this](int layer) { run_attention(layer); }},
            {"output + hidden", output_bytes(), [this](int layer) { run_dense(layer, false); }},
            {"norm (f32)", 0, [this](int) { run_norm(normed.data(), KRASIS_F32); }},
            {"router", router_bytes(), [this](int layer) { run_router(layer); }},
            {"route", 0, [this](int) { run_route(); }},
            {"norm again", 0, [this](int) { run_norm(x.data(), KRASIS_BF16); }},
            {"align (2)", 0, [this](int) { run_align(); }},
            {"gate, up", experts_bytes(w13_bytes), [this](int layer) { run_experts(layer, true, false); }},
            {"down", experts_bytes(record_bytes - w13_bytes), [this](int layer) { run_experts(layer, false, false); }},
            {"sum + hidden", 0, [this](int) { run_sum(); }}};
    }

    std::vector<Launch> fused() {
        return {{"norm, qkv", qkv_bytes(), [this](int layer) { run_norm_qkv(layer); }},
                {"q/k norm, rope, store", 0, [this](int layer) { run_rope(layer); }},
                {"attention", keys_bytes(), [this](int layer) { run_attention(layer); }},
                {"output + hidden", output_bytes(), [this](int layer) { run_dense(layer, false); }},
                {"norm, router, route", router_bytes(), [this](int layer) { run_norm_route(layer); }},
                {"gate, up", experts_bytes(w13_bytes), [this](int layer) { run_experts(layer, true, true); }},
                {"down, sum + hidden", experts_bytes(record_bytes - w13_bytes),
                 [this](int layer) { run_experts(layer, false, true); }}};
    }

    DecodeShape s;

  private:
    static int64_t matrix_bytes(int64_t k, int64_t n) { return k * n / 2 + k / 128 * n * 2; }
    static void set_scales(uint8_t *at, int64_t bytes) {
        fill_kernel<<<64, 256>>>(reinterpret_cast<uint32_t *>(at), bytes / 4, kValueKeep, 0x38003800u);
    }
    double qkv_bytes() const { return static_cast<double>(qkv_rows * s.hidden); }
    double output_bytes() const { return static_cast<double>(attended_size * s.hidden); }
    double router_bytes() const { return static_cast<double>(2 * s.experts * s.hidden); }
    double keys_bytes() const { return 4.0 * static_cast<double>(s.kv_heads * kKeys * s.head_dim); }
    static double experts_bytes(int64_t each) { return static_cast<double>(kTopK * each); }

    void run_norm(void *out, int32_t dtype) {
        const krasis_cuda_rms_norm_args a{hidden.data(), norm.data(), out,   1,    s.hidden,
                                          KRASIS_F32,    KRASIS_F32,  dtype, 1e-6f};
        CHECK_OK(krasis_cuda_rms_norm(&a, stream()));
    }

    void run_dense(int layer, bool is_qkv) {
        krasis_cuda_int8_gemm_args a{};
        a.x = is_qkv ? x.data() : attended.data();
        a.x_stride = a.k = is_qkv ? s.hidden : attended_size;
        a.tokens = 1;
        a.n = a.out_stride = is_qkv ? qkv_rows : s.hidden;
        a.dtype = KRASIS_BF16;
        a.out_dtype = is_qkv ? KRASIS_BF16 : KRASIS_F32;
        a.weight = reinterpret_cast<const int8_t *>((is_qkv ? qkv : output).data() + layer * a.k * a.n);
        a.scales = reinterpret_cast<const float *>(scales.data());
        a.residual = is_qkv ? nullptr : hidden.data();
        a.out = is_qkv ? q.data() : hidden.data();
        CHECK_OK(krasis_cuda_int8_gemm(&a, stream()));
    }

    void run_norm_qkv(int layer) {
        const krasis_cuda_norm_int8_args a{reinterpret_cast<const float *>(hidden.data()),
                                           norm.data(),
                                           s.hidden,
                                           qkv_rows,
                                           KRASIS_F32,
                                           KRASIS_BF16,
                                           KRASIS_BF16,
                                           1e-6f,
                                           reinterpret_cast<const int8_t *>(qkv.data() + layer * qkv_rows * s.hidden),
                                           reinterpret_cast<const float *>(scales.data()),
                                           q.data()};
        CHECK_OK(krasis_cuda_norm_int8_gemv(&a, stream()));
    }

    uint8_t *keys_of(int layer, int part) const {
        return cache.data() + (2 * layer + part) * s.kv_heads * kCapacity * s.head_dim * 2;
    }

    void run_rope(int layer) {
        krasis_cuda_qkv_args a{};
        a.qkv = q.data();
        a.tokens = 1;
        a.num_heads = s.heads;
        a.num_kv_heads = s.kv_heads;
        a.head_dim = a.rotary_dims = s.head_dim;
        a.q_norm = a.k_norm = norm.data();
        a.dtype = KRASIS_BF16;
        a.norm_dtype = KRASIS_F32;
        a.eps = 1e-6f;
        a.cos = a.sin = reinterpret_cast<const float *>(angles.data());
        a.max_positions = a.capacity = kCapacity;
        a.k_cache = keys_of(layer, 0);
        a.v_cache = keys_of(layer, 1);
        a.start_device = position.device();
        CHECK_OK(krasis_cuda_qk_norm_rope_store(&a, stream()));
    }

    void run_attention(int layer) {
        krasis_cuda_attention_args a{};
        a.q = q.data();
        a.k_cache = keys_of(layer, 0);
        a.v_cache = keys_of(layer, 1);
        a.out = attended.data();
        a.position = position.device();
        a.num_heads = s.heads;
        a.num_kv_heads = s.kv_heads;
        a.head_dim = s.head_dim;
        a.capacity = kCapacity;
        a.dtype = KRASIS_BF16;
        a.scale = 0.05f;
        a.workspace = workspace.data();
        a.workspace_bytes = krasis_cuda_attention_workspace_bytes(1, s.heads, s.head_dim, kCapacity);
        a.num_rows = 1;
        CHECK_OK(krasis_cuda_attention_decode(&a, stream()));
    }

    void run_router(int layer) {
        const krasis_cuda_router_args a{reinterpret_cast<const float *>(normed.data()),
                                        router.data() + layer * s.experts * s.hidden * 2,
                                        reinterpret_cast<float *>(logits.data()),
                                        1,
                                        s.hidden,
                                        s.experts,
                                        KRASIS_BF16,
                                        0};
        CHECK_OK(krasis_cuda_router(&a, stream()));
    }

    krasis_cuda_route_args route_args() {
        krasis_cuda_route_args a{};
        a.logits = reinterpret_cast<float *>(logits.data());
        a.tokens = 1;
        a.num_experts = s.experts;
        a.top_k = kTopK;
        a.normalize = 1;
        a.ids = ids.device();
        a.weights = weights.device();
        a.scale = 1;
        a.groups = a.top_groups = 1;
        return a;
    }

    void run_route() {
        const krasis_cuda_route_args a = route_args();
        CHECK_OK(krasis_cuda_route(&a, stream()));
    }

    void run_norm_route(int layer) {
        krasis_cuda_norm_route_args a{};
        a.hidden = reinterpret_cast<const float *>(hidden.data());
        a.norm = norm.data();
        a.x = x.data();
        a.normed = reinterpret_cast<float *>(normed.data());
        a.weight = router.data() + layer * s.experts * s.hidden * 2;
        a.k = s.hidden;
        a.norm_dtype = KRASIS_F32;
        a.x_dtype = a.weight_dtype = KRASIS_BF16;
        a.eps = 1e-6f;
        a.arrivals = arrivals.device();
        a.route = route_args();
        CHECK_OK(krasis_cuda_norm_route(&a, stream()));
    }

    void run_align() {
        const krasis_cuda_align_args a{ids.device(),
                                       kTopK,
                                       static_cast<int32_t>(s.experts),
                                       16,
                                       sorted.device(),
                                       blocks.device(),
                                       first.device(),
                                       counts.device(),
                                       invalid.device()};
        CHECK_OK(krasis_cuda_moe_align(&a, stream()));
    }

    void run_experts(int layer, bool is_gated, bool is_named) {
        krasis_cuda_moe_gemm_args a{};
        a.activations = is_gated ? x.data() : gated.data();
        a.activation_stride = a.k = is_gated ? s.hidden : s.intermediate;
        a.slots_per_row = is_gated ? kTopK : 1;
        a.dtype = a.scale_dtype = a.out_dtype = KRASIS_BF16;
        a.gated = is_gated;
        a.expert_base = table.device() + layer * kTopK;  // others, should ids be the same
        a.codes_offset = is_gated ? 0 : w13_bytes;
        a.n = is_gated ? 2 * s.intermediate : s.hidden;
        a.scales_offset = a.codes_offset + a.k * a.n / 2;
        a.m_block = 16;
        a.group = 128;
        a.num_slots = kTopK;
        a.num_experts = a.expert_end = static_cast<int32_t>(s.experts);
        a.sorted_slots = sorted.device();
        a.block_experts = blocks.device();
        a.first_block = first.device();
        a.out = is_gated ? gated.data() : slots.data();
        a.out_stride = is_gated ? s.intermediate : s.hidden;
        if (is_named) {
            a.ids = ids.device();
            a.top_k = kTopK;
            a.slot_weights = weights.device();
            a.arrivals = arrivals.device() + 1;
            a.hidden = is_gated ? nullptr : reinterpret_cast<float *>(hidden.data());
        }
        CHECK_OK(krasis_cuda_moe_gemm(&a, stream()));
    }

    void run_sum() {
        krasis_cuda_moe_reduce_args a{};
        a.slots = slots.data();
        a.slots_dtype = KRASIS_BF16;
        a.out_dtype = KRASIS_F32;
        a.ids = ids.device();
        a.weights = weights.device();
        a.residual = a.out = hidden.data();
        a.tokens = 1;
        a.top_k = kTopK;
        a.n = s.hidden;
        a.num_experts = static_cast<int32_t>(s.experts);
        CHECK_OK(krasis_cuda_moe_reduce(&a, stream()));
    }

    int64_t qkv_rows, attended_size, w13_bytes, record_bytes;
    Buffer qkv, output, scales, router, records, norm, angles, cache, hidden, x, normed, q, attended, logits, gated,
        slots, workspace;
    test::Array<const void *> table;
    test::Array<int64_t> position;
    test::Array<int32_t> ids;
    test::Array<float> weights;
    test::Array<int32_t> sorted, blocks, first, counts, invalid;
    test::Array<uint32_t> arrivals;
};

// Microseconds a layer of a sequence without its launch `left_out` (-1: whole), or of that launch alone.
inline double layer_us(const std::vector<Launch> &launches, int left_out, bool alone = false) {
    const double seconds = median_seconds([&] {
        for (int layer = 0; layer < DecodeLayers::kLayers; ++layer) {
            for (int i = 0; i < static_cast<int>(launches.size()); ++i) {
                if ((i == left_out) == alone) launches[static_cast<size_t>(i)].run(layer);
            }
        }
    });
    return seconds * 1e6 / DecodeLayers::kLayers;
}

static __global__ void read_kernel(const uint4 *from, int64_t count, uint32_t *out) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    uint32_t sum = 0;
#pragma unroll 8
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
        const uint4 words = __ldcs(from + i);
        sum ^= words.x ^ words.y ^ words.z ^ words.w;
    }
    if (sum == 77u) *out = sum;
}

inline double read_rate(int multiprocessors) {
    constexpr int64_t kBytes = int64_t{1} << 30;
    Buffer from(kBytes, kAnyBits, 0), out(256, 0, 0);
    const double seconds = median_seconds([&] {
        read_kernel<<<multiprocessors * 8, 256, 0, stream()>>>(reinterpret_cast<const uint4 *>(from.data()),
                                                               kBytes / 16, reinterpret_cast<uint32_t *>(out.data()));
    });
    return kBytes / seconds;
}

inline void bench_sequence(const char *shape, const char *kind, const std::vector<Launch> &launches, double rate) {
    double bytes = 0;
    for (const Launch &launch : launches) bytes += launch.bytes;
    const double floor_us = bytes / rate * 1e6;
    for (bool beside : {false, true}) {
        krasis::simt::launches_beside = beside;
        const double whole = layer_us(launches, -1);
        std::printf("decode %-5s %-6s %-12s: %6.1f us a layer, its %.1f MB take %.1f us: %.2f times that\n", shape,
                    kind, beside ? "overlapping" : "in turn", whole, bytes * 1e-6, floor_us, whole / floor_us);
        for (int i = 0; i < static_cast<int>(launches.size()); ++i) {
            const Launch &launch = launches[static_cast<size_t>(i)];
            const double alone = layer_us(launches, i, true), without = layer_us(launches, i);
            std::printf("    %-22s alone %5.1f us, %5.0f GB/s; adds %5.1f us\n", launch.name.c_str(), alone,
                        launch.bytes / alone * 1e-3, whole - without);
        }
        std::fflush(stdout);
    }
    krasis::simt::launches_beside = true;
}

inline void bench_decode(int multiprocessors) {
    const double rate = read_rate(multiprocessors);
    std::printf("decode: memory is read at %.0f GB/s\n", rate * 1e-9);
    for (const DecodeShape &shape :
         {DecodeShape{"235b", 4096, 64, 4, 128, 128, 1536}, DecodeShape{"30b", 2048, 32, 4, 128, 128, 768}}) {
        DecodeLayers layers(shape);
        bench_sequence(shape.name, "apart", layers.apart(), rate);
        bench_sequence(shape.name, "fused", layers.fused(), rate);
    }
}

}  // namespace bench
