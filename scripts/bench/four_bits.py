"""A model's four-bit forms, made once in the work folder: Q4_0 for llama.cpp, int4 CPU experts for Krasis."""

from __future__ import annotations

from pathlib import Path

from scripts.bench import convert, process
from scripts.bench.provision import Found
from scripts.bench.speed import Model

TIMEOUT_S = 24 * 3600.0


def q4_0_gguf(model: Model, quantize: Found, work: Path, threads: int) -> Found:
    """From the Q8_0 GGUF by llama-quantize: values are random or nearly exact there, speed is what counts."""
    out = work / f"{model.name}-q4_0.gguf"
    if out.exists():
        return Found(out)
    if quantize.path is None or not quantize.path.exists():
        return Found(None, quantize.missing or f"{quantize.path} is not there")
    part = out.with_suffix(".part")
    command = [str(quantize.path), "--allow-requantize", str(model.gguf), str(part), "Q4_0", str(threads)]
    return _made(command, part, out)


def int4_bundle(model: Model, work: Path) -> Found:
    """From the same folder and GGUF as the model's other bundle, with its GPU experts too."""
    out = work / f"{model.name}-int4.krasis"
    if (out / "manifest.json").exists():
        return Found(out)
    command = [convert.tool("krasis-convert"), str(model.folder), str(model.gguf), "-o", str(out)]
    return _made([*command, "--cpu-format", "int4", "--quiet"], out, out)


def _made(command: list[str], written: Path, out: Path) -> Found:
    outcome = process.run(command, timeout_s=TIMEOUT_S)
    if outcome.error:
        return Found(None, f"could not be made: {outcome.error}")
    if written != out:
        written.rename(out)
    return Found(out)
