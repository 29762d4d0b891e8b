"""Medians, spreads, and ratios of interleaved rounds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scripts.bench.record import Run


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, smallest and largest of some samples."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The statistics of at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))


def value(run: Run, metric: str) -> float | None:
    """The median of a run's samples; None if the run has none."""
    samples = run.metrics.get(metric, ())
    return statistics.median(samples) if samples else None


def spread(runs: Iterable[Run], metric: str) -> Spread | None:
    """Over rounds, each counted by its median; None if no round has the metric."""
    values = [found for run in runs if (found := value(run, metric)) is not None]
    return Spread.of(values) if values else None


def ratios(ours: Iterable[Run], theirs: Iterable[Run], metric: str) -> Spread | None:
    """Ours over theirs, round by round; None if no round has both."""
    others = {run.round: found for run in theirs if (found := value(run, metric)) is not None}
    pairs = [
        found / others[run.round]
        for run in ours
        if run.round in others and (found := value(run, metric)) is not None and others[run.round] > 0
    ]
    return Spread.of(pairs) if pairs else None


def errors(runs: Iterable[Run]) -> list[str]:
    """The distinct reasons for rounds without figures."""
    return list(dict.fromkeys(run.error for run in runs if run.error))
