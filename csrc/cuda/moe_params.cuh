// moe_params.cuh: what kernels of the grouped product are told.
#pragma once

#include "moe_activation.cuh"

namespace krasis::cuda {

struct MoeGemmParams {
    const uint8_t *activations;        // 16-bit
    int32_t activation_stride_chunks;  // of 16 bytes; all activations lie within 2^31 of them
    const void *const *expert_base;
    int64_t codes_offset, scales_offset;
    const int32_t *sorted_slots, *block_experts, *first_block;
    uint8_t *out;
    int64_t out_stride;  // elements
    unsigned long long *num_executed;
    int32_t slots_per_row;
    int32_t expert_begin, expert_end;
    int32_t k_steps;        // k / 64
    int32_t column_tiles;   // n / 64
    int32_t group_shift;    // a group is 16 << group_shift along k (1, 2, 3); 0: one scale a channel
    int32_t gate_tiles;     // gated: column tiles of gate; otherwise 0
    int32_t column_blocks;  // blocks along n
    bool scale_is_bf16, out_is_float, is_silu, is_relu_squared;
    const float *bias, *up_bias;  // [num_experts, columns of gate or of the output]
    MoeActivation activation;     // unless is_silu
    const int32_t *ids;           // this and what follows is marlin_few.cuh's alone
    const float *slot_weights;
    float *hidden;
    uint32_t *arrivals;
    int32_t top_k;
};

struct Place {
    int row_block, column_block;
};

}  // namespace krasis::cuda
