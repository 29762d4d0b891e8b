"""The programs compared: how each is called with its best known flags, and what its output says."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KRASIS, LLAMA, IK, KT = "krasis", "llama.cpp", "ik_llama.cpp", "kt-kernel"


@dataclass(frozen=True, slots=True)
class Work:
    """What a program is asked to do: ppN for every prompt, tgN for every generate, repeats times each."""

    model: str
    bundle: Path
    gguf: Path
    threads: int
    prompts: tuple[int, ...] = ()
    generate: tuple[int, ...] = ()
    repeats: int = 1


@dataclass(frozen=True, slots=True)
class Parsed:
    """Samples by case and metric, and the version that the program says it is."""

    cases: dict[str, dict[str, tuple[float, ...]]]
    version: str


@dataclass(frozen=True, slots=True)
class LlamaBench:
    """A llama-bench, of llama.cpp or ik_llama.cpp. missing: why there is none, the error of every run.

    whole_prompt: take a prompt in one physical batch, as pays on GPUs; on a CPU 512 are faster.
    """

    name: str
    binary: Path | None
    flags: tuple[str, ...]
    missing: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    whole_prompt: bool = False

    def arguments(self, work: Work) -> list[str]:
        """The command line."""
        sizes = [("-p", work.prompts), ("-n", work.generate)]
        arguments = [str(self.binary), "-m", str(work.gguf), "-t", str(work.threads), *self.flags]
        for flag, values in sizes:
            arguments += [flag, ",".join(str(value) for value in values) or "0"]
        if work.prompts and self.whole_prompt:
            batch = str(max(512, *work.prompts))
            arguments += ["-b", batch, "-ub", batch]
        return [*arguments, "-r", str(work.repeats), "-o", "json"]

    def parse(self, output: str) -> Parsed:
        """See ``parse_llama_bench``."""
        return parse_llama_bench(output)


@dataclass(frozen=True, slots=True)
class Krasis:
    """krasis_runner.py on the bundle. isa: ``auto`` or one to be held to. gpus: 0: the CPU alone.

    stream: no expert may stay on a GPU, as if the model were far larger than its memory.
    """

    name: str = KRASIS
    isa: str = "auto"
    missing: str = ""
    gpus: int = 0
    stream: bool = False
    env: Mapping[str, str] = field(default_factory=dict)

    def arguments(self, work: Work) -> list[str]:
        """The command line."""
        listed = {"-p": work.prompts, "-n": work.generate}
        arguments = [sys.executable, "-m", "scripts.bench.krasis_runner", str(work.bundle)]
        arguments += ["-t", str(work.threads), "-r", str(work.repeats)]
        for flag, values in listed.items():
            arguments += [flag, ",".join(str(value) for value in values) or "0"]
        if work.prompts:
            arguments += ["--chunk", str(max(512, *work.prompts))]
        if self.gpus:
            arguments += ["--gpus", str(self.gpus), *(["--stream"] if self.stream else [])]
        return arguments + (["--isa", self.isa] if self.isa != "auto" else [])

    def parse(self, output: str) -> Parsed:
        """See ``parse_krasis``."""
        return parse_krasis(output)


Program = LlamaBench | Krasis


def llama_cpp(binary: Path | None, missing: str = "") -> LlamaBench:
    """llama.cpp: without a mapping its weights can be repacked for the CPU, and they are."""
    return LlamaBench(LLAMA, binary, ("-lm", "none", "--repack", "1", "-fa", "on"), missing)


def ik_llama_cpp(binary: Path | None, missing: str = "") -> LlamaBench:
    """ik_llama.cpp: repacked at run time, in huge pages, with every fusion that it offers for this model."""
    repacked = ("-rtr", "1", "-mmp", "0", "-thp", "1")
    fused = ("-fa", "1", "-fmoe", "1", "-mqkv", "1", "-muge", "1", "-ger", "1")
    return LlamaBench(IK, binary, repacked + fused, missing)


def last_json(output: str, opening: str) -> Any:
    """The JSON value in the output, between any log lines. Raises ValueError if there is none."""
    lines = output.splitlines()
    for index, line in enumerate(lines):
        if line.startswith(opening):
            try:
                return json.JSONDecoder().raw_decode("\n".join(lines[index:]))[0]
            except json.JSONDecodeError:
                continue
    raise ValueError(f"no JSON in the output: {output[-200:]!r}")


def parse_llama_bench(output: str) -> Parsed:
    """``-o json`` of either llama-bench. Raises ValueError for anything else."""
    rows: Sequence[Mapping[str, Any]] = last_json(output, "[")
    cases, version = {}, ""
    for row in rows:
        try:
            prompt, generate = int(row["n_prompt"]), int(row["n_gen"])
            samples = tuple(float(sample) for sample in row["samples_ts"])
            version = f"{row['build_commit']} ({row['build_number']})"
        except KeyError as error:
            raise ValueError(f"llama-bench gave no {error}") from error
        name = f"pp{prompt}" if prompt else f"tg{generate}"
        if not samples or not all(sample > 0 for sample in samples):
            raise ValueError(f"llama-bench gave no speed for {name}: {samples}")
        cases[name] = {"tokens_per_s": samples}
    if not cases:
        raise ValueError("llama-bench measured nothing")
    return Parsed(cases, version)


def parse_krasis(output: str) -> Parsed:
    """What krasis_runner.py prints. Raises ValueError for anything else."""
    result = last_json(output, "{")
    cases = {
        name: {metric: tuple(float(one) for one in samples) for metric, samples in case.items()}
        for name, case in result["cases"].items()
    }
    for case in cases.values():
        case["huge_page_fraction"] = (float(result["huge_page_fraction"]),)
        case["token_bytes"] = (float(result["token_bytes"]),)
    return Parsed(cases, f"library {result['library_sha256']}, {result['isa']}")
