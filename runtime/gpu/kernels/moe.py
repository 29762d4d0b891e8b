"""Wrappers of the kernels of expert layers: routing, the grouped product, and the ways in and out of it."""

from __future__ import annotations

from ctypes import byref

import torch

from krasis.formats.models.mlps import Router
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kernels.arguments import (
    CODES,
    F32,
    FLOATS,
    HALVES,
    I32,
    I64,
    U8,
    matrix,
    optional_pointer,
    pointer,
    require,
    row_pointer,
    vector_pointer,
)
from krasis.runtime.gpu.kernels.launcher import Launcher, Tensors, present
from krasis.runtime.gpu.kernels.mlp import ACTIVATION_CODES
from krasis.runtime.gpu.kernels.named_slots import set_named
from krasis.runtime.gpu.kernels.native import (
    AlignArgs,
    MoeGemmArgs,
    MoeReduceArgs,
    RouteArgs,
    RouterArgs,
)
from krasis.runtime.gpu.kernels.router_arguments import NO_VECTORS, RouterVectors, set_router
from krasis.runtime.gpu.kernels.routing import (
    PLAIN_EXPERTS,
    ExpertForm,
    ExpertMatrix,
    NamedSlots,
    Routing,
)

MAX_ROUTER_TOKENS = 8
SCALE_CODES = {torch.bfloat16: CODES[torch.bfloat16], torch.float16: CODES[torch.float16], torch.uint8: 16}
"""uint8: ``KRASIS_CUDA_E8M0``."""


class MoeKernels(Launcher):
    """T: tokens, K: experts a token, E: experts, slot = token * K + choice. T = 0 launches nothing.

    table int64 [E]: device addresses of experts' records, 0: not here. memory: the tensors they point into.
    executed int64 [1]: increased by the slots computed, or None; it must hold a number already.
    """

    def router(self, stream: Stream, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """out [T, E] = x [T, k] x weight [E, k]^T, T <= 8; x, out float32, weight any float; k % 64 == 0."""
        (tokens, k), num_experts = matrix(x, "router.x"), matrix(weight, "router.weight")[0]
        require(tokens <= MAX_ROUTER_TOKENS, "too many tokens", "router.x", tokens, MAX_ROUTER_TOKENS)
        args = RouterArgs(
            vector_pointer(x, (tokens, k), F32, "router.x"),
            vector_pointer(weight, (num_experts, k), FLOATS, "router.weight"),
            pointer(out, (tokens, num_experts), F32, "router.out"),
            tokens,
            k,
            num_experts,
            CODES[weight.dtype],
            0,
        )
        if tokens:
            self.submit(stream, "router", (byref(args),), (x, weight), (out,))

    def route(
        self,
        stream: Stream,
        logits: torch.Tensor,
        router: Router,
        ids: torch.Tensor,
        weights: torch.Tensor,
        vectors: RouterVectors = NO_VECTORS,
        resident: torch.Tensor | None = None,
        gpu_ids: torch.Tensor | None = None,
        cpu_ids: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
    ) -> None:
        """ids int32, weights float32 [T, K] = a router's choice for logits float32 [T, E], best first.

        router: K of top_k, and what the kernel does with logits; vectors: what it asks for. resident uint8
        [E]: 1 for experts the GPU holds, 2 for those of another GPU, 0 for others. gpu_ids, cpu_ids int32
        [T, K]: ids of those with 1, and of those with 0, -1 elsewhere.
        counts int64 [E]: increased by how often each expert was chosen.
        """
        (tokens, num_experts), top_k = matrix(logits, "route.logits"), matrix(ids, "route.ids")[1]
        require(top_k == router.top_k, "not as many as the router chooses", "route.ids", top_k, router.top_k)
        choices = (tokens, top_k)
        args = RouteArgs(
            logits=pointer(logits, (tokens, num_experts), F32, "route.logits"),
            tokens=tokens,
            num_experts=num_experts,
            top_k=top_k,
            ids=pointer(ids, choices, I32, "route.ids"),
            weights=pointer(weights, choices, F32, "route.weights"),
            resident=optional_pointer(resident, (num_experts,), U8, "route.resident"),
            gpu_ids=optional_pointer(gpu_ids, choices, I32, "route.gpu_ids"),
            cpu_ids=optional_pointer(cpu_ids, choices, I32, "route.cpu_ids"),
            counts=optional_pointer(counts, (num_experts,), I64, "route.counts"),
        )
        used = set_router(args, router, vectors, num_experts)
        if tokens:
            reads = present(logits, resident, counts, *used)
            writes = present(ids, weights, gpu_ids, cpu_ids, counts)
            self.submit(stream, "route", (byref(args),), reads, writes)

    def align(self, stream: Stream, ids: torch.Tensor, routing: Routing) -> None:
        """Sorts the slots of ids int32 [T, K] by expert into ``routing.view(T)``; ids of -1 are left out."""
        r = routing
        args = AlignArgs(
            pointer(ids, (r.num_tokens, r.top_k), I32, "align.ids"),
            r.num_slots,
            r.num_experts,
            r.m_block,
            pointer(r.sorted_slots, (r.max_blocks * r.m_block,), I32, "align.sorted_slots"),
            pointer(r.block_experts, (r.max_blocks,), I32, "align.block_experts"),
            pointer(r.first_block, (r.num_experts + 1,), I32, "align.first_block"),
            pointer(r.counts, (r.num_experts,), I32, "align.counts"),
            pointer(r.num_invalid, (1,), I32, "align.num_invalid"),
        )
        if r.num_slots:
            writes = (r.sorted_slots, r.block_experts, r.first_block, r.counts, r.num_invalid)
            self.submit(stream, "moe_align", (byref(args),), (ids,), writes)

    def moe_gemm(
        self,
        stream: Stream,
        x: torch.Tensor,
        routing: Routing,
        table: torch.Tensor,
        memory: Tensors,
        matrix: ExpertMatrix,
        begin: int,
        end: int,
        out: torch.Tensor,
        gated: bool,
        slots_per_row: int,
        executed: torch.Tensor | None = None,
        max_blocks_launched: int = 0,
        form: ExpertForm = PLAIN_EXPERTS,
        named: NamedSlots | None = None,
    ) -> None:
        """out[s] = x[s / slots_per_row] x W_e for every slot s of experts begin..end-1; other rows stay.

        x 16 bits [slots / slots_per_row, k], out [T * K, n] of its type or float32; gated: columns of W are
        gate then up, and out [T * K, n/2] = activation(gate, up). slots_per_row: K where rows of x are
        tokens, 1 where they are slots. max_blocks_launched: 0: as many as run at once. form: gives the
        activation, and the biases added before it or, not gated, at the end. named: of one token, whose slots
        need not have been sorted; of routing only the sizes count then.
        """
        r, m = routing, matrix
        self._check_experts(r, begin, end, slots_per_row, "moe_gemm")
        columns = m.n // 2 if gated else m.n
        x_pointer, x_stride = row_pointer(x, (r.num_slots // slots_per_row, m.k), HALVES, "moe_gemm.x")
        out_pointer, out_stride = row_pointer(out, (r.num_slots, columns), (x.dtype, *F32), "moe_gemm.out")
        args = MoeGemmArgs(
            x_pointer,
            x_stride,
            slots_per_row,
            CODES[x.dtype],
            1 if gated else 0,
            pointer(table, (r.num_experts,), I64, "moe_gemm.table"),
            m.codes_offset,
            m.scales_offset,
            SCALE_CODES[m.scale_dtype],
            r.m_block,
            m.group,
            m.k,
            m.n,
            r.num_slots,
            r.num_experts,
            begin,
            end,
            max_blocks_launched,
            r.sorted_slots.data_ptr(),
            r.block_experts.data_ptr(),
            r.first_block.data_ptr(),
            out_pointer,
            out_stride,
            CODES[out.dtype],
            0,
            optional_pointer(executed, (1,), I64, "moe_gemm.executed"),
        )
        biases = self._set_form(args, form, gated, r.num_experts, columns)
        sorting: Tensors = (r.sorted_slots, r.block_experts, r.first_block)
        summed: Tensors = ()
        if named is not None:
            sorting, summed = set_named(args, named, r)
        if r.num_slots and end > begin:
            reads = present(x, *sorting, *summed, table, *memory, executed, *biases)
            self.submit(stream, "moe_gemm", (byref(args),), reads, present(out, *summed, executed))

    def moe_reduce(
        self,
        stream: Stream,
        slots: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        residual: torch.Tensor | None,
        out: torch.Tensor,
        num_experts: int,
    ) -> None:
        """out[t] = residual[t] + sum of weights[t, j] * slots[t * K + j] over the j whose id is an expert.

        slots [T * K, n]; ids int32, weights float32 [T, K]; residual and out [T, n] of one float type,
        residual may be out. n % 8 == 0.
        """
        (tokens, n), top_k = matrix(out, "moe_reduce.out"), matrix(ids, "moe_reduce.ids")[1]
        if residual is not None:
            vector_pointer(residual, (tokens, n), (out.dtype,), "moe_reduce.residual")
        args = MoeReduceArgs(
            vector_pointer(slots, (tokens * top_k, n), FLOATS, "moe_reduce.slots"),
            CODES[slots.dtype],
            CODES.get(out.dtype, -1),
            pointer(ids, (tokens, top_k), I32, "moe_reduce.ids"),
            pointer(weights, (tokens, top_k), F32, "moe_reduce.weights"),
            None if residual is None else residual.data_ptr(),
            vector_pointer(out, (tokens, n), FLOATS, "moe_reduce.out"),
            tokens,
            top_k,
            n,
            num_experts,
            0,
        )
        if tokens:
            reads = present(slots, ids, weights, residual)
            self.submit(stream, "moe_reduce", (byref(args),), reads, (out,))

    @staticmethod
    def _set_form(
        args: MoeGemmArgs, form: ExpertForm, gated: bool, num_experts: int, columns: int
    ) -> list[torch.Tensor]:
        """The biases that the product adds."""
        bias, up_bias = (form.gate_bias, form.up_bias) if gated else (form.down_bias, None)
        shape = (num_experts, columns)
        args.bias = optional_pointer(bias, shape, F32, "moe_gemm.bias")
        args.up_bias = optional_pointer(up_bias, shape, F32, "moe_gemm.up_bias")
        if gated or not form.activation.gated:
            args.activation = ACTIVATION_CODES[form.activation.kind]
            args.limit, args.alpha = form.activation.limit, form.activation.alpha
        return present(bias, up_bias)

    @staticmethod
    def _check_experts(routing: Routing, begin: int, end: int, slots_per_row: int, where: str) -> None:
        in_range = 0 <= begin <= end <= routing.num_experts
        require(in_range, "experts out of range", where, (begin, end), routing.num_experts)
        allowed = (1, routing.top_k)
        require(
            slots_per_row in allowed, "slots_per_row is neither 1 nor top_k", where, slots_per_row, allowed
        )
