"""The steps of the stage in their order; a call that runs out of time goes on where the last one stopped."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from scripts.bench.machine import gpu_names
from scripts.bench.peers import KT, LLAMA
from scripts.bench.provision import NOT_RUN, Found
from scripts.bench.record import Record, Run
from scripts.bench.reference import files, kt_floor, watch
from scripts.bench.reference.files import Kind, Say
from scripts.bench.reference.results import STAGE, runs_of
from scripts.bench.reference.rows import BOTH, WHOLE, Row, Sizes, ik_rows, krasis_rows, llama_rows
from scripts.bench.speed import in_turn

UNKNOWN_S = 90.0  # for a program that has not run yet
MARGIN_S = 5.0
FACTS = "reference"


@dataclass(frozen=True, slots=True)
class Request:
    """memory_bytes: what files and programs may take together. most_layers: 0 = all of the model's.

    names: only rows whose name holds one of them, or all. first_round: those before were measured elsewhere,
    and a row that some of them lack does not get them here. depths: of rows, WHOLE or BOTH.
    """

    kind: Kind
    sizes: Sizes
    gpus: tuple[int, ...]
    rounds: int
    memory_bytes: int
    most_layers: int
    timeout_s: float
    work: Path
    names: tuple[str, ...] = ()
    first_round: int = 0
    depths: tuple[str, ...] = (WHOLE, BOTH)


class Deadline:
    """Says whether something that takes so long would still end in time."""

    def __init__(self, budget_s: float) -> None:
        self._end = time.monotonic() + budget_s if budget_s else float("inf")

    def allows(self, seconds: float) -> bool:
        """Whether there is that much time and a little more."""
        return time.monotonic() + seconds + MARGIN_S < self._end


class Stage:
    """One call of the stage."""

    def __init__(
        self,
        record: Record,
        request: Request,
        llama: Callable[[], Found],
        ik: Found,
        kt: Callable[[], Found],
        deadline: Deadline,
        say: Say,
    ) -> None:
        """llama, kt: give the program, building or installing it where needed; called beside other work."""
        self._record, self._request, self._ik, self._say = record, request, ik, say
        self._deadline, self._make_llama, self._make_kt = deadline, llama, kt
        limit = request.most_layers or request.kind.all_layers
        self.layers = {
            WHOLE: min(limit, files.layers_for_one(request.kind, request.memory_bytes)),
            BOTH: min(limit, files.layers_for_both(request.kind, request.memory_bytes)),
        }
        self.unreached: tuple[str, ...] = ()
        self._logits = request.work / "logits"
        self._logits.mkdir(parents=True, exist_ok=True)

    def run(self) -> bool:
        """Whether all is measured; the record says what was not reached."""
        finished = self._run()
        self._record.set_facts("gaps", {"Not reached": "; ".join(self.unreached) or "nothing"})
        return finished

    def _run(self) -> bool:
        """Programs are built while the first files are made."""
        folder = files.memory_folder(self._request.work, self._request.memory_bytes, self._say)
        with ThreadPoolExecutor(2) as executor:
            llama: Future[Found] = executor.submit(self._make_llama)
            kt: Future[Found] = executor.submit(self._make_kt)
            self._prepare(WHOLE if self._left(self._whole_rows()) else BOTH, folder)
            found, kernel = llama.result(), kt.result()  # nothing is timed while a compiler runs
        self._note_facts(found, kernel)
        rows = {WHOLE: self._whole_rows(), BOTH: self._both_rows(found)}
        finished = self._rounds(WHOLE, rows[WHOLE], folder)
        if finished:
            self._compare_logits()
            finished = kt_floor.run(self._record, self._request, kernel, self._deadline, self._say)
            finished = finished and self._rounds(BOTH, rows[BOTH], folder)
        left = [row.subject for depth in rows for row, _ in self._left(rows[depth]) if not row.missing]
        left += kt_floor.left(self._record, self._request)
        self.unreached = tuple(dict.fromkeys(left))
        return finished

    def _whole_rows(self) -> list[Row]:
        request = self._request
        return [self._checked(row) for row in krasis_rows(WHOLE, request.gpus, request.sizes, self._logits)]

    def _both_rows(self, llama: Found) -> list[Row]:
        request, ik = self._request, self._ik
        rows = krasis_rows(BOTH, request.gpus, request.sizes, self._logits)
        rows += llama_rows(
            llama.path, llama.missing, request.gpus, request.sizes, request.kind, self.layers[BOTH]
        )
        rows += ik_rows(ik.path, ik.missing, request.gpus, request.sizes)
        rows = [self._checked(row) for row in rows]
        self._forget_missing({row.subject for row in rows if not row.missing})
        return rows

    def _forget_missing(self, subjects: set[str]) -> None:
        """What an earlier call noted as not run because the program was not there, of one that is now."""
        runs = [run for run in self._record.runs(STAGE) if run.model == self.model(BOTH)]
        self._record.forget(run for run in runs if run.subject in subjects and run.error.startswith(NOT_RUN))

    def _checked(self, row: Row) -> Row:
        """The row, told missing where it needs more GPUs than there are."""
        present = len(gpu_names())
        if self._request.sizes.device != "cuda" or row.gpus <= present or row.missing:
            return row
        text = f"needs {row.gpus} GPUs, this machine has {present}"
        return replace(row, missing=text)

    def model(self, depth: str) -> str:
        """As the record names it."""
        return f"{self._request.kind.shape}, {self.layers[depth]} layers"

    def _prepare(self, depth: str, folder: Path) -> tuple[Path, Path]:
        """(bundle, GGUF) of a depth; others are removed first. The GGUF is made for the peers alone."""
        kind, count = self._request.kind, self.layers[depth]
        bundle, gguf = files.bundle(kind, count, folder), files.gguf(kind, count, folder)
        files.make_room(folder, (bundle, gguf))
        begin = time.monotonic()
        files.ensure_bundle(kind, count, folder)
        if depth == BOTH:
            files.ensure_gguf(kind, count, folder)
        if (seconds := time.monotonic() - begin) > 1:
            self._say(f"files of {count} layers ready after {seconds:.0f} s")
        return bundle, gguf

    def _left(self, rows: Sequence[Row]) -> list[tuple[Row, int]]:
        """(row, round) that the record lacks, in the order they are run."""
        if not rows:
            return []
        model = self.model(rows[0].depth)
        held: dict[str, set[int]] = {}
        hopeless = set()
        for run in self._record.runs(STAGE):
            if run.model == model:
                held.setdefault(run.subject, set()).add(run.round)
                if run.error:
                    hopeless.add(run.subject)
        names, first = self._request.names, self._request.first_round
        rows = [row for row in rows if row.depth in self._request.depths]
        rows = [row for row in rows if not names or any(name in row.subject for name in names)]
        each = [row for row in rows if row.every_round]
        once = [(row, 0) for row in rows if not row.every_round]
        planned = [
            (row, number)
            for number in range(first, self._request.rounds)
            for row in (in_turn(each, number) if each else [])
        ]
        return [
            (row, number)
            for row, number in [*planned, *once]
            if number not in held.get(row.subject, set()) and row.subject not in hopeless
        ]

    def _rounds(self, depth: str, rows: Sequence[Row], folder: Path) -> bool:
        """What is left of a depth. A program that failed once is not tried again."""
        known = {run.subject for run in self._record.runs(STAGE) if run.model == self.model(depth)}
        absent = [(row, number) for row, number in self._left(rows) if row.missing]
        for row, number in absent:
            if row.subject in known:
                continue  # measured by a call that had the program
            failed = watch.process.Outcome("", "", row.missing, 0.0, 0.0, 0.0)
            self._keep(row, watch.Watched(failed, (), 0, ()), number)
        rows = [row for row in rows if not row.missing]
        while left := self._left(rows):
            row, number = left[0]
            if not self._deadline.allows(self._expected_s(row)):
                return False
            bundle, gguf = self._prepare(depth, folder)
            command = row.command(bundle, gguf)
            self._keep(row, watch.run(command, row.env, self._request.timeout_s), number)
        return True

    def _expected_s(self, row: Row) -> float:
        """As long as it took before, or as the like of it took."""
        mine = [run for run in self._record.runs(STAGE) if run.model == self.model(row.depth)]
        same = [run.wall_s for run in mine if run.subject == row.subject]
        like = [run.wall_s for run in mine if run.subject.partition(",")[0] == row.program]
        return statistics.median(same or like or [UNKNOWN_S])

    def _keep(self, row: Row, watched: watch.Watched, number: int) -> None:
        runs = runs_of(row, watched, self.model(row.depth), self._request.sizes.threads, number)
        self._record.add(runs)
        parts = [
            f"{run.case} {run.error[:150]}"
            if run.error
            else f"{run.case} {run.metrics['tokens_per_s'][0]:.1f}"
            for run in runs
        ]
        wall_s = watched.outcome.wall_s
        self._say(
            f"round {number}, {self.model(row.depth)}: {row.subject}: {'; '.join(parts)} ({wall_s:.0f} s)"
        )

    def _compare_logits(self) -> None:
        """Of one prompt on several GPUs against one GPU, as a share of their norm."""
        cap = self._request.sizes.cap_bytes
        paths = {count: self._logits / f"{WHOLE}-{count}-{cap}.npy" for count in self._request.gpus if count}
        there = {count: np.load(path) for count, path in paths.items() if path.exists()}
        if 1 not in there:
            return
        one = there.pop(1).astype(np.float64)
        for count, values in there.items():
            distance = float(np.linalg.norm(values - one) / np.linalg.norm(one))
            top = int(np.argmax(values) == np.argmax(one))
            self._record.add(
                [
                    Run(
                        stage=STAGE,
                        model=self.model(WHOLE),
                        case="logits",
                        threads=0,
                        subject=f"krasis, {count} GPUs against 1",
                        round=0,
                        metrics={"relative_distance": (distance,), "same_token": (float(top),)},
                    )
                ]
            )
            self._say(f"logits of {count} GPUs against 1: {distance:.2e} of their norm")

    def _note_facts(self, llama: Found, kt: Found) -> None:
        request = self._request
        programs = {
            LLAMA: llama.recipe or llama.missing,
            KT: kt.recipe or kt.missing or "its wheel, unpacked",
        }
        self._record.set_facts("programs", programs)
        self._record.set_facts(
            FACTS,
            {
                "shape": request.kind.shape,
                "model_layers": request.kind.all_layers,
                "layers_alone": self.layers[WHOLE],
                "layers_both": self.layers[BOTH],
                "memory_bytes": request.memory_bytes,
                "bundle_bytes": request.kind.bundle_bytes(self.layers[WHOLE]),
                "gguf_bytes": request.kind.gguf_bytes(self.layers[BOTH]),
                "gguf_bytes_whole": request.kind.gguf_bytes(request.kind.all_layers),
                "expert_bytes_whole": request.kind.expert_bytes(request.kind.all_layers),
                "prompt": request.sizes.prompt,
                "generate": request.sizes.generate,
                "cap_bytes": request.sizes.cap_bytes,
                "threads": request.sizes.threads,
            },
        )
