#!/usr/bin/env python3
"""Prefill of a bundle on 1, 2, ... GPUs of this machine: seconds, speed-up, and whether all give the same
logits.

    python -m scripts.models.make_random_bundle --shape qwen3-235b-a22b --layers 8 --out /dev/shm/8.krasis
    python -m scripts.bench_ranks /dev/shm/8.krasis --gpus 1,2 --tokens 10000

Every number of GPUs is a process of its own. The first prompt is not timed: it waits for the experts to be in
memory. Exit code 1 if logits differ from one GPU's by more than --tolerance of their norm.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from krasis.runtime.distributed.launch import open_engine
from krasis.runtime.settings import EngineSettings

CHECKED = 128  # tokens of which all logits are compared
DECODED = 16


def measure(bundle: Path, count: int, tokens: int, repeats: int, device: str, out: Path) -> dict[str, Any]:
    """One number of GPUs. Writes logits to out."""
    settings = EngineSettings(device=device, context=tokens + CHECKED + DECODED, prefault=False)
    begin = time.perf_counter()
    engine = open_engine(bundle, settings, count)
    if engine is None:
        raise SystemExit(0)
    with engine:
        opened_s = time.perf_counter() - begin
        random = np.random.default_rng(1)
        vocab = engine.architecture.vocab_size
        prompt = random.integers(0, vocab, tokens).tolist()
        checked = engine.prefill(prompt[:CHECKED], all_logits=True)
        seconds, last = [], None
        for _ in range(repeats + 1):
            engine.reset()
            begin = time.perf_counter()
            last = engine.prefill(prompt)
            seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        for token in random.integers(0, vocab, DECODED).tolist():
            engine.decode(token)
        decode_s = (time.perf_counter() - begin) / DECODED
        # A turn after decoded tokens: the other ranks have to be sent those.
        turn = engine.prefill(prompt[:32])
        np.savez(out, checked=checked, last=last, turn=turn)
        return {
            "gpus": count,
            "tokens": tokens,
            "description": engine.description,
            "placement": engine.placement,
            "open_s": opened_s,
            "first_s": seconds[0],
            "prefill_s": statistics.median(seconds[1:]),
            "samples_s": seconds[1:],
            "decode_s": decode_s,
        }


def compare(one: Path, other: Path) -> dict[str, float]:
    """Relative differences of logits, and the share of tokens whose most likely successor is the same."""
    a, b = np.load(one), np.load(other)
    found = {
        name: float(np.linalg.norm(b[name] - a[name]) / np.linalg.norm(a[name]))
        for name in ("checked", "last")
    }
    found["same_choice"] = float((a["checked"].argmax(-1) == b["checked"].argmax(-1)).mean())
    return found


def run_one(count: int, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """``measure`` in a process of its own."""
    command = [
        sys.executable,
        __file__,
        *arguments,
        "--one",
        str(count),
        "--out",
        str(folder / f"{count}.npz"),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{count} GPUs: exit code {done.returncode}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--gpus", default="1,2", show_default=True)
@click.option("--tokens", default=10_000, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--device", type=click.Choice(["cuda", "double"]), default="cuda", show_default=True)
@click.option("--tolerance", default=0.02, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures to a file.")
@click.option("--one", type=int, hidden=True)
@click.option("--out", type=click.Path(path_type=Path), hidden=True)
def main(
    bundle: Path,
    gpus: str,
    tokens: int,
    repeats: int,
    device: str,
    tolerance: float,
    json_path: Path | None,
    one: int | None,
    out: Path | None,
) -> None:
    if one is not None and out is not None:
        print(json.dumps(measure(bundle, one, tokens, repeats, device, out)))
        return
    counts = [int(text) for text in gpus.split(",")]
    arguments = [str(bundle), "--tokens", str(tokens), "--repeats", str(repeats), "--device", device]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            row = run_one(count, Path(folder), arguments)
            row["difference"] = compare(Path(folder) / f"{counts[0]}.npz", Path(folder) / f"{count}.npz")
            row["speed_up"] = rows[0]["prefill_s"] / row["prefill_s"] if rows else 1.0
            rows.append(row)
            rate = f"{tokens / row['prefill_s']:.0f} tokens/s, x{row['speed_up']:.2f}"
            print(
                f"{count} GPUs: open {row['open_s']:.1f} s, first prompt {row['first_s']:.2f} s, then "
                f"{row['prefill_s']:.3f} s ({rate}), "
                f"decode {1 / row['decode_s']:.1f} tokens/s; difference {row['difference']}",
                flush=True,
            )
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=1))
    worst = max(max(row["difference"]["checked"], row["difference"]["last"]) for row in rows)
    if worst > tolerance:
        raise click.ClickException(f"logits differ by {worst:.4f} of their norm, more than {tolerance}")


if __name__ == "__main__":
    main()
