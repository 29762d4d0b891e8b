#!/usr/bin/env python3
"""Decode of a bundle on 1, 2, ... GPUs of this machine, with all their memory and with a small card's.

    python -m scripts.models.make_random_bundle --shape qwen3-235b-a22b --layers 16 --out /dev/shm/16.krasis
    python -m scripts.bench_rank_decode /dev/shm/16.krasis --gpus 1,2 --vram-gib 0,16

Every row is a process of its own: a prompt, some tokens that are not timed, then tokens of one sequence and
of --rows sequences. "rank 0 alone" is the same process with the other GPUs left idle. Exit code 1 if logits
of resident experts differ from one GPU's by more than --tolerance of their norm.
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

from krasis.runtime.batch import batch_of
from krasis.runtime.distributed.launch import open_engine
from krasis.runtime.settings import EngineSettings

WARM_UP = 12


class Sequences:
    """As many as rows, each with the same prompt, in a backend's slots; tokens are random."""

    def __init__(self, backend: Any, vocab: int, prompt: int, rows: int) -> None:
        self._backend, self._vocab, self._random = backend, vocab, np.random.default_rng(1)
        tokens = self._random.integers(0, vocab, prompt).tolist()
        for _ in range(rows - 1):
            backend.state.open()
        self.prompt_logits = backend.run(batch_of([(slot, 0, tokens, "last") for slot in range(rows)])).copy()

    def decode(self, rows: int) -> tuple[float, np.ndarray]:
        """Seconds of a token of each of the first rows sequences, and their logits."""
        ids = self._random.integers(0, self._vocab, rows).tolist()
        length = self._backend.state.length
        batch = batch_of([(slot, length(slot), [token], "last") for slot, token in enumerate(ids)])
        begin = time.perf_counter()
        logits = self._backend.run(batch)
        return time.perf_counter() - begin, logits


def timed(sequences: Sequences, backend: Any, rows: int, tokens: int) -> dict[str, Any]:
    """The median of some tokens, and the last one's split."""
    for _ in range(WARM_UP):
        sequences.decode(rows)
    seconds = [sequences.decode(rows)[0] for _ in range(tokens)]
    split = getattr(backend, "_inner", backend).last_decode_split
    return {
        "rows": rows,
        "median_s": statistics.median(seconds),
        "best_s": min(seconds),
        "tokens_per_s": rows / statistics.median(seconds),
        "split": split,
    }


def measure(
    bundle: Path, count: int, vram_gib: float, rows: int, tokens: int, prompt: int, device: str, out: Path
) -> dict[str, Any]:
    """One row. Writes logits of a token to out."""
    num_positions = prompt + 4 * (tokens + WARM_UP) + 8
    settings = EngineSettings(
        device=device,
        context=num_positions,
        prefault=False,
        slots=rows,
        vram_bytes=int(vram_gib * 2**30) or None,
    )
    begin = time.perf_counter()
    engine = open_engine(bundle, settings, count)
    if engine is None:
        raise SystemExit(0)
    with engine:
        opened_s = time.perf_counter() - begin
        backend: Any = engine._backend
        sequences = Sequences(backend, engine.bundle.spec.vocab, prompt, rows)
        np.savez(out, prompt=sequences.prompt_logits, token=sequences.decode(rows)[1])
        runs = {"1 row": timed(sequences, backend, 1, tokens)}
        if rows > 1:
            runs[f"{rows} rows"] = timed(sequences, backend, rows, tokens)
        placement = engine.placement[1]
        if count > 1 and backend.decodes_between_layers:
            backend._decode.end()
            backend._decode._link = None
            runs["1 row, rank 0 alone"] = timed(sequences, backend, 1, tokens)
        return {
            "gpus": count,
            "vram_gib": vram_gib,
            "decode": placement,
            "open_s": opened_s,
            "runs": runs,
            "description": engine.description,
        }


def run_one(key: tuple[int, float], out: Path, arguments: list[str]) -> dict[str, Any]:
    """``measure`` in a process of its own."""
    command = [sys.executable, "-m", "scripts.bench_rank_decode", *arguments]
    command += ["--one", f"{key[0]}:{key[1]}", "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{key[0]} GPUs, {key[1]} GiB: exit code {done.returncode}")
    report: dict[str, Any] = json.loads(done.stdout[max(0, done.stdout.rfind("\n{")) :])
    return report


def distance(one: Path, other: Path) -> dict[str, float]:
    """Of logits, relative to the norm of the first."""
    a, b = np.load(one), np.load(other)
    return {name: float(np.linalg.norm(b[name] - a[name]) / np.linalg.norm(a[name])) for name in a.files}


def show(row: dict[str, Any]) -> None:
    """One line a run."""
    for name, run in row["runs"].items():
        split = run["split"] or {}
        print(
            f"{row['gpus']} GPUs, {row['vram_gib'] or 'all'} GiB each, {name}: "
            f"{run['tokens_per_s']:.1f} tokens/s, "
            f"{1e3 * run['median_s']:.2f} ms (best {1e3 * run['best_s']:.2f}); experts on the CPU "
            f"{split.get('num_cpu_experts', 0):.0f}, on GPUs {split.get('num_gpu_experts', 0):.0f}; "
            f"open {row['open_s']:.1f} s; {row['decode']}; difference {row['difference']}",
            flush=True,
        )


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--gpus", default="1,2", show_default=True)
@click.option("--vram-gib", default="0,16", show_default=True, help="Of each GPU; 0: all there is.")
@click.option("--rows", default=4, show_default=True)
@click.option("--tokens", default=64, show_default=True)
@click.option("--prompt", default=1024, show_default=True)
@click.option("--device", type=click.Choice(["cuda", "double"]), default="cuda", show_default=True)
@click.option("--tolerance", default=0.02, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures to a file.")
@click.option("--one", hidden=True)
@click.option("--out", type=click.Path(path_type=Path), hidden=True)
def main(
    bundle: Path,
    gpus: str,
    vram_gib: str,
    rows: int,
    tokens: int,
    prompt: int,
    device: str,
    tolerance: float,
    json_path: Path | None,
    one: str | None,
    out: Path | None,
) -> None:
    if one is not None and out is not None:
        count, _, gib = one.partition(":")
        print(json.dumps(measure(bundle, int(count), float(gib), rows, tokens, prompt, device, out)))
        return
    counts, sizes = [int(text) for text in gpus.split(",")], [float(text) for text in vram_gib.split(",")]
    arguments = [str(bundle), "--rows", str(rows), "--tokens", str(tokens), "--prompt", str(prompt)]
    arguments += ["--device", device]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for gib in sizes:
            for count in counts:
                path = Path(folder) / f"{count}-{gib}.npz"
                row = run_one((count, gib), path, arguments)
                row["difference"] = distance(Path(folder) / f"{counts[0]}-{gib}.npz", path)
                show(row)
                found.append(row)
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=1))
    worst = max(
        (row["difference"]["token"] for row in found if "all experts resident" in row["decode"]), default=0.0
    )
    if worst > tolerance:
        raise click.ClickException(f"logits differ by {worst:.4f} of their norm, more than {tolerance}")


if __name__ == "__main__":
    main()
