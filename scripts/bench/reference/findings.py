"""What the stage measured, by what the table and the conclusions ask for."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.bench import stats
from scripts.bench.peers import IK, KRASIS, LLAMA
from scripts.bench.record import REFERENCE, Record, Run
from scripts.bench.reference.watch import GIB
from scripts.bench.reference.work import FACTS
from scripts.bench.stats import Spread
from scripts.bench.tables import ABSENT, first_seen, pick


class Reference:
    """The runs of the stage, by what the table asks for."""

    def __init__(self, record: Record) -> None:
        self.facts = record.facts(FACTS)
        self.runs = record.runs(REFERENCE)
        self.prompt, self.generate = int(self.facts["prompt"]), int(self.facts["generate"])
        self.shape = str(self.facts["shape"])
        self.alone, self.both = (
            f"{self.shape}, {self.facts[key]} layers" for key in ("layers_alone", "layers_both")
        )
        self.is_whole = self.facts["layers_alone"] == self.facts["model_layers"]

    def of(self, model: str, subject: str) -> tuple[list[Run], list[Run]]:
        """(prompt, answer) runs of a program."""
        mine = pick(self.runs, model=model, subject=subject)
        return [run for run in mine if run.case.startswith("pp")], [
            run for run in mine if run.case.startswith("tg")
        ]

    def subjects(self, model: str, program: str = "") -> list[str]:
        """In the order first measured, those that ran before those that did not."""
        mine = [run for run in self.runs if run.model == model and run.case != "logits"]
        mine.sort(key=lambda run: (_rank(run.subject), bool(run.error), run.started_s))
        return [name for name in first_seen(run.subject for run in mine) if name.startswith(program)]

    def rate(self, model: str, subject: str, part: int) -> Spread | None:
        """Tokens/s of the prompt (0) or the answer (1)."""
        return stats.spread(self.of(model, subject)[part], "tokens_per_s")

    def ratio(self, ours: str, theirs: str, part: int) -> Spread | None:
        """Ours over theirs, round by round, of files of the same depth; none for other sizes of prompt."""
        left, right = self.of(self.both, ours)[part], self.of(self.both, theirs)[part]
        same = {run.case for run in left} == {run.case for run in right}
        return stats.ratios(left, right, "tokens_per_s") if same else None

    def krasis(self, gpus: int) -> str:
        """Its row for so many cards of the reference."""
        names = self.subjects(self.both, KRASIS)
        return next((name for name in names if name.startswith(f"{KRASIS}, {gpus} GPU")), "")


def _rank(subject: str) -> int:
    order = (KRASIS, LLAMA, IK)
    return next((index for index, name in enumerate(order) if subject.startswith(name)), len(order))


def gpus_of(subject: str) -> int:
    """Such as 2 of ``llama.cpp, 2 GPUs, best flags``."""
    word = subject.split(", ")[1].split(" ")[0]
    return int(word) if word.isdigit() else 0


def gib(runs: Sequence[Run], metric: str) -> str:
    most = max((max(run.metrics[metric]) for run in runs if run.metrics.get(metric)), default=None)
    return ABSENT if most is None else f"{most / GIB:.1f}"


def vram(runs: Sequence[Run], gpus: int) -> str:
    peaks = [run.metrics["vram_bytes"][:gpus] for run in runs if run.metrics.get("vram_bytes")]
    each = [max(values) / GIB for values in zip(*peaks, strict=True)]
    return " + ".join(f"{value:.1f}" for value in each) or ABSENT
