// moe.cpp: routed experts: groups (token, slot) pairs by expert and deals the strips of the experts to the pool.
//
// One job per chunk of tokens: regroup activations -> gate/up strips -> per range of output columns: down strips,
// weighted sum in slot order. A chunk is a few thousand tokens, so that the workspace stays bounded.
#include "moe.h"

#include <cstring>

#include "activation.h"
#include "acts.h"
#include "pool.h"

namespace krasis {
namespace {

constexpr int64_t kMaxPairs = 16384;  // of a chunk
constexpr int64_t kPartialBytes =
    8 * 1024 * 1024;  // aimed at: it is written and read back, so it should stay in the cache
constexpr int64_t kMinColumns = 256;
constexpr int64_t kMaxRanges = 16;
constexpr int64_t kMaxSize = 1 << 24, kMaxExperts = 1 << 20;
constexpr int64_t kReduceColumns = 512;
constexpr int64_t kPackHere = 2;  // panels the caller regroups itself instead of opening a phase
constexpr int64_t kMinUnitMacs = 64 * 1024;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Sizes {
    int64_t tokens, hidden, intermediate, num_experts, top_k;

    bool valid() const {
        return tokens >= 0 && hidden > 0 && hidden <= kMaxSize && intermediate > 0 && intermediate <= kMaxSize &&
               num_experts > 0 && num_experts <= kMaxExperts && top_k > 0 && top_k <= num_experts;
    }
    bool tiled() const { return hidden % kStripRows == 0 && intermediate % kBlock == 0; }
    // Tokens of a chunk: all chunks of nearly the same size, since each reads the experts again.
    int64_t chunk() const {
        const int64_t most = std::max<int64_t>(kMaxPairs / top_k, 1);
        const int64_t chunks = std::max<int64_t>((tokens + most - 1) / most, 1);
        return (tokens + chunks - 1) / chunks;
    }
    // Output columns of one range.
    int64_t columns() const {
        const int64_t pairs = std::max<int64_t>(chunk() * top_k, 1);
        const int64_t fitting = kPartialBytes / (pairs * static_cast<int64_t>(sizeof(float)));
        const int64_t least = std::max(kMinColumns, round_up((hidden + kMaxRanges - 1) / kMaxRanges, kStripRows));
        return std::min(std::max(fitting / kStripRows * kStripRows, least), hidden);
    }
};

// Where things lie in the workspace.
struct Workspace {
    int64_t position, rows, counts, groups, panel_group, input, middle, partial, bytes;

    explicit Workspace(const Sizes &sizes) {
        const int64_t pairs = sizes.chunk() * sizes.top_k, word = sizeof(int32_t);
        bytes = 0;
        position = take(pairs * word);
        rows = take(pairs * word);
        counts = take((sizes.num_experts + 1) * word);
        groups = take(std::min(pairs, sizes.num_experts) * static_cast<int64_t>(sizeof(MoeGroup)));
        panel_group = take(pairs * word);
        input = take(panel_bytes(pairs, sizes.hidden));
        middle = take(panel_bytes(pairs, sizes.intermediate));
        partial = take(pairs * sizes.columns() * static_cast<int64_t>(sizeof(float)));
    }

  private:
    int64_t take(int64_t size) {
        const int64_t offset = bytes;
        bytes += round_up(size, 64);
        return offset;
    }
};

// Strips of k elements worth one piece, for the least busy kind: one token.
int64_t grain_of(int64_t k) { return std::max<int64_t>(kMinUnitMacs / (kStripRows * k), 1); }

// A range of output columns as its two phases see it.
struct Range : MoeColumns {
    int64_t reduce_units() const { return (count() + kReduceColumns - 1) / kReduceColumns; }
};

void multiply_gate_up(const MoeJob &job, int64_t group, int64_t block) {
    const int32_t isa = job.isa_of(job.groups[group]);
    if (isa == KRASIS_ISA_AMX_INT8) return amx::moe_gate_up(job, group, block);
    isa == KRASIS_ISA_AVX512_VNNI ? avx512::moe_gate_up(job, group, block) : avx2::moe_gate_up(job, group, block);
}

void multiply_down(const MoeColumns &columns, int64_t group, int64_t strip) {
    const int32_t isa = columns.job->isa_of(columns.job->groups[group]);
    if (isa == KRASIS_ISA_AMX_INT8) return amx::moe_down(columns, group, strip);
    isa == KRASIS_ISA_AVX512_VNNI ? avx512::moe_down(columns, group, strip) : avx2::moe_down(columns, group, strip);
}

void run_down(void *context, int64_t begin, int64_t end, int32_t) {
    const Range &range = *static_cast<Range *>(context);
    const int64_t strips = range.count() / kStripRows;
    for (int64_t u = begin; u < end; ++u) {
        multiply_down(range, u / strips, u % strips);
    }
}

void run_reduce(void *context, int64_t begin, int64_t end, int32_t) {
    const Range &range = *static_cast<Range *>(context);
    const int64_t units = range.reduce_units();
    for (int64_t u = begin; u < end; ++u) {
        const int64_t from = range.begin + u % units * kReduceColumns;
        const int64_t to = std::min(from + kReduceColumns, range.end), token = u / units;
        range.job->isa == KRASIS_ISA_AVX512_VNNI ? avx512::moe_reduce(range, token, from, to)
                                                 : avx2::moe_reduce(range, token, from, to);
    }
}

class Chunk {
  public:
    Chunk(krasis_pool *pool, const krasis_moe_args &args, const Sizes &sizes, int64_t first, int64_t tokens);
    // Returns the number of pairs computed.
    int64_t run();

  private:
    template <class T>
    T *at(int64_t offset) {
        return reinterpret_cast<T *>(static_cast<uint8_t *>(args_.workspace) + offset);
    }
    void sort();
    void make_groups();
    void pack(int64_t begin, int64_t end);

    krasis_pool *pool_;
    const krasis_moe_args &args_;
    Sizes sizes_;
    Workspace workspace_;
    int64_t first_;
    MoeJob job_;
    int64_t num_pairs_ = 0, num_panels_ = 0;
};

Chunk::Chunk(krasis_pool *pool, const krasis_moe_args &args, const Sizes &sizes, int64_t first, int64_t tokens)
    : pool_(pool), args_(args), sizes_(sizes), workspace_(sizes), first_(first) {
    const int32_t isa = krasis_pool_isa(pool);
    job_.format = strip_format(args.tiles);
    job_.offset_factor = offset_factor(isa, job_.format);
    job_.isa = isa;
    if (krasis_pool_has_amx(pool)) job_.least_tile_tokens = kTileTokens;
    job_.activation = args.activation;
    job_.limit = args.limit;
    job_.alpha = args.alpha;
    job_.gate_bias = args.gate_bias;
    job_.up_bias = args.up_bias;
    job_.down_bias = args.down_bias;
    job_.hidden = args.hidden;
    job_.intermediate = args.intermediate;
    job_.top_k = args.top_k;
    job_.tokens = tokens;
    job_.blob = args.blob;
    job_.expert_stride_bytes = args.expert_stride_bytes;
    job_.matrices = has_gate(args.activation) ? 2 : 1;
    job_.w2_offset_bytes =
        job_.matrices * args.intermediate / kStripRows * (args.hidden / kBlock) * strip_block_bytes(job_.format);
    job_.one_token = tokens == 1;
    job_.groups = at<MoeGroup>(workspace_.groups);
    job_.input_panels = at<uint8_t>(workspace_.input);
    job_.middle_panels = at<uint8_t>(workspace_.middle);
    job_.partial = at<float>(workspace_.partial);
    job_.position = at<int32_t>(workspace_.position);
    job_.weights = args.weights + first * args.top_k;
    job_.out = args.out + first * args.hidden;
}

// Counting sort of the pairs by expert.
void Chunk::sort() {
    const int64_t slots = job_.tokens * job_.top_k;
    const int32_t *ids = args_.ids + first_ * job_.top_k;
    int32_t *counts = at<int32_t>(workspace_.counts);
    int32_t *position = at<int32_t>(workspace_.position), *rows = at<int32_t>(workspace_.rows);
    std::memset(counts, 0, static_cast<size_t>(sizes_.num_experts + 1) * sizeof(int32_t));
    for (int64_t s = 0; s < slots; ++s) {
        if (ids[s] >= 0) ++counts[ids[s] + 1];
    }
    for (int64_t e = 0; e < sizes_.num_experts; ++e) counts[e + 1] += counts[e];
    num_pairs_ = counts[sizes_.num_experts];
    for (int64_t s = 0; s < slots; ++s) {
        position[s] = ids[s] >= 0 ? counts[ids[s]]++ : -1;
        if (ids[s] >= 0) rows[position[s]] = static_cast<int32_t>(first_ + s / job_.top_k);
    }
}

// After sort(), counts[e] is the end of expert e's positions.
void Chunk::make_groups() {
    const int32_t *counts = at<int32_t>(workspace_.counts);
    MoeGroup *groups = at<MoeGroup>(workspace_.groups);
    int32_t *panel_group = at<int32_t>(workspace_.panel_group);
    for (int64_t e = 0; e < sizes_.num_experts; ++e) {
        const int32_t begin = e > 0 ? counts[e - 1] : 0;
        if (counts[e] == begin) continue;
        MoeGroup &group = groups[job_.num_groups];
        group = {static_cast<int32_t>(e), begin, counts[e] - begin, static_cast<int32_t>(num_panels_)};
        const PanelCut cut = job_.cut(group, job_.hidden);
        for (int64_t p = 0; p < cut.count; ++p) panel_group[num_panels_++] = static_cast<int32_t>(job_.num_groups);
        ++job_.num_groups;
    }
    // The slots of one token that name an expert twice are two pairs of one group: the shared panel is of one token.
    job_.one_token = job_.one_token && num_panels_ == num_pairs_;
}

void Chunk::pack(int64_t begin, int64_t end) {
    const int32_t *rows = at<int32_t>(workspace_.rows), *panel_group = at<int32_t>(workspace_.panel_group);
    for (int64_t panel = begin; panel < end; ++panel) {
        const MoeGroup &group = job_.groups[panel_group[panel]];
        const PanelCut cut = job_.cut(group, job_.hidden);
        const int64_t p = panel - group.first_panel;
        uint8_t *to = const_cast<uint8_t *>(job_.input_of(group)) + cut.offset_bytes(p);
        pack_panel(*args_.acts, rows + group.first + cut.first(p), 0, cut.width(p), job_.offset_factor, to);
    }
}

int64_t Chunk::run() {
    sort();
    make_groups();
    if (num_pairs_ == 0) return 0;
    const int64_t blocks = job_.intermediate / kBlock;
    auto pack_panels = [&](int64_t begin, int64_t end, int32_t) { pack(begin, end); };
    auto gate_up = [&](int64_t begin, int64_t end, int32_t) {
        for (int64_t u = begin; u < end; ++u) {
            multiply_gate_up(job_, u / blocks, u % blocks);
        }
    };
    Phase phases[2 + 2 * kMaxRanges];
    Range ranges[kMaxRanges];
    int64_t num_phases = 0, num_ranges = 0;
    const int64_t num_packed = job_.one_token ? 1 : num_panels_;
    if (num_packed <= kPackHere) {
        pack(0, num_packed);
    } else {
        phases[num_phases++] = make_phase(pack_panels, num_packed, 4, 32);
    }
    const int64_t longest = job_.tokens == 1 ? 16 : 4;  // pieces of many tokens are long enough
    phases[num_phases] = make_phase(gate_up, job_.num_groups * blocks, grain_of(job_.matrices * job_.hidden), longest);
    phases[num_phases++].period = blocks;
    const int64_t columns = sizes_.columns();
    for (int64_t begin = 0; begin < job_.hidden; begin += columns) {
        Range &range = ranges[num_ranges++];
        range.job = &job_;
        range.begin = begin;
        range.end = std::min(begin + columns, job_.hidden);
        const int64_t grain = grain_of(job_.intermediate), strips = range.count() / kStripRows;
        // Mirrored, so that the rows of w13 and w2 that lie side by side in a record are of one node. With several
        // ranges this splits each of them, and so not quite as the weights lie; that is prefill, which computes more
        // than it reads.
        phases[num_phases++] = {run_down, &range, job_.num_groups * strips, grain, longest * grain, strips, true};
        phases[num_phases++] = {run_reduce, &range, job_.tokens * range.reduce_units(), 4, 64};
    }
    parallel_phases(pool_, phases, num_phases);
    return num_pairs_;
}

int32_t check(const krasis_moe_args &args, const Sizes &sizes) {
    const int32_t status = check_acts(args.acts);
    if (status != KRASIS_OK) return status;
    if (args.tiles < KRASIS_TILES_Q8 || args.tiles > KRASIS_TILES_MXFP4) return KRASIS_ERR_ARGUMENT;
    if (check_activation(args.activation, args.limit, args.alpha)) return KRASIS_ERR_ARGUMENT;
    if (args.gate_bias && !has_gate(args.activation)) return KRASIS_ERR_ARGUMENT;
    if (!sizes.valid() || args.acts->k != args.hidden) return KRASIS_ERR_ARGUMENT;
    if (!sizes.tiled()) return KRASIS_ERR_SHAPE;
    const int64_t tile_bytes = strip_block_bytes(strip_format(args.tiles));
    const int64_t matrices = has_gate(args.activation) ? 3 : 2;
    const int64_t expert_bytes = matrices * (args.intermediate / kStripRows) * (args.hidden / kBlock) * tile_bytes;
    if (args.expert_stride_bytes < expert_bytes) return KRASIS_ERR_SHAPE;
    if (args.expert_stride_bytes > INT64_MAX / args.num_experts) return KRASIS_ERR_SHAPE;
    if (sizes.tokens == 0) return KRASIS_OK;
    if (!args.blob || !args.ids || !args.weights || !args.out || !args.workspace) return KRASIS_ERR_ARGUMENT;
    if (reinterpret_cast<uintptr_t>(args.workspace) % 64 != 0) return KRASIS_ERR_ARGUMENT;
    if (args.workspace_bytes < Workspace(sizes).bytes) return KRASIS_ERR_MEMORY;
    if (sizes.tokens > INT32_MAX) return KRASIS_ERR_ARGUMENT;
    for (int64_t i = 0; i < sizes.tokens * sizes.top_k; ++i) {
        if (args.ids[i] < -1 || args.ids[i] >= args.num_experts) return KRASIS_ERR_RANGE;
    }
    return KRASIS_OK;
}

}  // namespace
}  // namespace krasis

int64_t krasis_moe_workspace_bytes(int64_t tokens, int64_t hidden, int64_t intermediate, int64_t num_experts,
                                   int64_t top_k) {
    const krasis::Sizes sizes{tokens, hidden, intermediate, num_experts, top_k};
    return sizes.valid() ? krasis::Workspace(sizes).bytes : -1;
}

int32_t krasis_moe(krasis_pool *pool, const krasis_moe_args *args) {
    using namespace krasis;
    if (!pool || !args || !args->acts) return KRASIS_ERR_ARGUMENT;
    const Sizes sizes{args->acts->tokens, args->hidden, args->intermediate, args->num_experts, args->top_k};
    const int32_t status = check(*args, sizes);
    if (status != KRASIS_OK || sizes.tokens == 0) return status;
    const int64_t step = sizes.chunk();
    int64_t executed = 0;
    for (int64_t first = 0; first < sizes.tokens; first += step) {
        executed += Chunk(pool, *args, sizes, first, std::min(step, sizes.tokens - first)).run();
    }
    if (args->executed) *args->executed += executed;
    return KRASIS_OK;
}
