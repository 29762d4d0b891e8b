"""The reference table, its chart and its conclusions, from the record alone."""

from __future__ import annotations

from pathlib import Path

from scripts.bench import stats
from scripts.bench.peers import KRASIS
from scripts.bench.record import REFERENCE, Record, Run
from scripts.bench.reference.conclusions import conclusions
from scripts.bench.reference.findings import Reference, gib, gpus_of, vram
from scripts.bench.reference.kt_floor import HANDED
from scripts.bench.reference.rows import cards
from scripts.bench.reference.watch import GIB
from scripts.bench.reference.work import FACTS
from scripts.bench.tables import ABSENT, figure, note, pick, table, times

README_BEGIN, README_END = "<!-- reference: begin -->", "<!-- reference: end -->"
README_ROWS = 6
ELSEWHERE = "reference-"
"""Begins the names of records of the same stage on other machines than the document's own."""
REFERENCE_CARDS = (1, 2, 3)
TICK_S = 0.02
"""kt-kernel's queue is waited for at ticks of 4 ms: of shorter calls many must share a wait."""
LOST = """\
Calls of one token, and handing over experts for prefill on the GPU, are not shown: each call, and each
expert, was waited for by itself, at ticks of 4 ms of kt-kernel's queue, most of what they would show."""


def sections(record: Record, picture: str) -> list[str]:
    """The parts of the document, in order; none if the stage was never run. picture: the chart's path."""
    if not record.runs(REFERENCE):
        return []
    found = Reference(record)
    title = f"## The reference: {found.shape}, {found.prompt:,} tokens"
    parts = [title, _introduction(found), key_table(found)]
    if picture:
        parts.append(f"![tokens per second beside llama.cpp]({picture})")
    parts += [
        "## Every row",
        *(
            f"### {model}\n\n{_whole_table(found, model)}"
            for model in dict.fromkeys((found.alone, found.both))
            if found.subjects(model)
        ),
        "## KTransformers",
        _kt_text(found),
    ]
    if lines := conclusions(found):
        parts += ["## Conclusions", lines]
    return [part for part in parts if part]


def _introduction(found: Reference) -> str:
    threads = found.facts["threads"]
    return f"""\
Random weights of the released layer shape, 4-bit experts and 8-bit attention and head for every program,
files in memory (tmpfs of huge pages), {threads} threads. A prompt of {found.prompt:,} random tokens, then
{found.generate} tokens after it. {_cap_text(found)}
llama.cpp keeps all experts in RAM. Prompts are timed warm, the second time; "first token" is cold, from the
command to the first token of that prompt.

{_depth_text(found)}
Ratios are taken inside rounds; brackets show the smallest and the largest."""


def _cap_text(found: Reference) -> str:
    """What the limit on a GPU's memory bounds: as it was seen."""
    cap_bytes = int(found.facts["cap_bytes"])
    names = [name for name in found.subjects(found.alone, KRASIS) if name.endswith("GiB")]
    runs = [run for name in names for run in found.of(found.alone, name)[0]]
    peaks = [peak for run in runs for peak in run.metrics.get("vram_bytes", ())]
    if max(peaks, default=0) > cap_bytes:
        return f"""\
Krasis may allocate {cap_bytes // GIB} GiB on each GPU, as a small card has;
the CUDA context, and with several GPUs NCCL's buffers, come on top."""
    return f"Krasis may use {cap_bytes // GIB} GiB of each GPU, as a small card has."


def _depth_text(found: Reference) -> str:
    facts = found.facts
    bundle, own, gguf = (
        int(facts[key]) / 1e9 for key in ("bundle_bytes", "expert_bytes_whole", "gguf_bytes_whole")
    )
    alone, all_layers, both = (facts[key] for key in ("layers_alone", "model_layers", "layers_both"))
    if not found.subjects(found.alone):
        return f"""\
**Depth.** {both} of {all_layers} layers: the most of which a bundle, a GGUF and a program's own copy of its
experts fit in this machine's memory at once."""
    depth = f"All {all_layers} layers" if found.is_whole else f"{alone} of {all_layers} layers"
    return f"""\
**Depth.** {depth}: the bundle ({bundle:.0f} GB, both tiers) fills this machine, and Krasis computes from it
where it lies. llama.cpp at all {all_layers} layers wants a file of {gguf:.0f} GB and copies its experts
({own:.0f} GB) to memory of its own; beside a bundle for the same rounds that is more than there is.
So programs are compared at {both} layers, the most of which both fit at once."""


def key_table(found: Reference, most_rows: int = 0) -> str:
    """What a reader looks for first."""
    heads = ["", "layers", "prefill tok/s", "decode tok/s", "krasis / it, prefill", "krasis / it, decode"]
    rows = [
        [name, found.facts["layers_alone"], *_rates(found, found.alone, name), "", ""]
        for name in found.subjects(found.alone, KRASIS)
        if name.endswith("GiB") and found.alone != found.both
    ]
    for name in found.subjects(found.both):
        chosen = name.endswith(("GiB", "best flags", "default flags"))
        if chosen and found.rate(found.both, name, 0) is not None:
            ours = found.krasis(gpus_of(name))
            ratios = [times(found.ratio(ours, name, part)) for part in (0, 1)]
            cells = ["", ""] if name.startswith(KRASIS) else ratios
            rows.append([name, found.facts["layers_both"], *_rates(found, found.both, name), *cells])
    if most_rows and len(rows) > most_rows:
        rows = [row for row in rows if not _gains_nothing(found, row[0])][:most_rows]
    return table(heads, [[str(cell) for cell in row] for row in rows])


def _gains_nothing(found: Reference, name: str) -> bool:
    """Whether a peer's row is one on several GPUs that its own row on one GPU surpasses, so not its best."""
    if name.startswith(KRASIS) or gpus_of(name) < 2:
        return False
    program, _, flags = name.split(", ", 2)
    one = found.rate(found.both, f"{program}, {cards(1)}, {flags}", 0)
    several = found.rate(found.both, name, 0)
    return one is not None and several is not None and several.median < one.median


def _rates(found: Reference, model: str, name: str) -> list[str]:
    return [figure(found.rate(model, name, part), digits) for part, digits in ((0, 0), (1, 1))]


def _whole_table(found: Reference, model: str) -> str:
    heads = ["", "prompt", "prefill tok/s", "decode tok/s", "rounds", "first token s", "VRAM GiB", "RAM GiB"]
    rows = []
    for name in found.subjects(model):
        prompt, answer = found.of(model, name)
        if not prompt or stats.spread(prompt, "tokens_per_s") is None:
            rows.append([name, prompt[0].case[2:] if prompt else "", note(prompt), *[ABSENT] * 5])
            continue
        rounds = len({run.round for run in prompt if not run.error})
        rows.append(
            [
                name,
                prompt[0].case[2:],
                figure(stats.spread(prompt, "tokens_per_s"), 0),
                figure(stats.spread(answer, "tokens_per_s")),
                str(rounds),
                figure(stats.spread(prompt, "first_token_s")),
                vram(prompt, gpus_of(name)),
                gib(prompt, "host_bytes"),
            ]
        )
    below = (
        "VRAM: the most in use on each GPU. RAM: the most in use beyond the file, which lies in memory too.\n"
    )
    return f"{below}\n{table(heads, rows)}"


def _kt_text(found: Reference) -> str:
    model = f"{found.shape}, one layer"
    layers = int(found.facts["model_layers"])
    rows, floors = [], []
    runs = [run for name in found.subjects(model) for run in pick(found.runs, model=model, subject=name)]
    for run in runs:
        seconds = stats.value(run, "seconds")
        if seconds is None:
            rows.append([run.subject, run.case, run.error, ABSENT])
        elif not _is_lost_in_ticks(run):
            digits = 0 if seconds > TICK_S else 2
            one, whole = f"{seconds * 1e3:.{digits}f} ms", f"{layers * seconds:.{1 + digits}f} s"
            rows.append([f"{run.subject} ({run.version})", run.case, one, whole])
            if run.case == f"layer, {found.prompt} tokens":
                floors.append((layers * seconds, run.subject))
    if not rows:
        return "Not measured."
    parts = [table(["kt-kernel", "what", "one layer", f"{layers} layers"], rows)]
    ours = found.rate(found.alone, found.krasis(1), 0)
    if floors and ours:
        parts.append(_floor_text(found.prompt / ours.median, *min(floors)))
    if any(_is_lost_in_ticks(run) for run in runs):
        parts.append(LOST)
    return "\n\n".join(parts)


def _is_lost_in_ticks(run: Run) -> bool:
    """Of an older record, where every call was waited for by itself (and every expert that was handed over):
    what a short one shows is mostly the waiting.
    """
    seconds = stats.value(run, "seconds")
    if seconds is None or "calls_a_wait" in run.metrics:
        return False
    return run.case == HANDED or seconds <= TICK_S


def _floor_text(whole_s: float, least_s: float, name: str) -> str:
    return f"""\
KTransformers as a whole needs SGLang, a torch of its own and half a gigabyte of wheels, which could not be
brought to this machine. Its experts run in kt-kernel: what its layers alone take is a floor for its time.
With its fastest class ({name}) that is {least_s:.1f} s for the prompt's experts, without attention
and all else; Krasis takes {whole_s:.2f} s for the whole prompt on one GPU: at least
**{least_s / whole_s:.1f}x**."""


def elsewhere(record: Path) -> list[str]:
    """The key tables of the same comparison on other machines, whose records lie beside the reference's.
    Their own documents have none.
    """
    parts: list[str] = []
    if record.name.startswith(ELSEWHERE):
        return parts
    for path in sorted(record.parent.glob(f"{ELSEWHERE}*.h5")):
        other = Record(path)
        found = Reference(other)
        page = path.with_suffix(".md").name
        both, whole = found.facts["layers_both"], found.facts["model_layers"]
        parts.append(
            f"### {_machine_of(found, other)}\n\n"
            f"{both} of {whole} layers, {found.facts['threads']} threads; "
            f"[measured/{page}](measured/{page}) has every row.\n\n"
            f"{key_table(found)}"
        )
    return ["## On other machines", *parts] if parts else []


def _machine_of(found: Reference, record: Record) -> str:
    gpus = str(record.facts("machine").get("gpus", "")).split(", ")[0]
    peers = sorted({name.split(",")[0] for name in found.subjects(found.both)} - {KRASIS})
    return f"One {gpus} beside {' and '.join(peers)}"


def _elsewhere_line(measured: Path) -> str:
    """One sentence a peer that was measured on another machine."""
    lines = []
    for path in sorted(measured.glob(f"{ELSEWHERE}*.h5")):
        found = Reference(Record(path))
        for name in found.subjects(found.both):
            ratios = [found.ratio(found.krasis(gpus_of(name)), name, part) for part in (0, 1)]
            if name.endswith("best flags") and ratios[0] and ratios[1]:
                sizes = f"{found.facts['layers_both']} layers, {found.facts['threads']} threads"
                lines.append(
                    f"On another machine ({sizes}): "
                    f"{times(ratios[0])} and {times(ratios[1])} the prefill and decode of {name}."
                )
    return "\n".join(lines)


def update_readme(record: Record, readme: Path, chart: str) -> None:
    """Renews the part of the README between its marks; leaves a README without marks alone."""
    text = readme.read_text("utf-8") if readme.exists() else ""
    if README_BEGIN not in text or README_END not in text or not record.runs(REFERENCE):
        return
    found = Reference(record)
    before, rest = text.split(README_BEGIN, 1)
    after = rest.split(README_END, 1)[1]
    picture = f"![tokens per second beside llama.cpp]({chart})\n\n" if chart else ""
    line = _elsewhere_line(record.path.parent)
    table_text = key_table(found, README_ROWS) + (f"\n\n{line}" if line else "")
    inner = f"{README_BEGIN}\n{picture}{table_text}\n{README_END}"
    readme.write_text(before + inner + after, "utf-8")


def cards_not_there(record: Record) -> str:
    """A line of the list of gaps for every number of GPUs that the reference has and the machine had not."""
    there = str(record.facts("machine").get("gpus", "")).count(" MiB")
    return "".join(
        f"\n- {cards(count, int(record.facts(FACTS)['cap_bytes']))}: the machine had {there}."
        for count in REFERENCE_CARDS
        if count > there
    )
