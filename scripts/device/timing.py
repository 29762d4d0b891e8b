"""Seconds of work on a GPU, by the host's clock around enough of it; meaningless on the double."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

LEAST_S = 0.02


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: the fastest and the median of the repeats."""

    best_s: float
    median_s: float


def time_calls(work: Callable[[], object], synchronize: Callable[[], object], repeats: int) -> Timing:
    """Times work in batches so long that starting and waiting do not count, after one to warm up."""
    batch, seconds = 1, 0.0
    while True:
        seconds = _batch_s(work, synchronize, batch)
        if seconds >= LEAST_S or batch >= 1024 or repeats == 1:
            break
        batch = min(1024, max(2 * batch, round(batch * 1.2 * LEAST_S / max(seconds, 1e-6))))
    times = [_batch_s(work, synchronize, batch) / batch for _ in range(repeats)]
    return Timing(min(times), statistics.median(times))


def _batch_s(work: Callable[[], object], synchronize: Callable[[], object], batch: int) -> float:
    synchronize()
    begin = time.perf_counter()
    for _ in range(batch):
        work()
    synchronize()
    return time.perf_counter() - begin
