"""What a GPU at hand really does: its link, its memory and its matrix products, measured in half a second.

Kept for the life of the process and nowhere else: the same card is slower beside another one, or hot.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from krasis.formats.errors import ResourceError
from krasis.runtime.planning.hardware import Figure, GpuSpec

if TYPE_CHECKING:
    import torch

COPY_BYTES = 64 * 2**20  # 1.2 ms on the fastest link, 1 % of it to begin the copy
_MEMORY_BYTES = 1024 * 2**20
_MATMUL_SIZE = 4096
_SPARE_BYTES = 512 * 2**20
_BUDGET_S = 0.03
_LEAST_REPEATS = 3
_WARM_UP_S = 0.1


@dataclass(frozen=True, slots=True)
class GpuRates:
    """10^9 bytes/s from and to pinned host memory and of VRAM, 10^12 bf16 FLOP/s of a matmul."""

    h2d_gbps: float
    d2h_gbps: float
    memory_gbps: float
    bf16_tflops: float


@functools.cache
def measure_gpu(index: int) -> GpuRates:
    """The rates of GPU ``index``, alone: cards that share a switch may be slower together.

    Raises ResourceError if CUDA fails or too little VRAM is free (about 0.8 GB is needed).
    """
    import torch

    if not torch.cuda.is_available():
        raise ResourceError("GPU cannot be measured", where=f"GPU {index}", got="torch finds no CUDA device")
    try:
        with torch.cuda.device(index):
            return _measure(torch.device("cuda", index))
    except RuntimeError as error:  # CUDA's errors and torch's out-of-memory error
        got = (str(error).splitlines() or [type(error).__name__])[0]
        raise ResourceError("GPU cannot be measured", where=f"GPU {index}", got=got) from error


def measured_spec(index: int, vram_bytes: int) -> GpuSpec:
    """GPU ``index`` as the planner wants it, of ``vram_bytes``. Errors as ``measure_gpu``."""
    rates = measure_gpu(index)
    both = f"pinned copies of {COPY_BYTES // 2**20} MiB; to the host {rates.d2h_gbps:.1f}"
    return GpuSpec(
        vram_bytes=vram_bytes,
        link_gbps=Figure(rates.h2d_gbps, "measured", both),
        memory_gbps=Figure(rates.memory_gbps, "measured", "copies inside VRAM, read and written"),
        bf16_tflops=Figure(rates.bf16_tflops, "measured", f"products of {_MATMUL_SIZE}^3"),
    )


def _measure(device: torch.device) -> GpuRates:
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    if free < COPY_BYTES + _SPARE_BYTES:
        raise ResourceError(
            "GPU cannot be measured",
            where=str(device),
            got=f"{free} bytes of VRAM free",
            limit=f"{COPY_BYTES + _SPARE_BYTES} needed",
        )
    # Products first: an idle card wakes up, and with it a link that had gone to sleep.
    flops = _matmul_rate(device)
    memory = _memory_rate(device, min(_MEMORY_BYTES, (free - _SPARE_BYTES) // 2))
    h2d, d2h = _link_rates(device)
    return GpuRates(h2d / 1e9, d2h / 1e9, memory / 1e9, flops / 1e12)


def _link_rates(device: torch.device) -> tuple[float, float]:
    """Bytes/s from pinned host memory to the device and back."""
    import torch

    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    to_device = _best_s(lambda: there.copy_(host, non_blocking=True))
    to_host = _best_s(lambda: host.copy_(there, non_blocking=True))
    return COPY_BYTES / to_device, COPY_BYTES / to_host


def _memory_rate(device: torch.device, num_bytes: int) -> float:
    """Bytes/s of a copy inside VRAM, each byte counted twice: it is read and written."""
    import torch

    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _best_s(lambda: target.copy_(source))


def _matmul_rate(device: torch.device) -> float:
    """FLOP/s of a square bf16 product of random numbers (zeros draw less power and run faster)."""
    import torch

    shape = (_MATMUL_SIZE, _MATMUL_SIZE)
    a = torch.randn(shape, dtype=torch.bfloat16, device=device)
    b = torch.randn(shape, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    end = time.perf_counter() + _WARM_UP_S  # clocks rise, and the library picks its kernel
    while time.perf_counter() < end:
        multiply()
        torch.cuda.synchronize()
    return 2 * _MATMUL_SIZE**3 / _best_s(multiply)


def _best_s(action: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs, by the GPU's own clock."""
    import torch

    best = float("inf")
    deadline = time.perf_counter() + _BUDGET_S
    count = 0
    while count < _LEAST_REPEATS or time.perf_counter() < deadline:
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        action()
        end.record()
        end.synchronize()
        best = min(best, max(begin.elapsed_time(end) / 1e3, 1e-9))
        count += 1
    return best
