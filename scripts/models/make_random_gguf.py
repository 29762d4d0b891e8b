#!/usr/bin/env python3
"""Random-weight GGUF files of real layer shape, written at the speed of memory: no checkpoint, no quantiser.

    python -m scripts.models.make_random_gguf --shape qwen3-235b-a22b --layers 16 --type q4_0 --out big.gguf

Experts take the type named; attention, embedding and output head are Q8_0, so that a file of 4-bit experts
has the bits of a bundle with them; norms, routers, biases and what else is no large matrix are F32. As in
make_random_bundle, one pool of blocks of each kind is drawn and every tensor is a run of it from a place that
a hash of (seed, name) gives: the same arguments give the same bytes, whatever the number of threads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np
from tqdm import tqdm

from krasis.formats.models.registry import family_of
from krasis.formats.models.spec import ModelSpec
from scripts.models.family_gguf import add_metadata, gguf_tensors
from scripts.models.family_shapes import FamilyShape, spec_of_config
from scripts.models.model_files import MoeShape, Shape, hub_config
from scripts.models.model_shapes import BUNDLE_SHAPES, apply_overrides
from scripts.models.moe_gguf import GGUF_TYPES, add_architecture
from scripts.models.random_bundle.blobs import input_std
from scripts.models.random_bundle.pools import RMS_4, RMS_8, RMS_FP4, Bytes, Pool, scale_values

EXPERT_TYPES = ("q4_0", "q8_0", "mxfp4")
BLOCK_VALUES = 32
BLOCK_BYTES = {"q4_0": 18, "q8_0": 34, "mxfp4": 17}
# The standard deviation of what is F32 and no matrix: about 0, or about 1 (norms).
SPREADS = {"norm": 0.1, "bias": 0.1, "decay": 0.7, "conv": 0.5}
POOL_BYTES = 64 << 20
PIECE_BYTES = 64 << 20
SIZE = click.IntRange(min=1)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the file. dims: [..., out, in]; kind: a type of blocks, ``router`` or one of SPREADS.
    looked_up: rows are taken as they are, so that their values and not their products are of order one.
    """

    name: str
    dims: tuple[int, ...]
    kind: str
    looked_up: bool = False

    @property
    def fan_in(self) -> int:
        """The number of inputs by which weights of blocks are scaled."""
        return 1 if self.looked_up else self.dims[-1]

    @property
    def num_bytes(self) -> int:
        """Size in the file, without padding."""
        count = int(np.prod(self.dims, dtype=np.int64))
        return count // BLOCK_VALUES * BLOCK_BYTES[self.kind] if self.kind in BLOCK_BYTES else 4 * count

    @property
    def ggml_type(self) -> gguf.GGMLQuantizationType:
        """As the file states it."""
        return GGUF_TYPES[self.kind if self.kind in BLOCK_BYTES else "f32"][0]


def tensors(shape: Shape, expert_type: str) -> list[Tensor]:
    """Every tensor that llama.cpp's converter writes for this shape."""
    if isinstance(shape, FamilyShape):
        found = gguf_tensors(spec_of(shape))
        return [
            Tensor(name, dims, _kind(ours, dims, expert_type), looked_up=ours == "embedding")
            for name, ours, dims in found
        ]
    return _qwen3_tensors(shape, expert_type)


def spec_of(shape: FamilyShape) -> ModelSpec:
    """The model that the file's metadata describes."""
    return spec_of_config(hub_config(shape))


def _kind(ours: str, dims: tuple[int, ...], expert_type: str) -> str:
    """How a tensor of a family is stored and drawn, by its name in a bundle."""
    if ours in ("experts.gate", "experts.up", "experts.down"):
        return expert_type
    if ours in ("experts.router", "shared.gate"):
        return "router"
    known = {"delta.a_log": "decay", "delta.conv": "conv", "attention.sinks": "bias"}
    if ours in known or ours.endswith("bias"):
        return known.get(ours, "bias")
    return "norm" if len(dims) == 1 else "q8_0"


def _qwen3_tensors(shape: MoeShape, expert_type: str) -> list[Tensor]:
    hidden, inner, experts = shape.hidden_size, shape.moe_intermediate_size, shape.num_experts
    queries, keys = (
        heads * shape.head_dim for heads in (shape.num_attention_heads, shape.num_key_value_heads)
    )
    found = [Tensor("token_embd.weight", (shape.vocab_size, hidden), "q8_0")]
    for layer in range(shape.num_hidden_layers):
        at = f"blk.{layer}."
        found += [
            Tensor(f"{at}attn_norm.weight", (hidden,), "norm"),
            Tensor(f"{at}attn_q.weight", (queries, hidden), "q8_0"),
            Tensor(f"{at}attn_k.weight", (keys, hidden), "q8_0"),
            Tensor(f"{at}attn_v.weight", (keys, hidden), "q8_0"),
            Tensor(f"{at}attn_output.weight", (hidden, queries), "q8_0"),
            Tensor(f"{at}attn_q_norm.weight", (shape.head_dim,), "norm"),
            Tensor(f"{at}attn_k_norm.weight", (shape.head_dim,), "norm"),
            Tensor(f"{at}ffn_norm.weight", (hidden,), "norm"),
            Tensor(f"{at}ffn_gate_inp.weight", (experts, hidden), "router"),
            Tensor(f"{at}ffn_gate_exps.weight", (experts, inner, hidden), expert_type),
            Tensor(f"{at}ffn_up_exps.weight", (experts, inner, hidden), expert_type),
            Tensor(f"{at}ffn_down_exps.weight", (experts, hidden, inner), expert_type),
        ]
    found.append(Tensor("output_norm.weight", (hidden,), "norm"))
    if not shape.tie_word_embeddings:
        found.append(Tensor("output.weight", (shape.vocab_size, hidden), "q8_0"))
    return found


def gguf_bytes(shape: Shape, expert_type: str) -> int:
    """Bytes of tensor data in such a file; the header takes some kilobytes more."""
    return sum(_padded(tensor.num_bytes) for tensor in tensors(shape, expert_type))


def make_gguf(
    shape: Shape,
    expert_type: str,
    out: Path,
    *,
    seed: int = 0,
    num_threads: int = 0,
    report: Callable[[int], object] = lambda _: None,
) -> int:
    """Writes the file; it gets its name when it is whole. Gives its bytes. report: told of bytes as they go.

    Raises ValueError for an unknown type, OSError if the system refuses.
    """
    if expert_type not in EXPERT_TYPES:
        raise ValueError(f"{expert_type}: expert types are {', '.join(EXPERT_TYPES)}")
    plan = tensors(shape, expert_type)
    partial = out.with_name(out.name + ".partial")
    data_offset = _write_header(shape, expert_type, plan, partial)
    pools = _draw_pools(plan, seed)
    threads = num_threads or min(16, len(os.sched_getaffinity(0)))
    fd = os.open(partial, os.O_WRONLY)
    try:

        def write(item: tuple[Tensor, int]) -> None:
            tensor, offset = item
            for piece in _pieces(tensor, pools, seed):
                _write_at(fd, piece, offset)
                offset += len(piece)
                report(len(piece))

        offsets, at = [], data_offset
        for tensor in plan:
            offsets.append(at)
            at += _padded(tensor.num_bytes)
        os.truncate(fd, at)
        with ThreadPoolExecutor(threads) as executor:
            for _ in executor.map(write, zip(plan, offsets, strict=True)):
                pass
    finally:
        os.close(fd)
    partial.replace(out)
    return out.stat().st_size


def _write_header(shape: Shape, expert_type: str, plan: list[Tensor], path: Path) -> int:
    """Everything before the tensors' bytes; gives where these begin."""
    if isinstance(shape, FamilyShape):
        spec = spec_of(shape)
        writer = gguf.GGUFWriter(path, str(family_of(spec).gguf))
        add_metadata(writer, spec)
    else:
        writer = gguf.GGUFWriter(path, "qwen3moe")
        add_architecture(writer, hub_config(shape), f"random-{shape.num_hidden_layers}-layers")
        writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type(GGUF_TYPES[expert_type][1])
    writer.add_tokenizer_model("none")
    for tensor in plan:
        writer.add_tensor_info(
            tensor.name, tensor.dims, np.dtype(np.float32), tensor.num_bytes, tensor.ggml_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if writer.fout is None:
        raise ValueError(f"{path}: the GGUF writer opened no file")
    writer.write_padding(writer.fout[0], writer.fout[0].tell())
    end = writer.fout[0].tell()
    writer.close()
    return end


def _padded(num_bytes: int) -> int:
    alignment = gguf.GGUF_DEFAULT_ALIGNMENT
    return -(-num_bytes // alignment) * alignment


def _draw_pools(plan: list[Tensor], seed: int) -> dict[tuple[str, int], Pool]:
    """One pool of blocks for each type and fan-in."""
    wanted = sorted({(tensor.kind, tensor.fan_in) for tensor in plan if tensor.kind in BLOCK_BYTES})
    pools = {}
    for kind, fan_in in wanted:
        random = np.random.Generator(np.random.SFC64([seed, fan_in, EXPERT_TYPES.index(kind)]))
        count = POOL_BYTES // BLOCK_BYTES[kind]
        blocks = _draw_blocks(random, kind, count, input_std(fan_in))
        pools[kind, fan_in] = Pool(blocks, BLOCK_BYTES[kind], seed, f"{kind}-{fan_in}")
    return pools


def _draw_blocks(random: np.random.Generator, kind: str, count: int, std: float) -> Bytes:
    """uint8 [count, block bytes]: a scale and 32 codes; of Q4_0 -7..7, of Q8_0 -127..127."""
    out = np.empty((count, BLOCK_BYTES[kind]), np.uint8)
    rms = {"q4_0": RMS_4, "q8_0": RMS_8, "mxfp4": RMS_FP4}[kind]
    if kind == "mxfp4":  # a power of two, then codes 1..15 of E2M1
        out[:, 0] = np.rint(np.log2(scale_values(random, count, rms, std))) + 127
        low, high = (random.integers(1, 16, (count, 16), dtype=np.uint8) for _ in range(2))
        out[:, 1:] = low | high << 4
        return out
    out[:, :2] = scale_values(random, count, rms, std).astype("<f2").view(np.uint8).reshape(count, 2)
    if kind == "q4_0":
        low, high = (random.integers(1, 16, (count, 16), dtype=np.uint8) for _ in range(2))
        out[:, 2:] = low | high << 4
    else:
        out[:, 2:] = random.integers(-127, 128, (count, 32), dtype=np.int8).view(np.uint8)
    return out


def _pieces(tensor: Tensor, pools: dict[tuple[str, int], Pool], seed: int) -> Iterator[memoryview]:
    """A tensor's bytes, in order."""
    if tensor.kind in BLOCK_BYTES:
        for run in pools[tensor.kind, tensor.fan_in].run(tensor.name, tensor.num_bytes):
            for begin in range(0, len(run), PIECE_BYTES):
                yield run[begin : begin + PIECE_BYTES]
        return
    random = np.random.Generator(np.random.SFC64([seed, *tensor.name.encode()]))
    values = random.standard_normal(tensor.dims, dtype=np.float32)
    if tensor.kind in SPREADS:
        values *= np.float32(SPREADS[tensor.kind])
        if tensor.kind == "norm":
            values += 1
        elif tensor.kind == "decay":  # what is kept of a state, a token: 0.4 to 0.95
            values = -np.exp(values - 1)
    else:  # rows of equal length: no expert is louder than another
        values *= 2 / np.linalg.norm(values, axis=1, keepdims=True)
    yield memoryview(np.ascontiguousarray(values, "<f4").view(np.uint8).reshape(-1))


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    """All of it: a write may be cut short at 2 GiB or by a signal."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


@click.command(help=__doc__)
@click.option("--shape", "name", type=click.Choice(sorted(BUNDLE_SHAPES)), default="tiny", show_default=True)
@click.option("--layers", type=SIZE, help="num_hidden_layers")
@click.option("--experts", type=SIZE, help="num_experts")
@click.option("--vocab", type=SIZE, help="vocab_size")
@click.option("--dense", type=click.IntRange(min=0), help="first_k_dense_replace")
@click.option("--type", "expert_type", type=click.Choice(EXPERT_TYPES), default="q4_0", show_default=True)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="0: one a CPU, at most 16.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(name: str, expert_type: str, threads: int, seed: int, out: Path, **given: Any) -> None:
    keys = {"layers": "num_hidden_layers", "experts": "num_experts", "vocab": "vocab_size"}
    keys["dense"] = "first_k_dense_replace"
    try:
        shape = apply_overrides(BUNDLE_SHAPES[name], {keys[key]: value for key, value in given.items()}, None)
        with tqdm(total=gguf_bytes(shape, expert_type), unit="B", unit_scale=True, desc=out.name) as bar:
            written = make_gguf(shape, expert_type, out, seed=seed, num_threads=threads, report=bar.update)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: {written / 1e9:.2f} GB")


if __name__ == "__main__":
    sys.exit(main())
