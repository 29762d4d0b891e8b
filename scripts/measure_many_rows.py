#!/usr/bin/env python3
"""Times both paths of dense products on this GPU, for the threshold of runtime/gpu/kernels/many_rows.py.

    python -m scripts.measure_many_rows [--rows 64,256,1024] [--repeats 30]

Native: the kernel of libkrasis_cuda on INT8 weights as they lie. Library: unpacked to bfloat16,
then torch's products. The threshold is where the library's time stays below the native one's for every shape.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from krasis.runtime.device.api import Stream
from krasis.runtime.device.cuda import CudaDevice
from krasis.runtime.gpu.kernels.gpu_kernels import GpuKernels
from krasis.runtime.gpu.kernels.many_rows import SCRATCH_BYTES, ManyRows

DENSE = {
    "30b qkv": (5120, 2048),
    "30b output": (2048, 4096),
    "235b qkv": (9216, 4096),
    "235b output": (4096, 8192),
}
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
        for many in (ManyRows(self.kernels, None), ManyRows(self.kernels, scratch, 1)):

            def run(many: ManyRows = many) -> None:
                if adds:
                    many.dense_product(self.stream, x, codes, scales, hidden, hidden)
                else:
                    many.dense_product(self.stream, x, codes, scales, out)

            times.append(seconds_of(run, self.stream, self.repeats))
        report(name, rows, 2.0 * rows * n * k, times[0], times[1])


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


if __name__ == "__main__":
    main()
