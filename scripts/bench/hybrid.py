"""Stage ``hybrid``: GPUs for prefill and attention, the CPU for experts; what cannot run is recorded so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scripts.bench.four_bits import int4_bundle, q4_0_gguf
from scripts.bench.machine import gpu_names
from scripts.bench.peers import IK, KRASIS, KT, LLAMA, Krasis, LlamaBench, Program, Work
from scripts.bench.provision import Found
from scripts.bench.record import Record, Run
from scripts.bench.speed import Clock, Model, Plan, Say, execute, in_turn, line

STAGE = "hybrid"
# What an expert would choose for a long prompt and few small GPUs: llama-server's flags, for llama-bench.
# No mapping: it would swap llama.cpp's pinned buffers for unpinned ones. Repacked weights never offload.
LLAMA_FLAGS = (
    *("-ngl", "99", "-ncmoe", "999", "-lm", "none", "--repack", "0"),
    *("-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"),
)
# Shorter prompts stay on the CPU, as llama.cpp's own users advise where experts have to be copied.
LLAMA_ENV = {"GGML_OP_OFFLOAD_MIN_BATCH": "512"}
IK_FLAGS = (
    *("-ngl", "99", "--n-cpu-moe", "999", "-mmp", "0", "-fa", "1", "-fmoe", "1"),
    *("-ctk", "q8_0", "-ctv", "q8_0"),
)
KT_GAP = "KTransformers runs whole models through SGLang on CUDA; only its MoE layer is compared here"
KRASIS_INT4, LLAMA_Q4_0 = f"{KRASIS} int4", f"{LLAMA} Q4_0"
FOUR_BITS = {KRASIS: KRASIS_INT4, LLAMA: LLAMA_Q4_0}
OURS = {LLAMA: KRASIS, IK: KRASIS, LLAMA_Q4_0: KRASIS_INT4}
"""Which of our two forms a peer's is compared with: equal bits on the CPU."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A program with its hybrid flags, and the file it gets."""

    program: Program
    bundle: Path
    gguf: Path


def hybrid_program(program: Program, num_gpus: int) -> Program | None:
    """The program with its hybrid flags; None where it is the same as another."""
    if isinstance(program, Krasis):
        return replace(program, gpus=num_gpus, stream=True) if program.isa == "auto" else None
    if isinstance(program, LlamaBench) and program.name == LLAMA:
        return replace(program, flags=LLAMA_FLAGS, env=LLAMA_ENV, whole_prompt=True)
    if isinstance(program, LlamaBench) and program.name == IK:
        return replace(program, flags=IK_FLAGS, whole_prompt=True)
    return None


def entries(
    model: Model, programs: Sequence[Program], num_gpus: int, four_bits: Mapping[str, Found]
) -> list[Entry]:
    """Every program on the 8-bit files, Krasis and llama.cpp on their 4-bit files too."""
    found = []
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(num_gpus)))}
    for given in programs:
        program = hybrid_program(given, num_gpus)
        if program is None:
            continue
        found.append(_entry(program, program.name, visible, model.bundle, model.gguf))
        if program.name in FOUR_BITS:
            name, form = FOUR_BITS[program.name], four_bits[program.name]
            path = form.path or Path()
            entry = _entry(program, name, visible, path, path)
            found.append(
                replace(entry, program=replace(entry.program, missing=program.missing or form.missing))
            )
    return found


def _entry(program: Program, name: str, visible: Mapping[str, str], bundle: Path, gguf: Path) -> Entry:
    return Entry(replace(program, name=name, env={**program.env, **visible}), bundle, gguf)


def run_stage(
    record: Record,
    models: Sequence[Model],
    programs: Sequence[Program],
    gpus: Sequence[int],
    quantize: Found,
    plan: Plan,
    work: Path,
    clock: Clock,
    say: Say,
) -> bool:
    """Rounds of all programs for every number of GPUs. A program that failed once is not tried again."""
    present = gpu_names()
    for model in models:
        for count in (number for number in gpus if number):
            name = f"{model.name}, {count} GPU{'s' if count > 1 else ''}"
            sizes = Work(
                name, model.bundle, model.gguf, max(plan.threads), plan.prompts, plan.generate, plan.repeats
            )
            _note(record, sizes, [KT], KT_GAP)
            if count > len(present):
                names = [one.name for program in programs if (one := hybrid_program(program, count))]
                _note(record, sizes, names, f"needs {count} GPUs, this machine has {len(present)}")
                continue
            four_bits = {
                KRASIS: int4_bundle(model, work),
                LLAMA: q4_0_gguf(model, quantize, work, max(plan.threads)),
            }
            chosen = entries(model, programs, count, four_bits)
            if not _rounds(record, sizes, chosen, plan, clock, say):
                return False
    return True


def _rounds(record: Record, sizes: Work, chosen: Sequence[Entry], plan: Plan, clock: Clock, say: Say) -> bool:
    """Those that the record lacks, each beginning with another program."""
    for number in range(plan.pairs):
        mine = [run for run in record.runs(STAGE) if run.model == sizes.model]
        held = {(run.subject, run.round) for run in mine}
        hopeless = {run.subject for run in mine if run.error}
        for entry in in_turn(chosen, number):
            subject = entry.program.name
            if (subject, number) in held or subject in hopeless:
                continue
            if not clock():
                return False
            own = replace(sizes, bundle=entry.bundle, gguf=entry.gguf)
            found = execute(entry.program, own, STAGE, number, plan.timeout_s)
            record.add(found)
            say(line(found))
    return True


def _note(record: Record, sizes: Work, subjects: Sequence[str], error: str) -> None:
    """Those that cannot run here, once."""
    held = {run.subject for run in record.runs(STAGE) if run.model == sizes.model}
    record.add([failed(sizes, subject, error) for subject in subjects if subject not in held])


def failed(work: Work, subject: str, error: str) -> Run:
    """A run that there is not."""
    case = f"pp{work.prompts[0]}" if work.prompts else "pp"
    return Run(
        stage=STAGE, model=work.model, case=case, threads=work.threads, subject=subject, round=0, error=error
    )
