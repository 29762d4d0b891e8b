// short_conv.cpp: krasis_short_conv: checks, and blocks of channels on the pool.
#include "short_conv.h"

#include "delta.h"
#include "recurrent_steps.h"

namespace {

using namespace krasis;

constexpr int64_t kMostChannels = int64_t{1} << 24, kMostRows = int64_t{1} << 40;

int32_t check(const krasis_short_conv_args &args) {
    if (args.tokens < 0 || args.channels <= 0 || args.width <= 0 || args.num_spans < 0 ||
        args.columns_offset_bytes < 0 || !args.conv) {
        return KRASIS_ERR_ARGUMENT;
    }
    if (args.channels % 16 != 0 || args.channels > kMostChannels || args.width > kMaxConvWidth ||
        args.tokens > kMostRows || args.ldx < 3 * args.channels || args.columns_offset_bytes % 4 != 0) {
        return KRASIS_ERR_SHAPE;
    }
    if (args.tokens > 0 && (!args.x || !args.out || !args.spans)) return KRASIS_ERR_ARGUMENT;
    return check_state_spans(args.spans, args.num_spans, args.tokens);
}

}  // namespace

int32_t krasis_short_conv(krasis_pool *pool, const krasis_short_conv_args *pointer) {
    if (!pool || !pointer) return KRASIS_ERR_ARGUMENT;
    const krasis_short_conv_args &args = *pointer;
    if (const int32_t status = check(args)) return status;
    if (args.tokens == 0) return KRASIS_OK;
    const auto run = krasis_pool_isa(pool) == KRASIS_ISA_AVX512_VNNI ? avx512::short_conv : avx2::short_conv;
    const int64_t blocks = (args.channels + kShortConvChannels - 1) / kShortConvChannels;
    auto body = [&](int64_t begin, int64_t end, int32_t) {
        for (int64_t i = begin; i < end; ++i) {
            const krasis_span &span = args.spans[i / blocks];
            if (span.rows > 0) run(args, span, i % blocks);
        }
    };
    parallel_for(pool, args.num_spans * blocks, args.tokens <= args.num_spans ? 8 : 1, body);
    return KRASIS_OK;
}
