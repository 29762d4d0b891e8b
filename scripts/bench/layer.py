"""Stage ``layer``: one MoE layer at T=1 through krasis_moe and through kt-kernel's classes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.bench import process
from scripts.bench.peers import KRASIS, KT, last_json
from scripts.bench.provision import Found
from scripts.bench.record import Record, Run
from scripts.bench.speed import Clock, Model, Plan, Say, in_turn

STAGE = "layer"
ALONE = "krasis kernels"
"""Subjects that start with this time krasis_moe by itself."""
METRICS = ("tokens_per_s", "weights_gbps", "read_gbps", "fraction", "relative_error")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of one format. case: what it is compared within."""

    subject: str
    case: str
    script: str
    arguments: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""


def kernels(kt: Found) -> list[Kernel]:
    """All that are compared, by case: 8 bits and 4 bits a weight."""
    found = []
    for case, tiles, formats in (
        ("8 bit", "q8", ("q8_0", "amxint8")),
        ("4 bit", "i4", ("rawint4", "rawint4-g128", "amxint4")),
    ):
        for isa in ("auto", "avx2"):
            arguments: tuple[str, ...] = ("--format", tiles, "--isa", isa)
            held_to = "" if isa == "auto" else f" ({isa})"
            found.append(Kernel(f"{KRASIS}{held_to}", case, "krasis_layer_runner", arguments))
            found.append(Kernel(f"{ALONE}{held_to}", case, "krasis_kernel_runner", arguments))
        for kind in formats:
            for variant in ("", "avx2"):
                env = {"PYTHONPATH": str(kt.path)} | ({"KT_KERNEL_CPU_VARIANT": variant} if variant else {})
                name = f"{KT} {kind}" + (f" ({variant})" if variant else "")
                arguments = ("--format", kind)
                found.append(Kernel(name, case, "kt_runner", arguments, env, kt.missing))
    return found


def layer_sizes(folder: Path) -> list[str]:
    """The layer's shape as options of the runners. Raises KeyError for a config without experts."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    names = {
        "--hidden": "hidden_size",
        "--intermediate": "moe_intermediate_size",
        "--experts": "num_experts",
        "--top-k": "num_experts_per_tok",
    }
    return [part for option, key in names.items() for part in (option, str(config[key]))]


def execute(kernel: Kernel, model: Model, threads: int, number: int, plan: Plan) -> Run:
    """One process, one run."""
    common: dict[str, Any] = {"stage": STAGE, "model": model.name, "threads": threads, "case": kernel.case}
    if kernel.missing:
        return Run(subject=kernel.subject, round=number, error=kernel.missing, **common)
    arguments = [sys.executable, "-m", f"scripts.bench.{kernel.script}", *layer_sizes(model.folder)]
    arguments += kernel.arguments
    arguments += ["--threads", str(threads), "--repeats", str(plan.repeats)]
    outcome = process.run(arguments, env=kernel.env, timeout_s=plan.timeout_s)
    error, version = outcome.error, ""
    metrics: dict[str, tuple[float, ...]] = {}
    if not error:
        try:
            metrics, version = parse(outcome.output)
        except ValueError as problem:
            error = f"output not understood: {problem}"
    return Run(
        subject=kernel.subject,
        round=number,
        metrics=metrics,
        version=version,
        error=error,
        **outcome.facts,
        **common,
    )


def parse(output: str) -> tuple[dict[str, tuple[float, ...]], str]:
    """Either runner's JSON line. Raises ValueError for anything else."""
    result = last_json(output, "{")
    if not result.get("tokens_per_s"):
        raise ValueError("no speed")
    metrics = {name: tuple(float(one) for one in result[name]) for name in METRICS if name in result}
    if "class" in result:
        return metrics, f"{result['version']}, {result['class']}, {result['variant']} build"
    return metrics, str(result["isa"])


def run_stage(record: Record, models: Sequence[Model], kt: Found, plan: Plan, clock: Clock, say: Say) -> bool:
    """Rounds of all kernels. A kernel that failed once is not tried again: a crash has no spread."""
    chosen = kernels(kt)
    for model in models:
        for threads in plan.threads:
            for number in range(plan.pairs):
                held = {
                    (run.subject, run.case, run.round): run.error
                    for run in record.runs(STAGE)
                    if run.model == model.name and run.threads == threads
                }
                lacking = [
                    kernel
                    for kernel in in_turn(chosen, number)
                    if (kernel.subject, kernel.case, number) not in held
                    and not held.get((kernel.subject, kernel.case, 0))
                ]
                if lacking and not clock():
                    return False
                for kernel in lacking:
                    run = execute(kernel, model, threads, number, plan)
                    record.add([run])
                    speed = run.error[:150] or f"{max(run.metrics['weights_gbps']):.1f} GB/s"
                    say(
                        f"layer {model.name} {threads} thr round {number} {run.case} {run.subject:26} {speed}"
                    )
    return True
