"""Stage ``convert``: BF16 to four bits by krasis-convert and by llama-quantize, from the same weights."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench import process
from scripts.bench.peers import KRASIS, LLAMA
from scripts.bench.provision import Found
from scripts.bench.record import Record, Run
from scripts.bench.speed import Clock, Model, Plan, Say, in_turn
from scripts.bench.weights import BundleSource, CheckpointSource, GgufSource, Source, relative_mse

STAGE = "convert"
MOST_ROUNDS = 3
READ_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Tool:
    """One conversion. tier: of a bundle to judge, empty for a GGUF."""

    subject: str
    case: str
    options: tuple[str, ...]
    tier: str = ""

    def source(self, path: Path) -> Source:
        """What it wrote, for reading."""
        return BundleSource(path, self.tier) if self.tier else GgufSource(path)


KRASIS_TOOLS = (
    Tool(KRASIS, "gpu int4 g128", ("--tiers", "gpu", "--gpu-group", "128"), "gpu"),
    Tool(KRASIS, "gpu int4 g32", ("--tiers", "gpu", "--gpu-group", "32"), "gpu"),
    Tool(KRASIS, "cpu int4", ("--tiers", "cpu", "--cpu-format", "int4"), "cpu"),
)
LLAMA_TOOLS = (Tool(LLAMA, "Q4_0", ("Q4_0",)), Tool(LLAMA, "Q4_K_M", ("Q4_K_M",)))


def tool(name: str) -> str:
    """A command of this Python's environment."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def bf16_gguf(folder: Path, work: Path) -> Path:
    """llama-quantize's input, written from the folder unless it is there."""
    from scripts.models.moe_gguf import write_gguf

    out = work / f"{folder.name}-bf16.gguf"
    if not out.exists():
        write_gguf(folder, out, "bf16", folder.name)
    return out


def arguments(
    chosen: Tool, folder: Path, source: Path, out: Path, quantize: Path | None, threads: int
) -> list[str]:
    """The command line."""
    if chosen.subject == KRASIS:
        command = [tool("krasis-convert"), str(folder), "-o", str(out), *chosen.options]
        return [*command, "--threads", str(threads), "--restart", "--quiet"]
    return [str(quantize), str(source), str(out), *chosen.options, str(threads)]


def read_through(paths: Sequence[Path]) -> int:
    """Brings files into the page cache; returns their bytes."""
    total = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while part := file.read(READ_BYTES):
                total += len(part)
    return total


def remove(path: Path) -> None:
    """A bundle's folder or a file, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def execute(
    chosen: Tool,
    model: Model,
    source: Path,
    quantize: Found,
    threads: int,
    number: int,
    plan: Plan,
    work: Path,
) -> Run:
    """One conversion; the first round also judges what it wrote, which is then removed."""
    common: dict[str, Any] = {"stage": STAGE, "model": model.name, "case": chosen.case, "threads": threads}
    if chosen.subject == LLAMA and (quantize.path is None or not quantize.path.exists()):
        missing = quantize.missing or f"{quantize.path} is not there"
        return Run(subject=LLAMA, round=number, error=missing, **common)
    inputs = sorted(model.folder.glob("*.safetensors")) if chosen.subject == KRASIS else [source]
    num_bytes = read_through(inputs)
    out = work / f"{model.name}-out{'.krasis' if chosen.tier else '.gguf'}"
    remove(out)
    command = arguments(chosen, model.folder, source, out, quantize.path, threads)
    outcome = process.run(command, timeout_s=plan.timeout_s)
    metrics: dict[str, tuple[float, ...]] = {}
    if not outcome.error:
        metrics = {"seconds": (outcome.wall_s,), "input_gbps": (num_bytes / outcome.wall_s / 1e9,)}
        if number == 0:
            found = chosen.source(out)
            metrics["bits_per_weight"] = (found.expert_bits(),)
            metrics["relative_mse"] = (relative_mse(found, CheckpointSource(model.folder)),)
    remove(out)
    return Run(
        subject=chosen.subject, round=number, metrics=metrics, error=outcome.error, **outcome.facts, **common
    )


def run_stage(
    record: Record, models: Sequence[Model], quantize: Found, plan: Plan, work: Path, clock: Clock, say: Say
) -> bool:
    """Rounds of all tools on the first model."""
    tools = [*KRASIS_TOOLS, *LLAMA_TOOLS]
    for model in models[:1]:
        source = bf16_gguf(model.folder, work)
        for threads in plan.threads:
            for number in range(min(plan.pairs, MOST_ROUNDS)):
                held = {
                    run.case
                    for run in record.runs(STAGE)
                    if (run.model, run.threads, run.round) == (model.name, threads, number)
                }
                for chosen in in_turn(tools, number):
                    if chosen.case in held:
                        continue
                    if not clock():
                        return False
                    run = execute(chosen, model, source, quantize, threads, number, plan, work)
                    record.add([run])
                    result = (
                        run.error
                        or f"{run.metrics['seconds'][0]:.1f} s, {run.metrics['input_gbps'][0]:.3f} GB/s"
                    )
                    head = f"convert {model.name} {threads} thr round {number} {run.subject} {run.case}"
                    say(f"{head}: {result}")
    return True
