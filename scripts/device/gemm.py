"""The grouped product of expert layers against dense bf16 products of the same size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from krasis.formats.architecture import Architecture
from krasis.formats.layouts import ExpertRecord
from krasis.runtime.device.api import Device, Stream
from krasis.runtime.gpu.buffers import Workspace
from krasis.runtime.gpu.experts.stage import Step
from krasis.runtime.gpu.kernels.gpu_kernels import GpuKernels
from krasis.runtime.gpu.kernels.grouped_product import ExpertProduct
from scripts.device import places
from scripts.device.context import Context
from scripts.device.devices import open_device
from scripts.device.timing import time_calls
from scripts.models.make_random_bundle import (
    RMS_4,
    BundleRequest,
    Pools,
    input_std,
    output_std,
    record_pieces,
)

FEW_ROWS = 256  # up to here every expert of a layer, beyond it a quarter of them, to bound time and memory


def run(context: Context) -> dict[str, Any]:
    """TFLOP/s by shape and rows an expert."""
    device = open_device(context)
    try:
        rows = [
            measure(context, device, stack.label, num_rows)
            for stack in context.sizes.stacks
            for num_rows in context.sizes.gemm_rows
        ]
    finally:
        device.close()
    return {"rows": rows}


@dataclass(frozen=True, slots=True)
class Problem:
    """Experts of one shape in device memory, and the slots that go through them."""

    product: ExpertProduct
    step: Step
    table: torch.Tensor
    records: torch.Tensor
    executed: torch.Tensor
    flops: int


def measure(context: Context, device: Device, label: str, num_rows: int) -> dict[str, Any]:
    """One line of the table."""
    sizes = context.sizes
    num_experts = sizes.gemm_experts if num_rows <= FEW_ROWS else max(1, sizes.gemm_experts // 4)
    arch = architecture(context, label, num_experts)
    stream = device.stream("gemm")
    problem = make_problem(context, device, stream, arch, num_rows)
    args = (stream, problem.step, problem.table, (problem.records,), 0, num_experts, problem.executed, 0)
    grouped = time_calls(lambda: problem.product.run(*args), stream.synchronize, sizes.repeats)
    dense_s = dense_seconds(context, device, stream, arch, num_rows * num_experts)
    return {
        "shape": label,
        "rows": num_rows,
        "num_experts": num_experts,
        "grouped_s": grouped.median_s,
        "grouped_tflops": problem.flops / grouped.median_s / 1e12,
        "dense_tflops": problem.flops / dense_s / 1e12,
        "share": dense_s / grouped.median_s,
        "weights_gbps": problem.records.numel() / grouped.median_s / 1e9,
    }


def architecture(context: Context, label: str, num_experts: int) -> Architecture:
    """One layer of the shape with so many experts."""
    from dataclasses import replace

    from scripts.models.make_random_bundle import architecture_of

    shape = places.shape_of(context.sizes.stack(label), 1)
    top_k = min(shape.num_experts_per_tok, num_experts)
    return architecture_of(replace(shape, num_experts=num_experts, num_experts_per_tok=top_k))


def make_problem(
    context: Context, device: Device, stream: Stream, arch: Architecture, num_rows: int
) -> Problem:
    """num_rows slots for each expert."""
    request = places.request_of(context, context.sizes.stacks[0], 1, ("gpu",))
    layout = request.gpu_layout
    record = layout.expert_record(arch.hidden_size, arch.expert_intermediate_size)
    top_k, num_slots = arch.num_experts_per_token, num_rows * arch.num_experts
    tokens = -(-num_slots // top_k)
    dtype = torch.bfloat16
    workspace = Workspace(device, arch, dtype, tokens, 1)
    x, ids = device.empty((tokens, arch.hidden_size), dtype), device.empty((tokens, top_k), torch.int32)
    weights = device.empty((tokens, top_k), torch.float32)
    hidden = device.empty((tokens, arch.hidden_size), torch.float32)
    records = device.empty((arch.num_experts, record.record_bytes), torch.uint8)
    table, executed = device.empty((arch.num_experts,), torch.int64), device.empty((1,), torch.int64)
    one = torch.frombuffer(bytearray(record_of(request, arch, record)), dtype=torch.uint8)
    # Neighbouring slots go to different experts, and every expert gets as many.
    spread = (
        torch.arange(tokens * top_k, dtype=torch.int32).remainder(arch.num_experts).reshape(tokens, top_k)
    )
    addresses = records.data_ptr() + torch.arange(arch.num_experts) * record.record_bytes

    def fill(_: int) -> None:
        x.normal_()
        weights.fill_(1 / top_k)
        hidden.zero_()
        executed.zero_()
        ids.copy_(spread)
        table.copy_(addresses)
        records.copy_(one.to(records.device).expand_as(records))

    stream.launch("fill", fill, reads=(), writes=(x, ids, weights, hidden, records, table, executed))
    step = Step(hidden, x, ids, weights, hidden, None, workspace.view(tokens), tokens)
    product = ExpertProduct(GpuKernels(device), arch, layout, record)
    product.align(stream, step, step.buffers.routing.view(tokens))
    stream.synchronize()
    weights_of_one = 3 * arch.hidden_size * arch.expert_intermediate_size
    return Problem(product, step, table, records, executed, 2 * tokens * top_k * weights_of_one)


def record_of(request: BundleRequest, arch: Architecture, record: ExpertRecord) -> bytes:
    """The bytes of one random expert."""
    pools = Pools(request)
    stds = (input_std(arch.hidden_size), output_std(arch.num_layers, arch.expert_intermediate_size))
    w13, w2 = (pools.scales("BF16", RMS_4, std) for std in stds)
    return b"".join(record_pieces(record, (pools.codes4(), w13, pools.codes4(), w2), "gemm"))


def dense_seconds(
    context: Context, device: Device, stream: Stream, arch: Architecture, num_slots: int
) -> float:
    """torch.mm of [slots, hidden] x [hidden, 2 inner] and [slots, inner] x [inner, hidden], bf16."""
    hidden, inner, dtype = arch.hidden_size, arch.expert_intermediate_size, torch.bfloat16
    shapes = (
        (num_slots, hidden),
        (hidden, 2 * inner),
        (num_slots, 2 * inner),
        (num_slots, inner),
        (inner, hidden),
    )
    x, w13, up, gated, w2 = (device.empty(shape, dtype) for shape in shapes)
    out = device.empty((num_slots, hidden), dtype)

    def fill(_: int) -> None:
        for tensor in (x, w13, gated, w2):
            tensor.normal_()

    def multiply(_: int) -> None:
        torch.mm(x, w13, out=up)
        torch.mm(gated, w2, out=out)

    stream.launch("fill", fill, reads=(), writes=(x, w13, gated, w2))

    def work() -> None:
        stream.launch("mm", multiply, reads=(x, w13, gated, w2), writes=(up, out))

    return time_calls(work, stream.synchronize, context.sizes.repeats).median_s
