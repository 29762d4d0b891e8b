#!/usr/bin/env python3
"""Held-out perplexity, side by side: the BF16 checkpoint, and its bundle with Q8, CPU INT4 and GPU INT4
experts.

    python -m scripts.perplexity --model tests/assets/tiny-qwen3-moe --text
    tests/assets/tiny-qwen3-moe/heldout.txt

BF16 is transformers in float32 on the checkpoint. The CPU formats run through the int8 kernels, as
krasis-run does; the GPU
format (Marlin INT4) runs through the float32 reference, on a CPU too. All bundles have INT8 attention and
output head.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from krasis.convert.conversion import convert, prepare
from krasis.convert.progress import Reporter
from krasis.convert.settings import ConvertSettings
from krasis.formats.errors import KrasisError, UsageError
from krasis.runtime import Engine, EngineSettings

Logits = npt.NDArray[np.float32]
Model = Callable[[list[int]], Logits]  # tokens -> logits [tokens, vocab]


@dataclass(frozen=True, slots=True)
class Window:
    """Part of the text that a model sees at once; targets from first_target on are counted here."""

    tokens: list[int]
    first_target: int


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the result. ratio: perplexity over BF16's."""

    name: str
    perplexity: float
    ratio: float | None
    seconds: float


def windows(tokens: Sequence[int], context: int, stride: int) -> Iterator[Window]:
    """Windows of at most context tokens, stride apart, that count every token but the first exactly once."""
    # stride is at least one less than the context: a target needs a token before it in its window.
    counted = 1
    for end in range(min(context, len(tokens)), len(tokens) + stride, stride):
        stop = min(end, len(tokens))
        begin = max(0, stop - context)
        if stop > counted:
            yield Window(list(tokens[begin:stop]), counted - begin)
        counted = max(counted, stop)


def negative_log_likelihood(logits: Logits, window: Window) -> tuple[float, int]:
    """(sum, number) over the window's own targets."""
    rows = logits[window.first_target - 1 : -1].astype(np.float64)
    targets = np.array(window.tokens[window.first_target :])
    peak = rows.max(axis=1, keepdims=True)
    normaliser = peak[:, 0] + np.log(np.exp(rows - peak).sum(axis=1))
    return float((normaliser - rows[np.arange(len(targets)), targets]).sum()), len(targets)


def perplexity(name: str, model: Model, parts: Sequence[Window], baseline: float | None) -> Row:
    """exp of the mean negative log likelihood over all windows."""
    begin = time.perf_counter()
    total, count = 0.0, 0
    for window in tqdm(parts, desc=name, unit="window", leave=False, disable=not sys.stderr.isatty()):
        loss, targets = negative_log_likelihood(model(window.tokens), window)
        total, count = total + loss, count + targets
    value = math.exp(total / count)
    return Row(name, value, value / baseline if baseline else None, time.perf_counter() - begin)


def checkpoint_model(folder: Path) -> Model:
    """The checkpoint as it is, by transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train(False)

    def run(tokens: list[int]) -> Logits:
        with torch.no_grad():
            logits: Logits = model(torch.tensor([tokens])).logits[0].numpy()
        return logits

    return run


def bundle_model(engine: Engine) -> Model:
    """A bundle, every window from an empty cache."""

    def run(tokens: list[int]) -> Logits:
        engine.reset()
        return engine.prefill(tokens, all_logits=True)

    return run


def build(sources: list[Path], out: Path, settings: ConvertSettings) -> Path:
    """Converts, without a word."""
    reporter = Reporter(0)
    convert(prepare(sources, out, settings, reporter), reporter)
    return out


def measure(
    sources: list[Path],
    bundles: dict[str, Path],
    text: str,
    context: int,
    stride: int,
    threads: int,
    limit: int | None,
) -> tuple[list[Row], int]:
    """All rows, and the number of tokens."""
    base = EngineSettings(context=context, threads=threads)
    exact = EngineSettings(context=context, threads=threads, activations="float32", experts="gpu")
    with Engine.open(bundles["q8"], base) as engine:
        tokens = engine.text.tokenizer.encode(text)[:limit]
        parts = list(windows(tokens, context, stride))
        if not parts:
            raise UsageError("the text is too short to measure anything", got=f"{len(tokens)} tokens")
        rows = [perplexity("BF16", checkpoint_model(sources[0]), parts, None)]
        baseline = rows[0].perplexity
        rows.append(perplexity("Q8 experts", bundle_model(engine), parts, baseline))
    with Engine.open(bundles["int4"], base) as engine:
        rows.append(perplexity("INT4 experts (CPU, blocks of 32)", bundle_model(engine), parts, baseline))
    with Engine.open(bundles["q8"], exact) as engine:
        layout = engine.bundle.manifest.layouts["gpu"]
        rows.append(perplexity(f"INT4 experts (GPU, {layout})", bundle_model(engine), parts, baseline))
    return rows, len(tokens)


def report(rows: list[Row], num_tokens: int) -> str:
    """The table."""
    width = max(len(row.name) for row in rows)
    lines = [f"{num_tokens} tokens", f"{'':{width}}  perplexity   vs BF16       time"]
    for row in rows:
        change = "" if row.ratio is None else f"{100 * (row.ratio - 1):+.2f} %"
        lines.append(f"{row.name:{width}}  {row.perplexity:10.4f}  {change:>8}  {row.seconds:7.1f} s")
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--model", "checkpoint", required=True, type=click.Path(path_type=Path), help="Hugging Face folder, BF16."
)
@click.option("--gguf", type=click.Path(path_type=Path), help="Take the Q8 experts from this GGUF.")
@click.option(
    "--text", "text_file", required=True, type=click.Path(path_type=Path), help="Held-out UTF-8 text."
)
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="Q8 bundle to use, with a GPU tier [default: made]."
)
@click.option(
    "--int4-bundle", type=click.Path(path_type=Path), help="Bundle with INT4 CPU experts [default: made]."
)
@click.option(
    "--context", default=512, show_default=True, type=click.IntRange(2), help="Tokens a model sees at once."
)
@click.option(
    "--stride", type=click.IntRange(1), help="Tokens from window to window [default: half the context]."
)
@click.option("--max-tokens", type=click.IntRange(2), help="Measure the text's first tokens only.")
@click.option(
    "--gpu-group", default=128, show_default=True, help="Group of the GPU experts, if a bundle is made."
)
@click.option("--threads", default=0, help="CPU threads [default: all].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(checkpoint: Path, text_file: Path, context: int, **options: Any) -> None:
    """Perplexity of a checkpoint and of what conversion makes of it."""
    stride = options["stride"] or context // 2
    sources = [checkpoint, *([options["gguf"]] if options["gguf"] else [])]
    try:
        with tempfile.TemporaryDirectory(prefix="krasis-perplexity-") as scratch:
            q8 = ConvertSettings(gpu_group=options["gpu_group"], num_threads=options["threads"])
            int4 = ConvertSettings(tiers=("cpu",), cpu_format="int4", num_threads=options["threads"])
            bundles = {
                "q8": options["bundle"] or build(sources, Path(scratch) / "q8.krasis", q8),
                "int4": options["int4_bundle"] or build([checkpoint], Path(scratch) / "int4.krasis", int4),
            }
            text = text_file.read_text(encoding="utf-8")
            rows, num_tokens = measure(
                sources,
                bundles,
                text,
                context,
                min(stride, context - 1),
                options["threads"],
                options["max_tokens"],
            )
    except KrasisError as error:
        click.echo(f"perplexity: {error}", err=True)
        sys.exit(error.exit_code)
    if options["as_json"]:
        record = {"num_tokens": num_tokens, "context": context, "stride": stride}
        click.echo(
            json.dumps(
                {**record, "rows": [{name: getattr(row, name) for name in Row.__slots__} for row in rows]}
            )
        )
    else:
        click.echo(report(rows, num_tokens))


if __name__ == "__main__":
    main()
