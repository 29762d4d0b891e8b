"""Where a GPU's time goes, by kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scripts.device.context import Context

MOST_KERNELS = 14
NAME_CHARS = 70


def kernels_of(context: Context, work: Callable[[], object]) -> list[dict[str, Any]]:
    """The kernels and copies that took longest: name, calls, milliseconds in all. Nothing on the double."""
    if not context.is_cuda:
        work()
        return []
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
    rows = [
        {"name": event.key[:NAME_CHARS], "calls": event.count, "ms": event.self_device_time_total / 1e3}
        for event in profiler.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:MOST_KERNELS]
