"""What is run: a program, its flags and the cards it may use, each a row of the reference table."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scripts.bench.hybrid import IK_FLAGS, LLAMA_ENV, LLAMA_FLAGS
from scripts.bench.peers import IK, KRASIS, LLAMA
from scripts.bench.reference.files import Kind
from scripts.bench.reference.watch import GIB

RUNNER = ("-m", "scripts.bench.reference_runner")
WHOLE, BOTH = "whole", "both"
BEST, DEFAULT = "best flags", "default flags"
CPU_PROMPT, CPU_GENERATE = 2048, 32
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
UBATCHES = (2048, 512)
# An estimate of what llama.cpp keeps on a GPU beside weights and cache at a micro-batch of 10,240 tokens; the
# memory that it then takes is measured and stands in the table.
LLAMA_COMPUTE_BYTES = 5 * GIB


@dataclass(frozen=True, slots=True)
class Sizes:
    """prompt, generate: tokens. cap_bytes: the memory of one card of the reference. threads: of the CPU.

    device: ``cuda``, or ``double`` to try the stage on a machine without a GPU.
    """

    prompt: int
    generate: int
    cap_bytes: int
    threads: int
    device: str = "cuda"

    def visible(self, count: int) -> dict[str, str]:
        """The environment in which a program sees so many GPUs."""
        seen = ",".join(map(str, range(count)))
        return {"CUDA_VISIBLE_DEVICES": seen} if self.device == "cuda" else {}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. depth: ``whole`` (Krasis by itself) or ``both`` (beside llama.cpp). every_round:
    else it runs once. arguments: with BUNDLE or GGUF in place of the file. missing: why it cannot run.
    """

    subject: str
    program: str
    depth: str
    gpus: int
    arguments: tuple[str, ...]
    prompt: int
    generate: int
    env: Mapping[str, str] = field(default_factory=dict)
    every_round: bool = False
    missing: str = ""

    @property
    def cases(self) -> tuple[str, str]:
        """What it measures, as the record names it: the prompt, and tokens after it."""
        return f"pp{self.prompt}", f"tg{self.generate}@{self.prompt}"

    def command(self, bundle: Path, gguf: Path) -> list[str]:
        """The command line."""
        places = {"BUNDLE": str(bundle), "GGUF": str(gguf)}
        return [places.get(part, part) for part in self.arguments]


def cards(count: int, cap_bytes: int = 0) -> str:
    """Such as ``2 GPUs of 16 GiB``."""
    number = f"{count} GPU" + ("s" if count > 1 else "")
    return f"{number} of {cap_bytes // GIB} GiB" if cap_bytes else number


def krasis_rows(depth: str, gpus: Sequence[int], sizes: Sizes, logits: Path) -> list[Row]:
    """Krasis on every number of cards, capped, every round; once by the CPU alone, and once with all memory
    of the GPUs where it runs by itself.
    """
    counts = [count for count in gpus if count]
    rows = [_krasis(depth, count, sizes, sizes.cap_bytes, logits) for count in counts]
    if depth == WHOLE:
        rows += [_krasis(depth, count, sizes, 0, logits) for count in counts]
    return [*rows, _krasis_cpu(depth, sizes)]


def _krasis(depth: str, count: int, sizes: Sizes, cap_bytes: int, logits: Path) -> Row:
    options = {
        "--gpus": count,
        "--device": sizes.device,
        "--prompt": sizes.prompt,
        "--generate": sizes.generate,
        "--threads": sizes.threads,
        "--vram": cap_bytes,
        "--logits": logits / f"{depth}-{count}-{cap_bytes}.npy",
    }
    arguments = (sys.executable, *RUNNER, "BUNDLE", "--warm-up", *_flat(options))
    return Row(
        f"{KRASIS}, {cards(count, cap_bytes)}" + ("" if cap_bytes else ", all their memory"),
        KRASIS,
        depth,
        count,
        arguments,
        sizes.prompt,
        sizes.generate,
        sizes.visible(count),
        every_round=bool(cap_bytes),
    )


def _krasis_cpu(depth: str, sizes: Sizes) -> Row:
    prompt, generate = _cpu_sizes(sizes)
    options = {"--gpus": 0, "--threads": sizes.threads, "--prompt": prompt, "--generate": generate}
    arguments = (sys.executable, *RUNNER, "BUNDLE", *_flat(options))
    return Row(f"{KRASIS}, CPU alone", KRASIS, depth, 0, arguments, prompt, generate, NO_GPU)


def llama_rows(
    binary: Path | None, missing: str, gpus: Sequence[int], sizes: Sizes, kind: Kind, num_layers: int
) -> list[Row]:
    """llama.cpp: its best flags on every number of cards and its default ones, every round; once each, what
    else was tried.
    """
    best = _pairs(LLAMA_FLAGS) | _batch(sizes.prompt)
    fitting = layers_in_vram(kind, num_layers, sizes)
    half = max(1, sizes.threads // 2)
    tried: list[tuple[str, dict[str, str]]] = [
        (f"-ub {size}", best | {"-b": str(max(size, 2048)), "-ub": str(size)}) for size in UBATCHES
    ]
    tried.insert(1, (f"experts of {fitting} layers in VRAM", best | {"-ncmoe": str(num_layers - fitting)}))
    tried.append((f"{half} threads", best | {"-t": str(half)}))
    counts = [count for count in gpus if count]

    def row(name: str, count: int, flags: Mapping[str, str], env: Mapping[str, str], every: bool) -> Row:
        shown = {"-t": str(sizes.threads)} | dict(flags)
        arguments = (str(binary), "-m", "GGUF", *_flat(shown), *_bench_sizes(sizes.prompt, sizes.generate))
        seen = {**env, **sizes.visible(count)}
        subject = f"{LLAMA}, {cards(count)}, {name}"
        return Row(subject, LLAMA, BOTH, count, arguments, sizes.prompt, sizes.generate, seen, every, missing)

    rows = [row(BEST, count, best, LLAMA_ENV, True) for count in counts]
    if counts:
        # What llama-bench does by itself; but the experts must stay in RAM, as on the reference's cards.
        rows.append(row(DEFAULT, counts[0], {"-ngl": "99", "-ncmoe": "999"}, {}, True))
        rows += [row(name, counts[0], flags, LLAMA_ENV, False) for name, flags in tried]
    return [*rows, _llama_cpu(binary, missing, sizes)]


def _llama_cpu(binary: Path | None, missing: str, sizes: Sizes) -> Row:
    prompt, generate = _cpu_sizes(sizes)
    flags = {"-t": str(sizes.threads), "-lm": "none", "--repack": "1", "-fa": "on", "-ngl": "0"}
    rest = ("--no-warmup", *_bench_sizes(prompt, generate))
    arguments = (str(binary), "-m", "GGUF", *_flat(flags), *rest)
    return Row(f"{LLAMA}, CPU alone", LLAMA, BOTH, 0, arguments, prompt, generate, NO_GPU, missing=missing)


def ik_rows(binary: Path | None, missing: str, gpus: Sequence[int], sizes: Sizes) -> list[Row]:
    """ik_llama.cpp with its best flags and the experts in RAM, every round; once each, others."""
    best = {"-t": str(sizes.threads)} | _pairs(IK_FLAGS) | _batch(sizes.prompt)
    sized = _bench_sizes(sizes.prompt, sizes.generate, progress=False)

    def row(name: str, count: int, flags: Mapping[str, str], every: bool) -> Row:
        arguments = (str(binary), "-m", "GGUF", *_flat(flags), *sized)
        subject, seen = f"{IK}, {cards(count)}, {name}", sizes.visible(count)
        return Row(subject, IK, BOTH, count, arguments, sizes.prompt, sizes.generate, seen, every, missing)

    counts = [count for count in gpus if count]
    rows = [row(BEST, count, best, True) for count in counts]
    if counts and not missing:
        rows.append(row("-rtr 1", counts[0], best | {"-rtr": "1"}, False))
        rows.append(row("-ub 2048", counts[0], best | {"-b": "2048", "-ub": "2048"}, False))
    return rows


def layers_in_vram(kind: Kind, num_layers: int, sizes: Sizes) -> int:
    """Layers whose experts llama.cpp can keep on a capped card beside the rest of the model."""
    dense = kind.gguf_bytes(num_layers) - kind.expert_bytes(num_layers)
    spare = sizes.cap_bytes - dense - LLAMA_COMPUTE_BYTES
    return max(0, min(num_layers, spare // kind.expert_bytes(1)))


def _cpu_sizes(sizes: Sizes) -> tuple[int, int]:
    """Less than on GPUs: peers take minutes for ten thousand tokens."""
    return min(sizes.prompt, CPU_PROMPT), min(sizes.generate, CPU_GENERATE)


def _batch(prompt: int) -> dict[str, str]:
    """The whole prompt in one micro-batch: every micro-batch copies the experts to the GPU anew."""
    size = str(max(512, -(-prompt // 1024) * 1024))
    return {"-b": size, "-ub": size}


def _bench_sizes(prompt: int, generate: int, *, progress: bool = True) -> tuple[str, ...]:
    """llama-bench: the prompt by itself, then the prompt with tokens after it, in one loading of the model.

    Its option for tokens at a depth (-d) would measure the prompt at that depth too.
    """
    sizes = ("-p", str(prompt), "-n", "0", "-pg", f"{prompt},{generate}", "-r", "1", "-o", "json")
    return (*sizes, "--progress") if progress else sizes


def _pairs(flags: Sequence[str]) -> dict[str, str]:
    """Flags and their values: llama-bench takes a flag given twice as two things to measure."""
    return dict(zip(flags[::2], flags[1::2], strict=True))


def _flat(options: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(str(part) for pair in options.items() for part in pair)
