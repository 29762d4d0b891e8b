"""The HDF5 record: every run of every program, as measured. The document is made from it alone.

/machine                 attributes: what everything ran on
/runs/STAGE/MODEL/CASE/threads-N/SUBJECT/ROUND
                         attributes: command, version, error, load_1m, started_s, wall_s, note
                         one float64 dataset a metric: its samples in the order taken
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

FORMAT = 1
STAGES = ("decode", "prefill", "layer", "contention", "convert", "quality", "hybrid")
FAMILIES = "families"
"""A stage that is run by name only: it makes models of its own."""
REFERENCE = "reference"
"""A stage of its own, run by name only: it takes all the memory there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One program, one case, one round. error: why there are no metrics, empty if it ran.

    case: such as ``tg64``. threads: of the program, 0 where it does not apply. subject: whose run it is.
    metrics: samples by name; a name ends in its unit. load_1m: /proc/loadavg before the run.
    """

    stage: str
    model: str
    case: str
    threads: int
    subject: str
    round: int
    metrics: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    command: str = ""
    version: str = ""
    error: str = ""
    note: str = ""
    load_1m: float = 0.0
    started_s: float = 0.0
    wall_s: float = 0.0

    @property
    def path(self) -> str:
        """Where it lies in the file."""
        parts = (self.stage, self.model, self.case, f"threads-{self.threads}", self.subject)
        return "/".join(("runs", *(_component(part) for part in parts), f"{self.round:03d}"))


_TEXTS = ("stage", "model", "case", "subject", "command", "version", "error", "note")
_NUMBERS = ("threads", "round", "load_1m", "started_s", "wall_s")


def _component(text: str) -> str:
    """A slash would open another group."""
    return text.replace("/", "\u2215") or "-"


class Record:
    """The file. It is opened for every access, so that an interrupted benchmark keeps all it had measured."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, runs: Iterable[Run]) -> None:
        """Writes runs; one of the same path is replaced."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(self.path, "a") as file:
            file.attrs["format"] = FORMAT
            for run in runs:
                if run.path in file:
                    del file[run.path]
                group = file.create_group(run.path)
                for name in (*_TEXTS, *_NUMBERS):
                    group.attrs[name] = getattr(run, name)
                for name, samples in run.metrics.items():
                    group.create_dataset(name, data=np.asarray(samples, dtype=np.float64))

    def runs(self, stage: str = "") -> list[Run]:
        """All runs, or those of a stage, in the order of their paths. Empty if there is no file."""
        if not self.path.exists():
            return []
        with h5py.File(self.path, "r") as file:
            top = file.get(f"runs/{stage}" if stage else "runs")
            return [] if top is None else [_read(group) for group in _leaves(top)]

    def drop(self, stage: str, model: str = "") -> None:
        """Forgets a stage, or what it has of one model."""
        if not self.path.exists():
            return
        with h5py.File(self.path, "a") as file:
            path = f"runs/{stage}" + (f"/{_component(model)}" if model else "")
            if path in file:
                del file[path]

    def forget(self, runs: Iterable[Run]) -> None:
        """Removes these runs; one that is not there is no error."""
        paths = [run.path for run in runs]
        if not paths or not self.path.exists():
            return
        with h5py.File(self.path, "a") as file:
            for path in paths:
                if path in file:
                    del file[path]

    def set_facts(self, name: str, facts: Mapping[str, str | int | float]) -> None:
        """Attributes of a top-level group, such as ``machine``; those given replace older ones."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(self.path, "a") as file:
            group = file.require_group(name)
            for key, value in facts.items():
                group.attrs[key] = value

    def facts(self, name: str) -> dict[str, str | int | float]:
        """The attributes of a top-level group."""
        if not self.path.exists():
            return {}
        with h5py.File(self.path, "r") as file:
            if name not in file:
                return {}
            return {key: _plain(value) for key, value in file[name].attrs.items()}


def _plain(value: object) -> str | int | float:
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.floating):
        return float(value)
    return value if isinstance(value, int | float) else str(value)


def _leaves(group: h5py.Group) -> Iterator[h5py.Group]:
    for name in sorted(group):
        child = group[name]
        if "subject" in child.attrs:
            yield child
        else:
            yield from _leaves(child)


def _read(group: h5py.Group) -> Run:
    fields: dict[str, Any] = {name: str(group.attrs[name]) for name in _TEXTS}
    fields |= {name: int(group.attrs[name]) for name in ("threads", "round")}
    fields |= {name: float(group.attrs[name]) for name in ("load_1m", "started_s", "wall_s")}
    metrics = {name: tuple(float(value) for value in group[name][:]) for name in group}
    return Run(metrics=metrics, **fields)
