"""The goals the project set itself, and whether the record meets them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scripts.bench import stats
from scripts.bench.layer import ALONE
from scripts.bench.peers import IK, KRASIS, KT, LLAMA
from scripts.bench.record import FAMILIES, Run
from scripts.bench.stats import Spread
from scripts.bench.tables import ABSENT, first_seen, kept, percent, pick, times

KERNEL_SHARE = 0.9  # of the read bandwidth
LAYER_GOAL = 2.0
DECODE_GOALS = {(1, LLAMA): 1.3, (1, IK): 1.1, (2, LLAMA): 1.15, (2, IK): 1.0}
PREFILL_GOALS = {LLAMA: 3.0, IK: 1.1}
FAMILY_DECODE_GOALS = {LLAMA: 1.2, IK: 1.0}
CONVERT_GOAL = 2.0
FAIR_SHARE = 0.5  # of each core, beside one busy process
CONVERT_PAIRS = tuple(
    (ours, theirs) for ours in ("gpu int4 g128", "gpu int4 g32", "cpu int4") for theirs in ("Q4_0", "Q4_K_M")
)
SAME_BITS = 0.02  # relative: padding of records


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of the table. measured: as text; met: None if there are no figures."""

    what: str
    wanted: str
    measured: str
    met: bool | None

    @property
    def cells(self) -> list[str]:
        """The row."""
        verdict = "not measured" if self.met is None else "yes" if self.met else "**no**"
        return [self.what, self.wanted, self.measured, verdict]


def ratio_goal(what: str, limit: float, found: Spread | None) -> Goal:
    """At least so many times as fast."""
    return Goal(what, f">= {limit:g}x", times(found), None if found is None else found.median >= limit)


def goals(runs: Sequence[Run]) -> list[Goal]:
    """All lines that the record has runs for."""
    return [*_speed(runs), *_layers(runs), *_contention(runs), *_conversion(runs)]


def _speed(runs: Sequence[Run]) -> Iterator[Goal]:
    for stage in ("decode", "prefill", FAMILIES):
        mine = pick(runs, stage=stage)
        for model in first_seen(run.model for run in mine):
            cells = sorted({(run.threads, run.case) for run in pick(mine, model=model)})
            for threads, case in cells:
                cell = pick(mine, model=model, threads=threads, case=case)
                for peer in (LLAMA, IK):
                    limit = _limit(stage, threads, case, peer)
                    if limit is not None:
                        found = stats.ratios(
                            pick(cell, subject=KRASIS), pick(cell, subject=peer), "tokens_per_s"
                        )
                        yield ratio_goal(f"{model}, {case}, {threads} thr, against {peer}", limit, found)


def _limit(stage: str, threads: int, case: str, peer: str) -> float | None:
    if not case.startswith("tg"):
        return PREFILL_GOALS[peer]
    return FAMILY_DECODE_GOALS[peer] if stage == FAMILIES else DECODE_GOALS.get((threads, peer))


def _layers(runs: Sequence[Run]) -> Iterator[Goal]:
    mine = pick(runs, stage="layer")
    for model in first_seen(run.model for run in mine):
        for threads, case in sorted({(run.threads, run.case) for run in pick(mine, model=model)}):
            cell = pick(mine, model=model, threads=threads, case=case)
            ours = pick(cell, subject=KRASIS)
            peers = first_seen(run.subject for run in cell if run.subject.startswith(KT))
            found = {peer: stats.ratios(ours, pick(cell, subject=peer), "tokens_per_s") for peer in peers}
            # Not every class is in every build of kt-kernel; but if none ran, nothing was compared.
            ran = {peer: ratio for peer, ratio in found.items() if ratio is not None}
            for peer, ratio in ran.items() or [(f"{KT} ({case})", None)]:
                yield ratio_goal(f"{model}, MoE layer, {threads} thr, against {peer}", LAYER_GOAL, ratio)
            for name in first_seen(run.subject for run in cell if run.subject.startswith(ALONE)):
                share = stats.spread(pick(cell, subject=name), "fraction")
                met = None if share is None else share.median >= KERNEL_SHARE
                what = f"{model}, {case}, {threads} thr, {name} alone: share of read bandwidth"
                yield Goal(what, f">= {100 * KERNEL_SHARE:.0f} %", percent(share), met)


def _contention(runs: Sequence[Run]) -> Iterator[Goal]:
    mine = pick(runs, stage="contention", subject=KRASIS)
    for model in first_seen(run.model for run in mine):
        own = pick(mine, model=model)
        found = kept(
            [run for run in own if run.case.endswith("alone")],
            [run for run in own if run.case.endswith("beside")],
        )
        met = None if found is None else found.median >= FAIR_SHARE
        yield Goal(
            f"{model}, decode beside a busy process a core",
            f">= {100 * FAIR_SHARE:.0f} %",
            percent(found),
            met,
        )


def _conversion(runs: Sequence[Run]) -> Iterator[Goal]:
    mine = pick(runs, stage="convert")
    for model in first_seen(run.model for run in mine):
        for threads in sorted({run.threads for run in pick(mine, model=model)}):
            for ours, theirs in CONVERT_PAIRS:
                left = pick(mine, model=model, threads=threads, case=ours)
                right = pick(mine, model=model, threads=threads, case=theirs)
                if not left or not right:
                    continue
                found = stats.ratios(left, right, "input_gbps")
                what = f"{model}, converting to {ours}, {threads} thr, against {theirs}"
                yield ratio_goal(what, CONVERT_GOAL, found)
                if threads == max(run.threads for run in mine) and equal_bits(left, right):
                    yield _lower(f"{model}, error of {ours} below {theirs}", left, right, "relative_mse")
    quality = pick(runs, stage="quality", case="experts")
    names = first_seen(run.subject for run in quality)
    for ours in (name for name in names if "int4" in name):
        for theirs in (name for name in names if "Q4_" in name):
            left, right = pick(quality, subject=ours), pick(quality, subject=theirs)
            if equal_bits(left, right):
                yield _lower(f"trained model, KL of {ours} below {theirs}", left, right, "kl_nats")
                yield _lower(f"trained model, error of {ours} below {theirs}", left, right, "relative_mse")


def equal_bits(left: Sequence[Run], right: Sequence[Run]) -> bool:
    """Whether both spend the same number of bits on an expert weight, padding aside."""
    ours, theirs = stats.spread(left, "bits_per_weight"), stats.spread(right, "bits_per_weight")
    return ours is not None and theirs is not None and abs(ours.median / theirs.median - 1) <= SAME_BITS


def _lower(what: str, left: Sequence[Run], right: Sequence[Run], metric: str) -> Goal:
    """Of two formats of equal bits, ours has less of an error."""
    ours, theirs = stats.spread(left, metric), stats.spread(right, metric)
    if ours is None or theirs is None:
        return Goal(what, "lower", ABSENT, None)
    scale, unit = (100, " %") if metric == "relative_mse" else (1, " nats/token")
    text = f"{scale * ours.median:.4g}{unit} against {scale * theirs.median:.4g}{unit}"
    return Goal(what, "lower", text, ours.median < theirs.median)
