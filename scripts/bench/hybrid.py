"""Stage ``hybrid``: GPUs for prefill and attention, the CPU for experts; what cannot run is recorded so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bench.machine import gpu_names
from bench.peers import IK, KT, LLAMA, Krasis, LlamaBench, Program, Work
from bench.record import Record, Run
from bench.speed import Clock, Model, Plan, Say, execute, line

STAGE = "hybrid"
# What an expert would choose for a long prompt and few small GPUs: llama-server's flags, for llama-bench.
# No mapping: it would swap llama.cpp's pinned buffers for unpinned ones. Repacked weights never offload.
LLAMA_FLAGS = (
    *("-ngl", "99", "-ncmoe", "999", "-lm", "none", "--repack", "0"),
    *("-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"),
)
LLAMA_ENV = {"GGML_OP_OFFLOAD_MIN_BATCH": "512"}
IK_FLAGS = (
    "-ngl",
    "99",
    "--n-cpu-moe",
    "999",
    "-mmp",
    "0",
    "-fa",
    "1",
    "-fmoe",
    "1",
    "-ctk",
    "q8_0",
    "-ctv",
    "q8_0",
)
KT_GAP = "KTransformers runs whole models through SGLang on CUDA; only its MoE layer is compared here"


def hybrid_program(program: Program, num_gpus: int) -> Program | None:
    """The program with its hybrid flags; None where it is the same as another."""
    if isinstance(program, Krasis):
        return replace(program, gpus=num_gpus) if program.isa == "auto" else None
    if isinstance(program, LlamaBench) and program.name == LLAMA:
        return replace(program, flags=LLAMA_FLAGS, env=LLAMA_ENV, whole_prompt=True)
    if isinstance(program, LlamaBench) and program.name == IK:
        return replace(program, flags=IK_FLAGS, whole_prompt=True)
    return None


def run_stage(
    record: Record,
    models: Sequence[Model],
    programs: Sequence[Program],
    gpus: Sequence[int],
    plan: Plan,
    clock: Clock,
    say: Say,
) -> bool:
    """One invocation a program and number of GPUs; its samples are the spread."""
    present = gpu_names()
    for model in models:
        for count in (number for number in gpus if number):
            model_name = f"{model.name}, {count} GPU{'s' if count > 1 else ''}"
            work = Work(
                model_name,
                model.bundle,
                model.gguf,
                max(plan.threads),
                plan.prompts,
                plan.generate,
                plan.repeats,
            )
            runs = [failed(work, KT, KT_GAP)]
            for program in filter(None, (hybrid_program(one, count) for one in programs)):
                if count > len(present):
                    runs.append(
                        failed(work, program.name, f"needs {count} GPUs, this machine has {len(present)}")
                    )
                    continue
                if not clock():
                    return False
                visible = {**program.env, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(count)))}
                found = execute(replace(program, env=visible), work, STAGE, 0, plan.timeout_s)
                record.add(found)
                say(line(found))
            record.add(runs)
    return True


def failed(work: Work, subject: str, error: str) -> Run:
    """A run that there is not."""
    case = f"pp{work.prompts[0]}" if work.prompts else "pp"
    return Run(
        stage=STAGE, model=work.model, case=case, threads=work.threads, subject=subject, round=0, error=error
    )
