#!/usr/bin/env python3
"""Times both paths of products over many rows on this GPU, for the thresholds of runtime/gpu/many_rows.py.

    python scripts/measure_many_rows.py [--rows 64,256,1024] [--repeats 30]

Native: the kernels of libkrasis_cuda on INT8 and INT4 weights as they lie. Library: unpacked to bfloat16,
then torch's products. The threshold is where the library's time stays below the native one's for every shape.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch

from krasis.runtime.device.api import Stream
from krasis.runtime.device.cuda import CudaDevice
from krasis.runtime.gpu.kernels import ExpertMatrix, GpuKernels, Routing
from krasis.runtime.gpu.many_rows import NEVER, SCRATCH_BYTES, ManyRows, Thresholds
from krasis.runtime.gpu.many_rows_experts import M_BLOCK, ManyRowsBuffers, ManyRowsExperts, most_rows

DENSE = {
    "30b qkv": (5120, 2048),
    "30b output": (2048, 4096),
    "235b qkv": (9216, 4096),
    "235b output": (4096, 8192),
}
EXPERTS = {"30b": (2048, 768), "235b": (4096, 1536)}  # hidden, intermediate
TOP_K, GROUP, AT_ONCE = 8, 128, 8
BF16 = torch.bfloat16


def seconds_of(run: Callable[[], None], stream: Stream, repeats: int) -> float:
    """Of one run in a row of runs, the median of several rows."""
    rows = []
    for _ in range(5):
        run()
        stream.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        stream.synchronize()
        rows.append((time.perf_counter() - begin) / repeats)
    return statistics.median(rows)


def report(name: str, rows: int, flops: float, native_s: float, library_s: float) -> None:
    """One line."""
    print(
        f"{name:14} {rows:5} rows: native {native_s * 1e6:8.1f} us {flops / native_s * 1e-12:6.1f} TFLOP/s, "
        f"library {library_s * 1e6:8.1f} us {flops / library_s * 1e-12:6.1f} TFLOP/s, "
        f"native / library {native_s / library_s:.2f}",
        flush=True,
    )


class Machine:
    """The GPU with one stream."""

    def __init__(self, repeats: int) -> None:
        self.device = CudaDevice()
        self.stream, self.kernels = self.device.stream("measure"), GpuKernels(self.device)
        self.repeats = repeats

    def make(
        self, shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[[torch.Tensor], object]
    ) -> torch.Tensor:
        """A filled tensor."""
        tensor = self.device.empty(shape, dtype)

        def action(_: int) -> None:
            fill(tensor)

        self.stream.launch("fill", action, reads=(), writes=(tensor,))
        return tensor

    def dense(self, name: str, rows: int) -> None:
        """One INT8 weight, with a float32 residual as attention's output has."""
        n, k = DENSE[name]
        codes = self.make((n // 32, k // 4, 32, 4), torch.int8, lambda t: t.random_(-128, 128))
        scales = self.make((n,), torch.float32, lambda t: t.fill_(1 / 1024))
        x = self.make((rows, k), BF16, torch.Tensor.normal_)
        hidden = self.make((rows, n), torch.float32, torch.Tensor.zero_)
        out = self.make((rows, n), BF16, torch.Tensor.zero_)
        scratch = self.device.empty((SCRATCH_BYTES,), torch.uint8)
        adds = name.endswith("output")
        times = []
        for thresholds in (NEVER, Thresholds(1, None)):
            many = ManyRows(self.kernels, scratch, thresholds)

            def run(many: ManyRows = many) -> None:
                if adds:
                    many.dense_product(self.stream, x, codes, scales, hidden, hidden)
                else:
                    many.dense_product(self.stream, x, codes, scales, out)

            times.append(seconds_of(run, self.stream, self.repeats))
        report(name, rows, 2.0 * rows * n * k, times[0], times[1])

    def experts(self, name: str, rows: int, num_experts: int = 32) -> None:
        """All products of one expert layer; every expert has so many rows."""
        hidden, inner = EXPERTS[name]
        tokens = rows * num_experts // TOP_K
        w13, w2 = 2 * hidden * inner, hidden * inner
        sizes = [w13 // 2, w13 // GROUP * 2, w2 // 2, w2 // GROUP * 2]
        starts = [sum(sizes[:i]) for i in range(4)]
        matrices = (
            ExpertMatrix(starts[0], starts[1], GROUP, hidden, 2 * inner, BF16),
            ExpertMatrix(starts[2], starts[3], GROUP, inner, hidden, BF16),
        )
        records = self.make((num_experts, sum(sizes)), torch.uint8, lambda t: t.random_(0, 256))
        for start, size in ((starts[1], sizes[1]), (starts[3], sizes[3])):
            scale = 0.6 / math.sqrt(hidden if start == starts[1] else inner) / 4

            def fill(_: int, start: int = start, size: int = size, scale: float = scale) -> None:
                records[:, start : start + size] = torch.full(
                    (size // 2,), scale, dtype=BF16, device=records.device
                ).view(torch.uint8)

            self.stream.launch("scales", fill, reads=(), writes=(records,))
        addresses = records.data_ptr() + torch.arange(num_experts) * sum(sizes)
        table = self.make((num_experts,), torch.int64, lambda t: t.copy_(addresses))
        spread = torch.arange(tokens * TOP_K, dtype=torch.int32).remainder(num_experts).view(tokens, TOP_K)
        ids = self.make((tokens, TOP_K), torch.int32, lambda t: t.copy_(spread))
        x = self.make((tokens, hidden), BF16, torch.Tensor.normal_)
        gated = self.device.empty((tokens * TOP_K, inner), BF16)
        slots = self.device.empty((tokens * TOP_K, hidden), BF16)
        executed = self.make((1,), torch.int64, torch.Tensor.zero_)

        routing = Routing.allocate(self.device, tokens, TOP_K, num_experts).view(tokens)
        self.kernels.align(self.stream, ids, routing)

        def native() -> None:
            common = (routing, table, [records])
            self.kernels.moe_gemm(
                self.stream, x, *common, matrices[0], 0, num_experts, gated, gated=True, slots_per_row=TOP_K
            )
            self.kernels.moe_gemm(
                self.stream, gated, *common, matrices[1], 0, num_experts, slots, gated=False, slots_per_row=1
            )

        small = Routing.allocate(self.device, tokens, TOP_K, num_experts).view(tokens, M_BLOCK)
        self.kernels.align(self.stream, ids, small)
        most = most_rows(small)
        buffers = ManyRowsBuffers(
            self.device.empty((AT_ONCE * w13 * 2,), torch.uint8),
            self.device.empty((most, hidden), BF16),
            self.device.empty((most, inner), BF16),
            self.device.empty((num_experts,), torch.int32),
        )
        many = ManyRowsExperts(self.kernels, buffers, Thresholds(None, 1))

        def library() -> None:
            many.run(self.stream, x, small, table, [records], matrices, 0, num_experts, slots, executed)

        native_s = seconds_of(native, self.stream, self.repeats)
        native_slots = slots.float()
        library_s = seconds_of(library, self.stream, self.repeats)
        difference = (slots.float() - native_slots).norm() / native_slots.norm()
        report(f"experts {name}", rows, 2.0 * tokens * TOP_K * (w13 + w2), native_s, library_s)
        print(f"{'':14} relative difference of the two results {float(difference):.1e}", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="16,32,64,96,128,192,256,512,1024,2048,4096")
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    rows = [int(text) for text in arguments.rows.split(",")]
    machine = Machine(arguments.repeats)
    print(machine.device.description)
    for name in DENSE:
        for count in rows:
            machine.dense(name, count)
    for name in EXPERTS:
        for count in rows:
            if 64 <= count <= 2048:
                machine.experts(name, count)


if __name__ == "__main__":
    main()
