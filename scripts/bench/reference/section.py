"""The reference table, its chart and its conclusions, from the record alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench import stats
from bench.peers import IK, KRASIS, LLAMA
from bench.record import REFERENCE, Record, Run
from bench.reference.watch import GIB
from bench.reference.work import FACTS
from bench.stats import Spread
from bench.tables import ABSENT, figure, first_seen, note, pick, table, times

README_BEGIN, README_END = "<!-- reference: begin -->", "<!-- reference: end -->"
README_ROWS = 6
TICK_S = 0.02
"""kt-kernel's queue is waited for at ticks of 4 ms: calls below some of them are not measured by it."""


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
        *(f"### {model}\n\n{_whole_table(found, model)}" for model in (found.alone, found.both)),
        "## KTransformers",
        _kt_text(found),
        "## Conclusions",
        _conclusions(found),
    ]
    return [part for part in parts if part]


def _introduction(found: Reference) -> str:
    facts = found.facts
    cap, threads = int(facts["cap_bytes"]) // GIB, facts["threads"]
    bundle, own, gguf = (
        int(facts[key]) / 1e9 for key in ("bundle_bytes", "expert_bytes_whole", "gguf_bytes_whole")
    )
    return f"""\
Random weights of the released layer shape, 4-bit experts and 8-bit attention and head for every program,
files in memory (tmpfs of huge pages), {threads} threads. A prompt of {found.prompt:,} random tokens, then
{found.generate} tokens after it. Krasis may allocate {cap} GiB on each GPU, as a small card has; the CUDA
context, and with several GPUs NCCL's buffers, come on top. llama.cpp keeps all experts in RAM. Prompts are
timed warm, the second time; "first token" is cold, from the command to the first token of that prompt.

**Depth.** All {facts["model_layers"]} layers: the bundle ({bundle:.0f} GB, both tiers) fills this machine,
and Krasis computes from it where it lies. llama.cpp at that depth wants a file of {gguf:.0f} GB and copies
its experts ({own:.0f} GB) to memory of its own; beside a bundle for the same rounds that is more than there
is. So programs are compared at {facts["layers_both"]} layers, the most of which both fit at once. Ratios are
taken inside rounds; brackets show the smallest and the largest."""


def key_table(found: Reference, most_rows: int = 0) -> str:
    """What a reader looks for first."""
    heads = ["", "layers", "prefill tok/s", "decode tok/s", "krasis / it, prefill", "krasis / it, decode"]
    rows = []
    for name in found.subjects(found.alone, KRASIS):
        if name.endswith("GiB"):
            rows.append([name, found.facts["layers_alone"], *_rates(found, found.alone, name), "", ""])
    for name in found.subjects(found.both):
        chosen = name.endswith(("GiB", "best flags", "default flags"))
        if chosen and found.rate(found.both, name, 0) is not None:
            ours = found.krasis(_gpus(name))
            ratios = [times(found.ratio(ours, name, part)) for part in (0, 1)]
            cells = ["", ""] if name.startswith(KRASIS) else ratios
            rows.append([name, found.facts["layers_both"], *_rates(found, found.both, name), *cells])
    if most_rows and len(rows) > most_rows:  # of two depths the full one, then the peers
        rows = [
            row for row in rows if not (row[0].startswith(KRASIS) and row[1] == found.facts["layers_both"])
        ]
        rows = rows[:most_rows]
    return table(heads, [[str(cell) for cell in row] for row in rows])


def _rates(found: Reference, model: str, name: str) -> list[str]:
    return [figure(found.rate(model, name, part), digits) for part, digits in ((0, 0), (1, 1))]


def _gpus(subject: str) -> int:
    """Such as 2 of ``llama.cpp, 2 GPUs, best flags``."""
    word = subject.split(", ")[1].split(" ")[0]
    return int(word) if word.isdigit() else 0


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
                _vram(prompt, _gpus(name)),
                _gib(prompt, "host_bytes"),
            ]
        )
    below = (
        "VRAM: the most in use on each GPU. RAM: the most in use beyond the file, which lies in memory too.\n"
    )
    return f"{below}\n{table(heads, rows)}"


def _gib(runs: Sequence[Run], metric: str) -> str:
    most = max((max(run.metrics[metric]) for run in runs if run.metrics.get(metric)), default=None)
    return ABSENT if most is None else f"{most / GIB:.1f}"


def _vram(runs: Sequence[Run], gpus: int) -> str:
    peaks = [run.metrics["vram_bytes"][:gpus] for run in runs if run.metrics.get("vram_bytes")]
    each = [max(values) / GIB for values in zip(*peaks, strict=True)]
    return " + ".join(f"{value:.1f}" for value in each) or ABSENT


def _kt_text(found: Reference) -> str:
    model = f"{found.shape}, one layer"
    layers = int(found.facts["model_layers"])
    rows, floors = [], []
    for name in found.subjects(model):
        for run in pick(found.runs, model=model, subject=name):
            seconds = stats.value(run, "seconds")
            if seconds is None:
                rows.append([name, run.case, run.error, ABSENT])
            elif seconds > TICK_S:
                rows.append(
                    [
                        f"{name} ({run.version})",
                        run.case,
                        f"{seconds * 1e3:.0f} ms",
                        f"{layers * seconds:.1f} s",
                    ]
                )
                if run.case == f"layer, {found.prompt} tokens":
                    floors.append((layers * seconds, name))
    if not rows:
        return "Not measured."
    text = table(["kt-kernel", "what", "one layer", f"{layers} layers"], rows)
    ours = found.rate(found.alone, found.krasis(1), 0)
    if floors and ours:
        least, name = min(floors)
        whole_s = found.prompt / ours.median
        text += f"""

KTransformers as a whole needs SGLang, a torch of its own and half a gigabyte of wheels, which could not be
brought to this machine. Its experts run in kt-kernel: what its layers alone take is a floor for its time. With
its fastest class ({name}) that is {least:.1f} s for the prompt's experts, without attention and all else;
Krasis takes {whole_s:.2f} s for the whole prompt on one GPU: at least **{least / whole_s:.1f}x**. Calls of one
token are not shown: kt-kernel's queue is waited for at ticks of 4 ms on this machine, which is most of what
they would show."""
    return text


def _conclusions(found: Reference) -> str:
    lines = [*_llama_lines(found), *_scaling_lines(found), *_where_we_lose(found), *_checks(found)]
    return "\n".join(f"- {line}" for line in lines)


def _llama_lines(found: Reference) -> list[str]:
    names = {name.split(", ", 2)[-1]: name for name in found.subjects(found.both, f"{LLAMA}, 1 GPU")}
    rates = {
        short: (found.rate(found.both, name, 0), found.rate(found.both, name, 1))
        for short, name in names.items()
    }
    shown = {short: pair for short, pair in rates.items() if pair[0] and pair[1]}

    def both(short: str) -> str:
        prompt, answer = shown[short]
        return f"{figure(prompt, 0)} and {figure(answer)} tok/s" if prompt and answer else ABSENT

    lines = []
    if "best flags" in shown and "-ub 512" in shown:
        tried = ", ".join(f"{name}: {both(name)}" for name in ("-ub 512", "-ub 2048") if name in shown)
        lines.append(
            f"**llama.cpp, micro-batch.** Every micro-batch copies all experts to the GPU again, so `-ub` decides its"
            f" prefill: {tried}, the whole prompt at once: {both('best flags')} (prefill and decode)."
        )
    if "best flags" in shown and "default flags" in shown:
        lines.append(
            f"**llama.cpp, loading and repacking.** With default flags (mapped file, repacked experts) it has"
            f" {both('default flags')}: experts that are repacked for the CPU decode faster but are never offloaded, and a"
            f" mapped file is copied from memory that is not pinned. One set of flags does not win both."
        )
    for short in shown:
        if "in VRAM" in short:
            lines.append(
                f"**llama.cpp, {short}** (`-ncmoe`): {both(short)}, {_vram(found.of(found.both, names[short])[0], 1)} GiB."
            )
    return lines


def _scaling_lines(found: Reference) -> list[str]:
    lines = []
    for program, model in ((KRASIS, found.alone), (LLAMA, found.both)):
        ends = "GiB" if program == KRASIS else "best flags"
        names = {_gpus(name): name for name in found.subjects(model, program) if name.endswith(ends)}
        if {1, 2} <= names.keys():
            pair = [found.of(model, names[count]) for count in (2, 1)]
            ratios = [stats.ratios(pair[0][part], pair[1][part], "tokens_per_s") for part in (0, 1)]
            lines.append(
                f"**Two GPUs against one, {program}**: prefill {times(ratios[0])}, decode {times(ratios[1])}."
            )
    return lines


def _where_we_lose(found: Reference) -> list[str]:
    lines = []
    peers = [
        name for name in found.subjects(found.both, f"{LLAMA}, 1 GPU") if found.rate(found.both, name, 1)
    ]
    if peers and found.krasis(1):

        def rate(name: str) -> float:
            spread = found.rate(found.both, name, 1)
            return spread.median if spread else 0.0

        best = max(peers, key=rate)
        lines.append(
            f"**Decode is the smaller lead.** Against the llama.cpp row that decodes fastest ({best.split(', ', 2)[-1]}) it is"
            f" {times(found.ratio(found.krasis(1), best, 1))}: both read the same experts from the same memory."
        )
    one = next(
        (n for n in found.subjects(found.alone, f"{KRASIS}, 1 GPU") if n.endswith("all their memory")), ""
    )
    two = next(
        (n for n in found.subjects(found.alone, f"{KRASIS}, 2 GPUs") if n.endswith("all their memory")), ""
    )
    pair = [found.rate(found.alone, name, 1) if name else None for name in (one, two)]
    if pair[0] and pair[1] and pair[1].median < pair[0].median:
        lines.append(
            f"**A second GPU does not help decode yet.** With all their memory, one GPU decodes {pair[0].median:.1f} tok/s and"
            f" two {pair[1].median:.1f}: decode runs on the first GPU and the CPU, and the experts of the other GPU are not used."
        )
    return lines


def _checks(found: Reference) -> list[str]:
    lines = []
    for run in (run for run in found.runs if run.case == "logits" and run.metrics):
        distance, same = run.metrics["relative_distance"][0], run.metrics["same_token"][0]
        picked = "the same next token" if same else "another next token"
        lines.append(
            f"**Same answer.** {run.subject}, all layers: logits differ by {100 * distance:.2f} % of their norm; {picked}."
        )
    return lines


def update_readme(record: Record, readme: Path, chart: str) -> None:
    """Renews the part of the README between its marks; leaves a README without marks alone."""
    text = readme.read_text("utf-8") if readme.exists() else ""
    if README_BEGIN not in text or README_END not in text or not record.runs(REFERENCE):
        return
    found = Reference(record)
    before, rest = text.split(README_BEGIN, 1)
    after = rest.split(README_END, 1)[1]
    picture = f"![tokens per second beside llama.cpp]({chart})\n\n" if chart else ""
    inner = f"{README_BEGIN}\n{picture}{key_table(found, README_ROWS)}\n{README_END}"
    readme.write_text(before + inner + after, "utf-8")
