"""Markdown tables from runs: one function a stage, each the text of its section's tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from scripts.bench import stats
from scripts.bench.hybrid import OURS
from scripts.bench.layer import ALONE
from scripts.bench.peers import IK, KRASIS, KT, LLAMA
from scripts.bench.record import Run
from scripts.bench.stats import Spread

ABSENT = "\u2013"
NOTE_CHARS = 100
ORDER = (KRASIS, LLAMA, IK, KT)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---', *['---:'] * (len(heads) - 1)])} |"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines)


def figure(spread: Spread | None, digits: int = 1, unit: str = "") -> str:
    """Median, and the range if there is more than one sample."""
    if spread is None:
        return ABSENT
    middle = f"{spread.median:.{digits}f}{unit}"
    return middle if spread.count < 2 else f"{middle} ({spread.low:.{digits}f}\u2013{spread.high:.{digits}f})"


def times(spread: Spread | None) -> str:
    """A ratio."""
    return ABSENT if spread is None else f"**{spread.median:.2f}x** ({spread.low:.2f}\u2013{spread.high:.2f})"


def percent(spread: Spread | None, digits: int = 0) -> str:
    """A share of one."""
    if spread is None:
        return ABSENT
    low, high = 100 * spread.low, 100 * spread.high
    middle = f"{100 * spread.median:.{digits}f} %"
    return middle if spread.count < 2 else f"{middle} ({low:.{digits}f}\u2013{high:.{digits}f})"


def first_seen(values: Iterable[str]) -> list[str]:
    """Each value once."""
    return list(dict.fromkeys(values))


def subjects(runs: Iterable[Run]) -> list[str]:
    """Krasis first, then the peers in a fixed order, then whatever else there is."""
    names = sorted({run.subject for run in runs})

    def rank(name: str) -> tuple[int, str]:
        known = [index for index, start in enumerate(ORDER) if name.startswith(start)]
        return (known[0] if known else len(ORDER), name)

    return sorted(names, key=rank)


def case_order(case: str) -> tuple[str, int]:
    """pp512 before pp2048."""
    head = case.rstrip("0123456789")
    return (head, int(case[len(head) :] or 0))


def pick(runs: Iterable[Run], **wanted: str | int) -> list[Run]:
    """Runs whose fields are those."""
    return [run for run in runs if all(getattr(run, name) == value for name, value in wanted.items())]


def note(runs: Sequence[Run]) -> str:
    """In place of figures: the error, shortened."""
    problems = stats.errors(runs)
    if not problems:
        return ABSENT
    # The whole of it stands in the document's last section.
    return problems[0] if len(problems[0]) <= NOTE_CHARS else f"failed: ...{problems[0][-NOTE_CHARS:]}"


def speed_tables(runs: Sequence[Run]) -> str:
    """Decode or prefill: one table a model."""
    parts = []
    for model in first_seen(run.model for run in runs):
        mine = pick(runs, model=model)
        names = subjects(mine)
        peers = [name for name in names if not name.startswith(KRASIS)]
        decode = any(run.case.startswith("tg") for run in mine)
        heads = [
            "case",
            "threads",
            *(f"{name} tok/s" for name in names),
            *(f"krasis / {name}" for name in peers),
        ]
        heads += ["krasis GB/s", "read GB/s"] if decode else []
        rows = []
        for case in sorted({run.case for run in mine}, key=case_order):
            for threads in sorted({run.threads for run in mine}):
                cell = pick(mine, case=case, threads=threads)
                rows += [_speed_row(cell, case, threads, names, peers, decode)]
        parts.append(f"### {model}\n\n{table(heads, rows)}")
    return "\n\n".join(parts)


def _speed_row(
    cell: Sequence[Run], case: str, threads: int, names: Sequence[str], peers: Sequence[str], decode: bool
) -> list[str]:
    by_name = {name: pick(cell, subject=name) for name in names}
    row = [case, str(threads)]
    for name in names:
        found = stats.spread(by_name[name], "tokens_per_s")
        row.append(figure(found) if found else note(by_name[name]))
    ours = by_name.get(KRASIS) or by_name[names[0]]
    row += [times(stats.ratios(ours, by_name[peer], "tokens_per_s")) for peer in peers]
    if decode:
        row += [figure(stats.spread(ours, "weights_gbps")), figure(stats.spread(ours, "read_gbps"))]
    return row


def layer_tables(runs: Sequence[Run]) -> str:
    """One table a model: every kernel, and how much faster Krasis is than it in the same round."""
    heads = [
        "format",
        "kernel",
        "threads",
        "tokens/s",
        "GB/s of weights",
        "of read bandwidth",
        "error",
        "krasis is faster by",
    ]
    parts = []
    for model in first_seen(run.model for run in runs):
        rows = []
        mine = pick(runs, model=model)
        for case in sorted({run.case for run in mine}, reverse=True):
            for threads in sorted({run.threads for run in mine}):
                cell = pick(mine, case=case, threads=threads)
                ours = pick(cell, subject=KRASIS)
                rows += [
                    _layer_row(pick(cell, subject=name), ours, case, name, threads) for name in subjects(cell)
                ]
        parts.append(f"### {model}\n\n{table(heads, rows)}")
    return "\n\n".join(parts)


def _layer_row(runs: Sequence[Run], ours: Sequence[Run], case: str, name: str, threads: int) -> list[str]:
    versions = first_seen(run.version for run in runs if run.version)
    detail = f"{name} [{versions[0]}]" if versions else name
    rate = stats.spread(runs, "tokens_per_s")
    faster = (
        ABSENT
        if name == KRASIS or name.startswith(ALONE)
        else times(stats.ratios(ours, runs, "tokens_per_s"))
    )
    speed = figure(rate, 0) if rate else note(runs)
    bandwidth = figure(stats.spread(runs, "weights_gbps"))
    share, error = percent(stats.spread(runs, "fraction")), percent(_one(runs, "relative_error"), 1)
    return [case, detail, str(threads), speed, bandwidth, share, error, faster]


def contention_table(runs: Sequence[Run]) -> str:
    """What each program keeps of its speed beside one spinning process a core."""
    rows = []
    for model in first_seen(run.model for run in runs):
        for name in subjects(pick(runs, model=model)):
            mine = pick(runs, model=model, subject=name)
            alone = [run for run in mine if run.case.endswith("alone")]
            beside = [run for run in mine if run.case.endswith("beside")]
            cells = [
                figure(found) if (found := stats.spread(part, "tokens_per_s")) else note(part)
                for part in (alone, beside)
            ]
            rows.append([model, name, str(mine[0].threads), *cells, percent(kept(alone, beside))])
    return table(["model", "program", "threads", "alone tok/s", "beside tok/s", "kept"], rows)


def kept(alone: Sequence[Run], beside: Sequence[Run]) -> Spread | None:
    """Beside over alone, round by round."""
    return stats.ratios(beside, alone, "tokens_per_s")


def convert_table(runs: Sequence[Run]) -> str:
    """Seconds, rate, size and error of every tool."""
    heads = [
        "model",
        "tool",
        "threads",
        "seconds",
        "GB/s of input",
        "bits/weight of experts",
        "relative MSE of experts",
    ]
    rows = []
    for model in first_seen(run.model for run in runs):
        for case in first_seen(run.case for run in pick(runs, model=model)):
            for threads in sorted({run.threads for run in pick(runs, model=model, case=case)}):
                mine = pick(runs, model=model, case=case, threads=threads)
                seconds = stats.spread(mine, "seconds")
                cells = [
                    figure(seconds) if seconds else note(mine),
                    figure(stats.spread(mine, "input_gbps"), 3),
                    figure(_one(mine, "bits_per_weight"), 3),
                    percent(_one(mine, "relative_mse"), 3),
                ]
                rows.append([model, f"{mine[0].subject} {case}", str(threads), *cells])
    return table(heads, rows)


def _one(runs: Sequence[Run], metric: str) -> Spread | None:
    """A figure that does not vary from round to round."""
    found = stats.spread(runs, metric)
    return None if found is None else Spread(found.median, found.median, found.median, 1)


def quality_tables(runs: Sequence[Run]) -> str:
    """Perplexity and divergence of every format: all that the tool quantises, and experts alone."""
    columns: list[tuple[str, Callable[[Sequence[Run]], str]]] = [
        ("bits/weight of experts", lambda one: figure(_one(one, "bits_per_weight"), 3)),
        ("relative MSE of experts", lambda one: percent(_one(one, "relative_mse"), 3)),
        ("KL divergence, nats/token", lambda one: figure(_one(one, "kl_nats"), 5)),
        ("perplexity", lambda one: figure(_one(one, "perplexity"), 4)),
        ("same first choice", lambda one: percent(_one(one, "top1_share"), 2)),
    ]
    parts = []
    for case, title in (
        ("whole", "All that the tool quantises"),
        ("experts", "Experts alone (the rest in BF16)"),
    ):
        mine = pick(runs, case=case)
        if not mine:
            continue
        rows = []
        for name in first_seen(run.subject for run in sorted(mine, key=lambda run: (run.round, run.subject))):
            one = pick(mine, subject=name)
            rows.append([name, *(cell(one) for _, cell in columns)])
            if one[0].error:
                rows[-1][1] = note(one)
        parts.append(f"### {title}\n\n{table(['format', *(head for head, _ in columns)], rows)}")
    return "\n\n".join(parts)


def hybrid_tables(runs: Sequence[Run]) -> str:
    """One table a model and number of GPUs: what ran, and what each thing that did not run said."""
    parts = []
    for model in first_seen(run.model for run in runs):
        mine = pick(runs, model=model)
        if not any(run.metrics for run in mine):
            continue
        rows = []
        for case in sorted({run.case for run in mine if run.metrics}, key=case_order):
            for name in subjects(mine):
                cell = pick(mine, subject=name, case=case) or [
                    run for run in pick(mine, subject=name) if run.error
                ]
                found = stats.spread(cell, "tokens_per_s")
                ours = pick(mine, subject=OURS.get(name, ""), case=case)
                faster = times(stats.ratios(ours, cell, "tokens_per_s"))
                rows.append([case, name, figure(found) if found else note(cell), faster])
        heads = ["case", "program", "tok/s", "krasis with the same bits is faster by"]
        parts.append(f"### {model}\n\n{table(heads, rows)}")
    return "\n\n".join(parts) or "Nothing of this could run on this machine; the last section says why."
