"""Bar charts of the medians with their spread; nothing without matplotlib."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from scripts.bench import stats
from scripts.bench.record import Run
from scripts.bench.tables import case_order, pick, subjects

logger = logging.getLogger(__name__)
CHARTS = {
    "decode": "tokens_per_s",
    "prefill": "tokens_per_s",
    "layer": "weights_gbps",
    "contention": "tokens_per_s",
}
AXES = {"tokens_per_s": "tokens/s", "weights_gbps": "GB/s of weights"}


def write_plots(runs: Sequence[Run], folder: Path) -> dict[str, Path]:
    """A PNG a stage; its path by stage. Empty, with a warning, if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        logger.warning("no charts: matplotlib is not installed")
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for stage, metric in CHARTS.items():
        mine = [run for run in pick(runs, stage=stage) if run.metrics.get(metric)]
        if mine:
            written[stage] = folder / f"{stage}.png"
            _chart(mine, metric, written[stage])
    return written


def _chart(runs: Sequence[Run], metric: str, path: Path) -> None:
    """Groups of bars: one group a model, case and number of threads, one bar a program."""
    from matplotlib.figure import Figure

    groups = sorted(
        {(run.model, run.case, run.threads) for run in runs},
        key=lambda key: (key[0], case_order(key[1]), key[2]),
    )
    names = subjects(runs)
    figure = Figure(
        figsize=(max(6.0, 1.0 + 0.32 * len(groups) * (len(names) + 1)), 4.5), layout="constrained"
    )
    axes = figure.subplots()
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places, heights, below, above = [], [], [], []
        for place, (model, case, threads) in enumerate(groups):
            found = stats.spread(pick(runs, model=model, case=case, threads=threads, subject=name), metric)
            if found is not None:
                places.append(place + (index - (len(names) - 1) / 2) * width)
                heights.append(found.median)
                below.append(found.median - found.low)
                above.append(found.high - found.median)
        axes.bar(places, heights, width, yerr=[below, above], capsize=2, label=name)
    labels = [f"{model}\n{case}, {threads} thr" for model, case, threads in groups]
    axes.set_xticks(range(len(groups)), labels, fontsize=7)
    axes.set_ylabel(AXES[metric])
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
