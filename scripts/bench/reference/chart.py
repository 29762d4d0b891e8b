"""Two panels of bars: what a prompt and what an answer run at, Krasis beside the peers."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

from scripts.bench.peers import KRASIS
from scripts.bench.record import REFERENCE, Record
from scripts.bench.reference.findings import Reference

logger = logging.getLogger(__name__)
OURS, THEIRS = "#1b6ca8", "#b0b7bf"


def write_chart(record: Record, folder: Path) -> Path | None:
    """The PNG; None without runs, or, with a warning, without matplotlib."""
    if not record.runs(REFERENCE):
        return None
    if find_spec("matplotlib") is None:
        logger.warning("no chart: matplotlib is not installed")
        return None
    from matplotlib.figure import Figure

    found = Reference(record)
    chosen = ("GiB", "best flags", "default flags")
    names = [
        name
        for name in found.subjects(found.both)
        if name.endswith(chosen) and found.rate(found.both, name, 0) is not None
    ][::-1]
    figure = Figure(figsize=(9.5, 0.9 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for part, title in ((0, f"prefill of {found.prompt:,} tokens"), (1, "decode after it")):
        panel = axes[part]
        spreads = [found.rate(found.both, name, part) for name in names]
        values = [spread.median if spread else 0.0 for spread in spreads]
        colours = [OURS if name.startswith(KRASIS) else THEIRS for name in names]
        bars = panel.barh(range(len(names)), values, color=colours)
        panel.bar_label(bars, fmt="{:,.0f}" if part == 0 else "{:.1f}", padding=3, fontsize=8)
        panel.set_title(f"{title}, tokens/s", fontsize=9)
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.margins(x=0.18)
        panel.tick_params(axis="x", labelsize=7)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    figure.suptitle(f"{found.both} of {found.facts['model_layers']}, 4-bit experts in RAM", fontsize=10)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "reference.png"
    figure.savefig(path, dpi=130)
    return path
