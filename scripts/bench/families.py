"""Stage ``families``: layers of the real sizes of several families, few of each, on the CPU.

Every program gets the same random GGUF (Krasis a bundle of it). Files are made when a round lacks them and go
when their model is done: they need up to 4 GB in the work folder, which had better be in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scripts.bench import process
from scripts.bench.convert import tool
from scripts.bench.peers import LLAMA, LlamaBench, Program, Work
from scripts.bench.record import FAMILIES as STAGE
from scripts.bench.record import Record, Run
from scripts.bench.speed import Clock, Plan, Say, done_rounds, execute, in_turn, line, on_the_cpu
from scripts.models.family_shapes import FamilyShape
from scripts.models.make_random_gguf import gguf_bytes, make_gguf, spec_of

MAKE_TIMEOUT_S = 1800


@dataclass(frozen=True, slots=True)
class Cut:
    """What is left of a released model. sizes: by the names of Qwen3-MoE's config; a layer of attention or of
    the recurrent kind is whole, of a layer's experts there may be fewer, of which as many serve a token.
    repack: whether llama.cpp lays weights out anew, as pays where it can.
    """

    name: str
    experts: str
    sizes: tuple[tuple[str, int], ...]
    repack: bool = True

    @property
    def shape(self) -> FamilyShape:
        """As the makers of random models take it."""
        return FamilyShape.named(self.name).changed(dict(self.sizes))

    @property
    def title(self) -> str:
        """What tables call it."""
        spec, whole = spec_of(self.shape), spec_of(FamilyShape.named(self.name))
        experts = next(layer.experts for layer in spec.layers if layer.experts is not None)
        count = next(layer.experts for layer in whole.layers if layer.experts is not None).count
        layers = f"{len(spec.layers)} of {len(whole.layers)} layers"
        return f"{self.name}, {layers}, {experts.count} of {count} experts {self.experts.upper()}"


def _cut(name: str, experts: str, repack: bool = True, **sizes: int) -> Cut:
    return Cut(name, experts, tuple(sizes.items()), repack)


# The vocabulary has about the share of the layers that the model has, so that the head weighs what it does.
CUTS = (
    _cut("qwen3.5-35b-a3b", "q8_0", num_hidden_layers=4, num_experts=128, vocab_size=24832),
    _cut("gpt-oss-20b", "mxfp4", num_hidden_layers=4, vocab_size=28672),
    _cut(
        "glm-4.5-air",
        "q8_0",
        num_hidden_layers=2,
        num_experts=64,
        vocab_size=6592,
        first_k_dense_replace=1,
    ),
    _cut(
        "deepseek-v3",
        "q8_0",
        repack=False,  # with it llama.cpp of llama-cpp-python 0.3.36 aborts on CPUs that have AMX
        num_hidden_layers=2,
        num_experts=16,
        vocab_size=4224,
        first_k_dense_replace=1,
    ),
)


def run_stage(
    record: Record,
    cuts: Sequence[Cut],
    programs: Sequence[Program],
    plan: Plan,
    work: Path,
    clock: Clock,
    say: Say,
) -> bool:
    """All rounds that the record lacks. Returns whether nothing is left to do."""
    given = [on_the_cpu(program) for program in programs]
    for cut in cuts:
        programs = [with_layout(program, cut) for program in given]
        sizes = Work(
            cut.title,
            work / f"{cut.name}.krasis",
            work / f"{cut.name}.gguf",
            max(plan.threads),
            plan.prompts,
            plan.generate,
            plan.repeats,
        )
        missing = _missing(record, sizes, programs, plan.pairs)
        if not missing:
            continue
        if not clock():
            return False
        try:
            if error := _make(record, cut, sizes, say):
                record.add(_failed(sizes, programs, error))
                continue
            for number in missing:
                if not clock():
                    return False
                for program in in_turn(programs, number):
                    runs = execute(program, sizes, STAGE, number, plan.timeout_s)
                    record.add(runs)
                    say(line(runs))
        finally:
            sizes.gguf.unlink(missing_ok=True)
            shutil.rmtree(sizes.bundle, ignore_errors=True)
    return True


def with_layout(program: Program, cut: Cut) -> Program:
    """llama.cpp with the layout of weights in which it runs this model."""
    if not isinstance(program, LlamaBench) or program.name != LLAMA or cut.repack:
        return program
    at = program.flags.index("--repack")
    return replace(program, flags=(*program.flags[:at], "--repack", "0", *program.flags[at + 2 :]))


def _missing(record: Record, sizes: Work, programs: Sequence[Program], pairs: int) -> list[int]:
    done = done_rounds(record, STAGE, sizes, [program.name for program in programs])
    return [number for number in range(pairs) if number not in done]


def _make(record: Record, cut: Cut, sizes: Work, say: Say) -> str:
    """GGUF and bundle. Returns why not, or nothing."""
    shape = cut.shape
    say(f"{STAGE}: making {sizes.model}, twice {gguf_bytes(shape, cut.experts) / 1e9:.1f} GB ...")
    make_gguf(shape, cut.experts, sizes.gguf)
    command = [tool("krasis-convert"), str(sizes.gguf), "-o", str(sizes.bundle), "--tiers", "cpu"]
    outcome = process.run([*command, "--quiet", "--force-text"], timeout_s=MAKE_TIMEOUT_S)
    size = sizes.gguf.stat().st_size / 1e9
    text = f"{sizes.model}: hidden {shape.config['hidden_size']}, GGUF of {size:.2f} GB"
    record.set_facts("models", {cut.name: text})
    return outcome.error


def _failed(sizes: Work, programs: Sequence[Program], error: str) -> list[Run]:
    """A run of each program that there is not, for each case."""
    cases = [f"pp{count}" for count in sizes.prompts] + [f"tg{count}" for count in sizes.generate]
    empty = Run(
        stage=STAGE, model=sizes.model, case="", threads=sizes.threads, subject="", round=0, error=error
    )
    return [replace(empty, case=case, subject=one.name) for case in cases for one in programs]
