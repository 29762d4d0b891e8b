#!/usr/bin/env python3
"""Random-weight bundles of real layer shape, written as they lie on disk: at the speed of memory, no
checkpoint.

    python -m scripts.models.make_random_bundle --shape qwen3-235b-a22b --layers 16 --out /dev/shm/big.krasis

Codes are random without a bias (4 bits: -7..7, 8 bits: -127..127), scales such that activations stay of order
one through any number of layers, norms lie around one, and router rows are normal and of equal length, so
that tokens spread evenly over the experts. Drawing and packing hundreds of gigabytes would take hours: one
pool of each kind of section is drawn, and every expert's sections are runs of it from random places. Where
they begin comes from a hash of (seed, blob, expert): the same arguments give the same bytes, whatever the
number of threads.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from krasis.formats.errors import KrasisError
from krasis.formats.layouts.cpu_tiles import TILE_BYTES
from scripts.models.model_shapes import BUNDLE_SHAPES, apply_overrides
from scripts.models.random_bundle.blobs import input_std, output_std, record_pieces
from scripts.models.random_bundle.pools import RMS_4, Pools
from scripts.models.random_bundle.request import BundleRequest, architecture_of
from scripts.models.random_bundle.write import bundle_bytes, make_bundle

__all__ = [
    "RMS_4",
    "BundleRequest",
    "Pools",
    "architecture_of",
    "bundle_bytes",
    "input_std",
    "make_bundle",
    "output_std",
    "record_pieces",
]

SIZE = click.IntRange(min=1)


@click.command()
@click.option("--shape", type=click.Choice(sorted(BUNDLE_SHAPES)), default="tiny", show_default=True)
@click.option("--layers", type=SIZE, help="num_hidden_layers")
@click.option("--experts", type=SIZE, help="num_experts")
@click.option("--vocab", type=SIZE, help="vocab_size")
@click.option("--tiers", default="gpu,cpu", show_default=True, help="gpu, cpu or both.")
@click.option("--gpu-group", type=click.Choice(["32", "64", "128"]), default="128", show_default=True)
@click.option("--cpu-format", type=click.Choice(list(TILE_BYTES)), default="q8", show_default=True)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="0: one a CPU, at most 16.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    out: Path, seed: int, tiers: str, gpu_group: str, cpu_format: str, threads: int, **given: Any
) -> None:
    """Write a .krasis bundle with random weights. Options override the named shape's sizes."""
    overrides = {
        "num_hidden_layers": given["layers"],
        "num_experts": given["experts"],
        "vocab_size": given["vocab"],
    }
    chosen = tuple(part.strip() for part in tiers.split(","))
    if not set(chosen) <= {"gpu", "cpu"}:
        raise click.UsageError(f"--tiers {tiers}: gpu, cpu or both")
    try:
        shape = apply_overrides(BUNDLE_SHAPES[given["shape"]], overrides, None)
        request = BundleRequest(shape, seed, chosen, int(gpu_group), cpu_format, threads)
        with tqdm(total=bundle_bytes(request), unit="B", unit_scale=True, desc=out.name) as bar:
            written = make_bundle(request, out, bar.update)
    except (ValueError, KrasisError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: {written / 1e9:.2f} GB")


if __name__ == "__main__":
    sys.exit(main())
