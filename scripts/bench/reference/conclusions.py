"""What the reference table shows, in sentences: which flags matter, what scales, where we lose."""

from __future__ import annotations

from scripts.bench import stats
from scripts.bench.peers import IK, KRASIS, LLAMA
from scripts.bench.reference.findings import Reference, gpus_of, vram
from scripts.bench.tables import ABSENT, figure, times

ALL_MEMORY = "all their memory"


def conclusions(found: Reference) -> str:
    """A list, of what was measured."""
    lines = [
        *_llama_lines(found),
        *_ik_lines(found),
        *_scaling_lines(found),
        *_where_we_lose(found),
        *_checks(found),
    ]
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
            "**llama.cpp, micro-batch.** Every micro-batch copies all experts to the GPU again, so `-ub` "
            f"decides its prefill: {tried}, the whole prompt at once: {both('best flags')} "
            "(prefill and decode)."
        )
    if "best flags" in shown and "default flags" in shown:
        lines.append(
            "**llama.cpp, loading and repacking.** With default flags (mapped file, repacked experts) it has "
            f"{both('default flags')}: experts that are repacked for the CPU decode faster but are never "
            "offloaded, and a mapped file is copied from memory that is not pinned. One set of flags does "
            "not win both."
        )
    lines += [
        f"**llama.cpp, {short}** (`-ncmoe`): {both(short)}, "
        f"{vram(found.of(found.both, names[short])[0], 1)} GiB."
        for short in shown
        if "in VRAM" in short
    ]
    return lines


def _ik_lines(found: Reference) -> list[str]:
    names = {name.split(", ", 2)[-1]: name for name in found.subjects(found.both, f"{IK}, 1 GPU")}
    lines = []
    for short, name in names.items():
        prompt, answer = (found.rate(found.both, name, part) for part in (0, 1))
        if short != "best flags" and prompt and answer:
            ours = [times(found.ratio(found.krasis(1), name, part)) for part in (0, 1)]
            version = found.of(found.both, name)[0][0].version.split()[0]
            lines.append(
                f"**{IK} at {version}, `{short}`**: "
                f"{figure(prompt, 0)} and {figure(answer)} tok/s (prefill and decode); "
                f"Krasis {ours[0]} and {ours[1]} of it."
            )
    return lines


def _scaling_lines(found: Reference) -> list[str]:
    lines = []
    for program, model in ((KRASIS, found.alone), (LLAMA, found.both)):
        ends = "GiB" if program == KRASIS else "best flags"
        names = {gpus_of(name): name for name in found.subjects(model, program) if name.endswith(ends)}
        if {1, 2} <= names.keys():
            pair = [found.of(model, names[count]) for count in (2, 1)]
            ratios = [stats.ratios(pair[0][part], pair[1][part], "tokens_per_s") for part in (0, 1)]
            lines.append(
                f"**Two GPUs against one, {program}**: prefill {times(ratios[0])}, decode {times(ratios[1])}."
            )
    return lines


def _where_we_lose(found: Reference) -> list[str]:
    lines = []
    peers = {
        name: spread.median
        for name in found.subjects(found.both, f"{LLAMA}, 1 GPU")
        if (spread := found.rate(found.both, name, 1))
    }
    if peers and found.krasis(1):
        best = max(peers, key=lambda name: peers[name])
        lines.append(
            "**Decode is the smaller lead.** Against the llama.cpp row that decodes fastest "
            f"({best.split(', ', 2)[-1]}) it is {times(found.ratio(found.krasis(1), best, 1))}: "
            "both read the same experts from the same memory."
        )
    whole = {
        gpus_of(name): found.rate(found.alone, name, 1)
        for name in found.subjects(found.alone, KRASIS)
        if name.endswith(ALL_MEMORY)
    }
    one, two = whole.get(1), whole.get(2)
    if one and two and two.median < one.median:
        lines.append(
            "**A second GPU did not help decode when this was measured.** With all their memory, one GPU "
            f"decodes {one.median:.1f} tok/s and two {two.median:.1f}: decode ran on the first GPU and the "
            "CPU, and the experts of the other GPU were not used. Now they are: [MULTI_GPU.md](MULTI_GPU.md)."
        )
    return lines


def _checks(found: Reference) -> list[str]:
    lines = []
    for run in (run for run in found.runs if run.case == "logits" and run.metrics):
        distance, same = run.metrics["relative_distance"][0], run.metrics["same_token"][0]
        picked = "the same next token" if same else "another next token"
        depth = "all layers" if found.is_whole else run.model
        lines.append(
            f"**Same answer.** {run.subject}, {depth}: logits differ by {100 * distance:.2f} % "
            f"of their norm; {picked}."
        )
    return lines
