#!/usr/bin/env python3
"""Random-weight models of real layer shape, streamed to disk, for benchmarks and tests.

    python -m scripts.models.make_random_model --shape qwen3-30b-a3b --layers 4 --out m --gguf m-q8_0.gguf

Weights are normal with standard deviation 1/sqrt(fan-in), so that activations stay of order one
through any number of layers; norms lie around one. Drawing hundreds of gigabytes of normals would
take hours: a pool of 2^25 normals is drawn once, and each piece of a tensor is a run of it from
a random place, with signs flipped by a run from a random place of a pool of random signs. The
places come from a hash of (seed, tensor name, piece), so that a tensor's values depend neither on
the order of writing nor on which other tensors there are. Runs shared by two tensors are not
correlated, because their signs are independent.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

from scripts.models.model_files import (
    BF16_BYTES,
    Bf16Bits,
    Floats,
    MoeShape,
    Shape,
    hub_config,
    num_values,
    tensor_shapes,
    to_bf16,
    write_checkpoint,
)
from scripts.models.model_shapes import SHAPES, apply_overrides
from scripts.models.moe_gguf import GGUF_TYPES, write_gguf

logger = logging.getLogger("make_random_model")

POOL_VALUES = 1 << 25
PIECE_VALUES = 1 << 22
NORM_NOISE = 0.1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
TINY_MODEL = Path(__file__).resolve().parent.parent / "tests" / "assets" / "tiny-qwen3-moe"


class WeightSource:
    """Random BF16 tensors by name, the same for the same seed whatever the order.

    Holds about 64 MiB for each distinct standard deviation, of which a model has at most five,
    128 MiB of normals and 64 MiB of signs.
    """

    def __init__(self, seed: int, pool_values: int = POOL_VALUES) -> None:
        self._seed = seed
        self._size = pool_values
        rng = np.random.Generator(np.random.SFC64(seed))
        self._normals: Floats = rng.standard_normal(pool_values, dtype=np.float32)
        self._signs: Bf16Bits = rng.integers(0, 1 << 16, pool_values, dtype=np.uint16)
        self._signs &= np.uint16(0x8000)
        self._scaled: dict[float, Bf16Bits] = {}

    def _pool(self, std: float) -> Bf16Bits:
        if std not in self._scaled:
            pool = np.empty(self._size, dtype=np.uint16)
            for first in range(0, self._size, PIECE_VALUES):
                part = slice(first, first + PIECE_VALUES)
                pool[part] = to_bf16(self._normals[part] * np.float32(std))
            self._scaled[std] = pool
        return self._scaled[std]

    def _digest(self, name: str, piece: int) -> bytes:
        return hashlib.blake2b(f"{self._seed}\0{name}\0{piece}".encode(), digest_size=16).digest()

    def vector(self, name: str, size: int, around: float) -> Bf16Bits:
        """Norm weights around one, or biases around zero, [size]."""
        rng = np.random.Generator(np.random.SFC64(int.from_bytes(self._digest(name, 0), "little")))
        noise = rng.standard_normal(size, dtype=np.float32)
        return to_bf16(np.float32(around) + np.float32(NORM_NOISE) * noise)

    def matrix(self, name: str, size: int, std: float) -> Iterator[Bf16Bits]:
        """`size` normals of standard deviation `std`, in pieces."""
        pool = self._pool(std)
        # A piece is at most half the pool, so that even then there are many places to take it from.
        step = min(PIECE_VALUES, self._size // 2)
        for number, first in enumerate(range(0, size, step)):
            count = min(step, size - first)
            digest = self._digest(name, number)
            at = int.from_bytes(digest[:8], "little") % (self._size - count + 1)
            signs_at = int.from_bytes(digest[8:], "little") % (self._size - count + 1)
            yield pool[at : at + count] ^ self._signs[signs_at : signs_at + count]


def standard_deviation(name: str, dims: tuple[int, ...], tied: bool) -> float:
    """1/sqrt(fan-in); an embedding that is not also the output head has unit values."""
    if name == "model.embed_tokens.weight" and not tied:
        return 1.0
    return float(dims[-1] ** -0.5)


def random_pieces(shape: Shape, source: WeightSource, report: Callable[[int], object]) -> Iterator[Bf16Bits]:
    """Every tensor of the model in file order, in pieces; `report` is told each piece's bytes."""
    for name, dims in tensor_shapes(shape).items():
        if len(dims) == 1:
            around = 0.0 if name.endswith("bias") else 1.0
            pieces = iter([source.vector(name, dims[0], around)])
        else:
            std = standard_deviation(name, dims, shape.tie_word_embeddings)
            pieces = source.matrix(name, num_values(dims), std)
        for piece in pieces:
            yield piece
            report(piece.nbytes)


def copy_tokenizer(folder: Path, vocab_size: int, model: Path = TINY_MODEL) -> dict[str, int]:
    """Reuse the tiny model's tokenizer; return its `eos` and `pad` ids, nothing without one."""
    if not (model / "tokenizer.json").is_file():
        logger.warning("no tokenizer written: %s is not there", model)
        return {}
    data = json.loads((model / "tokenizer.json").read_text("utf-8"))
    ids = dict(data["model"]["vocab"]) | {t["content"]: t["id"] for t in data["added_tokens"]}
    if max(ids.values()) >= vocab_size:
        logger.warning(
            "no tokenizer written: the tiny model's needs %d ids, the model has %d",
            max(ids.values()) + 1,
            vocab_size,
        )
        return {}
    for file in TOKENIZER_FILES:
        shutil.copyfile(model / file, folder / file)
    settings = json.loads((model / "tokenizer_config.json").read_text("utf-8"))
    return {"eos": ids[settings["eos_token"]], "pad": ids[settings["pad_token"]]}


def make_model(
    shape: Shape, folder: Path, seed: int, shard_bytes: int, *, pool_values: int = POOL_VALUES
) -> int:
    """Write the checkpoint; return the bytes of tensor data.

    Raises OSError when the disk has too little room, before anything is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(num_values(dims) for dims in tensor_shapes(shape).values()) * BF16_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{folder}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    special = copy_tokenizer(folder, shape.vocab_size)
    config = json.dumps(hub_config(shape, **special), indent=2) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")
    source = WeightSource(seed, pool_values)
    with tqdm(total=needed, unit="B", unit_scale=True, desc=folder.name) as bar:
        return write_checkpoint(
            folder, tensor_shapes(shape), random_pieces(shape, source, bar.update), shard_bytes
        )


SIZE = click.IntRange(min=1)


@click.command()
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="tiny", show_default=True)
@click.option("--layers", type=SIZE, help="num_hidden_layers")
@click.option("--hidden", type=SIZE, help="hidden_size")
@click.option("--heads", type=SIZE, help="num_attention_heads")
@click.option("--kv-heads", type=SIZE, help="num_key_value_heads")
@click.option("--head-dim", type=SIZE, help="head_dim")
@click.option("--experts", type=SIZE, help="num_experts")
@click.option("--top-k", type=SIZE, help="num_experts_per_tok")
@click.option("--expert-intermediate", type=SIZE, help="moe_intermediate_size")
@click.option("--vocab", type=SIZE, help="vocab_size")
@click.option("--yarn", type=click.FloatRange(min=1.0), help="Add YaRN rope scaling by this factor.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--gguf", type=click.Path(path_type=Path, dir_okay=False), help="Also this GGUF.")
@click.option("--gguf-type", type=click.Choice(sorted(GGUF_TYPES)), default="q8_0")
@click.option("--shard-gib", type=click.FloatRange(min=0.0001), default=4.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    shape: str,
    layers: int | None,
    hidden: int | None,
    heads: int | None,
    kv_heads: int | None,
    head_dim: int | None,
    experts: int | None,
    top_k: int | None,
    expert_intermediate: int | None,
    vocab: int | None,
    yarn: float | None,
    out: Path,
    gguf: Path | None,
    gguf_type: str,
    shard_gib: float,
    seed: int,
) -> None:
    """Write a model with random weights. Options override the named shape's sizes."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    given = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": expert_intermediate,
        "vocab_size": vocab,
    }
    try:
        chosen = apply_overrides(SHAPES[shape], given, yarn)
        written = make_model(chosen, out, seed, int(shard_gib * 2**30))
        click.echo(f"{out}: {written / 1e9:.2f} GB of BF16 weights")
        if gguf is not None and not isinstance(chosen, MoeShape):
            raise ValueError("--gguf is for Qwen3-MoE shapes; llama.cpp's converter reads the folder")
        if gguf is not None:
            size = write_gguf(out, gguf, gguf_type, f"random-{shape}")
            click.echo(f"{gguf}: {size / 1e9:.2f} GB")
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
