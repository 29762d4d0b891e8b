"""A conversion's plan in words, for --dry-run."""

from __future__ import annotations

from krasis.convert.conversion import DryRun
from krasis.formats.units import format_bytes, format_seconds


def describe_plan(plan: DryRun) -> list[str]:
    """Lines for a person."""
    lines = [
        f"  {tier:6s} {format_bytes(size):>10s}  {plan.layouts[tier]}"
        for tier, size in plan.tier_bytes.items()
    ]
    time_s = plan.estimate.pack_s
    fits = plan.free_disk_bytes >= plan.needed_disk_bytes
    lack = "" if fits else f", which is NOT enough: {format_bytes(plan.needed_disk_bytes)} are needed"
    return [
        "would write:",
        *lines,
        f"  total  {format_bytes(plan.output_bytes):>10s}  in {plan.num_files} files",
        f"disk:    {format_bytes(plan.free_disk_bytes)} free{lack}",
        f"memory:  {format_bytes(plan.memory_bytes)} beyond the page cache",
        f"reads:   {format_bytes(plan.source_bytes)} of source",
        f"time:    about {format_seconds(time_s)} ({plan.estimate.gb_per_s:.2f} GB/s of source, measured by "
        "packing a few experts here), if the disks keep up"
        if time_s
        else "time:    that of the download",
        *(
            ["an unfinished conversion is there: it would be continued if nothing has changed"]
            if plan.resumable
            else []
        ),
    ]
