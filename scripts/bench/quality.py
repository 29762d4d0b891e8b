"""Stage ``quality``: what each format costs a trained model, by one evaluation in float32 for all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scripts.bench import convert, process
from scripts.bench.machine import load_1m
from scripts.bench.peers import KRASIS, LLAMA
from scripts.bench.provision import Found
from scripts.bench.record import Record, Run
from scripts.bench.speed import Clock, Say
from scripts.bench.weights import BundleSource, CheckpointSource, GgufSource, Source, relative_mse

STAGE = "quality"
CONTEXT = 512
EVERY = 2  # of the windows one is taken: about 24,000 tokens of the tests' model
EXPERTS_NAMES = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

Floats = npt.NDArray[np.float32]
Logits = Callable[[list[int]], Floats]  # tokens -> [tokens, vocab]


@dataclass(frozen=True, slots=True)
class Format:
    """A format under test. tier: of a bundle, empty for a GGUF; options: of the tool that makes it."""

    name: str
    options: tuple[str, ...]
    tier: str = ""


FORMATS = (
    Format(f"{KRASIS} cpu q8", ("--tiers", "cpu"), "cpu"),
    Format(f"{LLAMA} Q8_0", ("Q8_0",)),
    Format(f"{KRASIS} gpu int4 g128", ("--tiers", "gpu", "--gpu-group", "128"), "gpu"),
    Format(f"{KRASIS} gpu int4 g64", ("--tiers", "gpu", "--gpu-group", "64"), "gpu"),
    Format(f"{KRASIS} gpu int4 g32", ("--tiers", "gpu", "--gpu-group", "32"), "gpu"),
    Format(f"{KRASIS} cpu int4", ("--tiers", "cpu", "--cpu-format", "int4"), "cpu"),
    Format(f"{LLAMA} Q4_0", ("Q4_0",)),
    Format(f"{LLAMA} Q4_K_M", ("Q4_K_M",)),
)


@dataclass(slots=True)
class Mixed:
    """Experts of one source, everything else of another."""

    experts: Source
    rest: Source
    num_layers: int
    num_experts: int

    def dense(self, name: str) -> Floats:
        return self.rest.dense(name)

    def expert(self, layer: int, number: int) -> tuple[Floats, Floats, Floats]:
        return self.experts.expert(layer, number)

    def expert_bits(self) -> float:
        return self.experts.expert_bits()


def torch_model(folder: Path, source: Source) -> Logits:
    """transformers' model in float32 with all weights from the source."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # Its threads spin while they wait for each other: beside other work, one is faster than two.
    torch.set_num_threads(1)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False  # formats may store the head apart from the embedding
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    state = {name: torch.from_numpy(np.array(_tensor(source, name))) for name in model.state_dict()}
    model.load_state_dict(state, strict=True)
    model.train(False)

    def run(tokens: list[int]) -> Floats:
        with torch.no_grad():
            logits: Floats = model(torch.tensor([tokens])).logits[0].numpy()
        return logits

    return run


def _tensor(source: Source, name: str) -> Floats:
    """By transformers' name; it fuses a layer's experts."""
    fused = [ending for ending in EXPERTS_NAMES if name.endswith(ending)]
    if not fused:
        return source.dense(name)
    layer = int(name.split(".")[2])
    experts = [source.expert(layer, number) for number in range(source.num_experts)]
    if fused[0] == EXPERTS_NAMES[0]:
        return np.stack([np.concatenate([gate, up]) for gate, up, _ in experts])
    return np.stack([down for _, _, down in experts])


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Over the last dimension, in float64."""
    rows = logits.astype(np.float64)  # sums over the vocabulary lose digits in float32
    rows -= rows.max(axis=-1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=-1, keepdims=True))
    return rows


def compare(
    model: Logits, exact: Sequence[Floats], windows: Sequence[list[int]]
) -> dict[str, tuple[float, ...]]:
    """Perplexity, mean KL divergence in nats, share of equal first choices. exact: log probabilities."""
    loss = divergence = 0.0
    same = count = targets = 0
    for tokens, reference in zip(windows, exact, strict=True):
        mine, theirs = log_softmax(model(tokens)), reference.astype(np.float64)
        divergence += float((np.exp(theirs) * (theirs - mine)).sum())
        same += int((mine.argmax(axis=-1) == theirs.argmax(axis=-1)).sum())
        count += len(tokens)
        loss -= float(mine[np.arange(len(tokens) - 1), tokens[1:]].sum())
        targets += len(tokens) - 1
    return {
        "perplexity": (math.exp(loss / targets),),
        "kl_nats": (divergence / count,),
        "top1_share": (same / count,),
    }


def windows_of(folder: Path) -> list[list[int]]:
    """The held-out text in windows that do not overlap."""
    from tokenizers import Tokenizer

    text = (folder / "heldout.txt").read_text("utf-8")
    tokens: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    starts = range(0, len(tokens), CONTEXT * EVERY)
    return [part for first in starts if len(part := tokens[first : first + CONTEXT]) > 1]


def build(
    chosen: Format, folder: Path, quantize: Found, work: Path
) -> tuple[Source | None, process.Outcome | None]:
    """Makes the format. No source with an outcome that has failed, or without any if the tool is missing."""
    out = work / f"quality{'.krasis' if chosen.tier else '.gguf'}"
    convert.remove(out)
    if chosen.tier:
        command = [
            convert.tool("krasis-convert"),
            str(folder),
            "-o",
            str(out),
            *chosen.options,
            "--restart",
            "-q",
        ]
    elif quantize.path is None or not quantize.path.exists():
        return None, None
    else:
        source = convert.bf16_gguf(folder, work)
        command = [str(quantize.path), str(source), str(out), *chosen.options]
    outcome = process.run(command)
    if outcome.error:
        return None, outcome
    return (BundleSource(out, chosen.tier) if chosen.tier else GgufSource(out)), outcome


def evaluate(
    chosen: Format,
    number: int,
    folder: Path,
    built: tuple[Source | None, process.Outcome | None],
    exact: Any,
    missing: str,
) -> Iterator[Run]:
    """The format's two runs: all that its tool quantises, and its experts alone."""
    source, outcome = built
    plain, reference, windows = exact
    facts: dict[str, Any] = {} if outcome is None else {"command": outcome.command, "wall_s": outcome.wall_s}
    for case in ("whole", "experts"):
        common: dict[str, Any] = {
            "stage": STAGE,
            "model": folder.name,
            "case": case,
            "threads": 0,
            "subject": chosen.name,
        }
        if source is None:
            yield Run(round=number, error=missing if outcome is None else outcome.error, **common, **facts)
            continue
        started, load = time.time(), load_1m()
        mixed: Source = (
            source if case == "whole" else Mixed(source, plain, plain.num_layers, plain.num_experts)
        )
        metrics = compare(torch_model(folder, mixed), reference, windows)
        metrics["bits_per_weight"] = (source.expert_bits(),)
        metrics["relative_mse"] = (relative_mse(source, plain, plain.num_experts),)
        yield Run(round=number, metrics=metrics, started_s=started, load_1m=load, **common, **facts)


def run_stage(record: Record, folder: Path, quantize: Found, work: Path, clock: Clock, say: Say) -> bool:
    """Every format that the record lacks, and BF16 itself. A run's round is its format's place."""
    held = {run.subject for run in record.runs(STAGE) if run.model == folder.name}
    lacking = [(number, chosen) for number, chosen in enumerate(FORMATS, 1) if chosen.name not in held]
    if not lacking:
        return True
    if not clock():
        return False
    plain, windows = CheckpointSource(folder), windows_of(folder)
    model = torch_model(folder, plain)
    reference = [log_softmax(model(tokens)).astype(np.float32) for tokens in windows]
    itself = {**compare(model, reference, windows), "bits_per_weight": (16.0,), "relative_mse": (0.0,)}
    common: dict[str, Any] = {
        "stage": STAGE,
        "model": folder.name,
        "threads": 0,
        "subject": "BF16",
        "round": 0,
    }
    record.add([Run(case=case, metrics=itself, **common) for case in ("whole", "experts")])
    for number, chosen in lacking:
        if not clock():
            return False
        built = build(chosen, folder, quantize, work)
        missing = quantize.missing or f"{quantize.path} is not there"
        for run in evaluate(chosen, number, folder, built, (plain, reference, windows), missing):
            record.add([run])
            say(f"quality {run.case} {chosen.name}: {run.error or describe(run)}")
    return True


def describe(run: Run) -> str:
    """For the terminal."""
    return ", ".join(f"{name} {values[0]:.5g}" for name, values in run.metrics.items())
