"""Wrappers of the kernels of latent attention, against float64: what is kept of a token, products of heads,
attention over the latents themselves and over keys and values made of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from krasis.formats.errors import NativeError
from krasis.formats.layouts.int8_rows import pack_codes
from krasis.formats.models.mixers import LatentAttention
from krasis.formats.models.rope import QueryTemperature, Rope
from krasis.runtime.gpu.kernels.attention_rows import CachePlace, CacheRows
from krasis.runtime.gpu.kernels.latent import LatentForm
from krasis.runtime.gpu.kernels.latent_expanded import LatentWeights, attend_expanded, fits
from krasis.runtime.gpu.weights import GpuInt8
from krasis.runtime.planning.latent_workspace import (
    head_numbers,
    latent_splits,
    split_bytes,
)

F16 = torch.float16
HEADS, NOPE, ROPE, RANK, VALUE, CAPACITY = 3, 64, 16, 64, 32, 40
WIDTH, HEAD_DIM = RANK + ROPE, NOPE + ROPE


def mixer(value_dim: int = VALUE, **fields: Any) -> LatentAttention:
    rope = Rope(dims=ROPE, theta=1e4, style="interleaved")
    return LatentAttention(
        heads=HEADS, q_rank=None, kv_rank=RANK, nope_dim=NOPE, rope_dim=ROPE, value_dim=value_dim, rope=rope,
        scale=0.2, **fields,
    )  # fmt: skip


def form_of(bench: Any, model: LatentAttention) -> LatentForm:
    angles = torch.arange(CAPACITY)[:, None] * torch.arange(1, ROPE // 2 + 1)[None, :] * 0.1
    norm = 1 + 0.1 * bench.random(RANK, seed=5)
    return LatentForm(model, *(bench.put(one) for one in (norm, angles.cos(), angles.sin())))


def turned(x: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """[T, ..., ROPE] by neighbours, in float64."""
    angles = torch.tensor(positions)[:, None] * torch.arange(1, ROPE // 2 + 1)[None, :] * 0.1
    c, s = (table.double().view(len(x), *(1,) * (x.dim() - 2), -1) for table in (angles.cos(), angles.sin()))
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack([first * c - second * s, second * c + first * s], -1).flatten(-2)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2**-9) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [None, QueryTemperature(scale=0.5, period=3, shift=0)])
@pytest.mark.parametrize("in_rows", [False, True])
def test_latent_store(bench: Any, temperature: QueryTemperature | None, in_rows: bool) -> None:
    """Of consecutive tokens, or each in a slot of its own."""
    form = form_of(bench, mixer(temperature=temperature, latent_eps=1e-5))
    tokens, start = 4, 6
    q, kv = bench.random(tokens, HEADS * HEAD_DIM, dtype=F16), bench.random(tokens, WIDTH + 16, seed=2)
    rows, latents, slots = bench.put(q), bench.put(kv), 4 if in_rows else 1
    cache = bench.put(torch.zeros(slots, 8 + CAPACITY * WIDTH, dtype=F16))
    keys = [slot[8:].view(1, CAPACITY, WIDTH) for slot in cache]
    positions = [3, 0, 39, 7] if in_rows else [start + t for t in range(tokens)]
    if in_rows:
        table = [[at, slot.data_ptr(), 0] for at, slot in zip(positions, cache, strict=True)]
        place: Any = CacheRows(bench.put(torch.tensor(table)), (cache,), 16, 16, CAPACITY)
    else:
        place = CachePlace(keys[0], keys[0], start)
    bench.kernels.latent_store(bench.stream, rows, latents, form, place)
    factors = torch.ones(tokens)
    if temperature is not None:
        factors = 1 + temperature.scale * torch.log(1.0 + torch.tensor(positions) // temperature.period)
    queries = q.double().view(tokens, HEADS, HEAD_DIM) * factors.double()[:, None, None]
    expected = torch.cat([queries[..., :NOPE], turned(queries[..., NOPE:], positions)], -1)
    close(bench.get(rows).view(tokens, HEADS, HEAD_DIM), expected, 2**-8)
    x = kv.double()[:, :RANK]
    x = x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt() * bench.get(form.norm).double()
    kept = torch.cat([x, turned(kv.double()[:, RANK:WIDTH], positions)], 1)
    found = bench.get(cache)[:, 8:].view(slots, CAPACITY, WIDTH)
    for t, at in enumerate(positions):
        close(found[t if in_rows else 0, at], kept[t], 2**-8)
    assert int((found != 0).any(-1).sum()) == tokens


@dataclass
class Problem:
    """Random latents and turned queries of positions start.. and their attention in float64."""

    form: LatentForm
    q: torch.Tensor  # [T, heads, head_dim]
    cache: torch.Tensor  # [n, width]
    weights: LatentWeights
    expected: torch.Tensor  # [T, heads, value_dim]


def packed(bench: Any, rows: int, columns: int, seed: int) -> tuple[GpuInt8, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scales = 0.002 * (1 + torch.rand(rows, generator=generator))
    weight = GpuInt8(bench.put(torch.from_numpy(pack_codes(codes.numpy()))), bench.put(scales))
    return weight, codes.double() * scales.double()[:, None]


def problem_of(bench: Any, tokens: int, start: int, value_dim: int) -> Problem:
    form = form_of(bench, mixer(value_dim))
    to_keys, k_b = packed(bench, HEADS * RANK, NOPE, 11)
    to_values, v_b = packed(bench, HEADS * value_dim, RANK, 12)
    q = bench.random(tokens, HEADS, HEAD_DIM, dtype=F16, seed=13)
    cache = bench.random(start + tokens, WIDTH, dtype=F16, seed=14)
    queries, latents = q.double(), cache.double()
    absorbed = torch.einsum("thd,hrd->thr", queries[..., :NOPE], k_b.view(HEADS, RANK, NOPE))
    scores = torch.einsum("thw,nw->thn", torch.cat([absorbed, queries[..., NOPE:]], -1), latents) * 0.2
    seen = torch.arange(len(cache))[None] <= start + torch.arange(tokens)[:, None]
    shares = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    gathered = torch.einsum("thn,nr->thr", shares, latents[:, :RANK])
    expected = torch.einsum("thr,hvr->thv", gathered, v_b.view(HEADS, value_dim, RANK))
    return Problem(form, bench.put(q), bench.put(cache), LatentWeights(to_keys, to_values), expected)


def test_latent_attention_with_its_products(bench: Any) -> None:
    """Over two splits of the keys; queries and what they gather share memory."""
    problem, tokens, start = problem_of(bench, 5, 34, VALUE), 5, 34
    queries = bench.empty(tokens, HEADS, RANK, dtype=F16)
    to_keys, to_values = problem.weights.to_keys, problem.weights.to_values
    kernels, q = bench.kernels, problem.q
    kernels.int8_heads(bench.stream, q[..., :NOPE], to_keys.codes, to_keys.scales, queries)
    splits = latent_splits(1, tokens * HEADS, start + tokens)
    assert splits == 2
    workspace = bench.empty(split_bytes(tokens, HEADS, RANK), dtype=torch.uint8)
    keys = problem.cache[None]
    place = CachePlace(keys, keys, start)
    kernels.latent_attention(bench.stream, queries, q[..., NOPE:], problem.form, place, workspace, splits)
    out = bench.empty(tokens, HEADS, VALUE, dtype=F16)
    kernels.int8_heads(bench.stream, queries, to_values.codes, to_values.scales, out)
    close(bench.get(out), problem.expected, 2**-7)


@pytest.mark.parametrize("value_dim", [32, 96])  # fewer channels than a head of the keys has, and more
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_attention_over_what_is_made_of_latents(bench: Any, heads: int, value_dim: int) -> None:
    """As many heads at a time as there is room for."""
    problem = problem_of(bench, 7, 20, value_dim)
    room = bench.empty(heads * head_numbers(problem.form.mixer, 27) + 5, dtype=F16)
    out = bench.empty(7, HEADS, value_dim, dtype=F16)
    attend_expanded(
        bench.kernels, bench.stream, problem.form, problem.weights, problem.q, problem.cache, 20, out, room
    )
    close(bench.get(out), problem.expected, 2**-7)
    small = room[: head_numbers(problem.form.mixer, 27) - 1]
    assert not fits(problem.form, 27, small)
    with pytest.raises(NativeError, match="no room for a head"):
        attend_expanded(
            bench.kernels,
            bench.stream,
            problem.form,
            problem.weights,
            problem.q,
            problem.cache,
            20,
            out,
            small,
        )


@pytest.mark.parametrize("capacity", [31, 4096])
@pytest.mark.parametrize("num_heads", [16, 20, 128])
def test_the_room_for_splits_suffices(bench: Any, num_heads: int, capacity: int) -> None:
    workspace_bytes = bench.kernels.function("latent_workspace_bytes")
    for most in (1, 2, 8, 63):
        room = split_bytes(most, num_heads, 512)
        for rows in range(1, most + 1):
            for splits in (
                latent_splits(rows, num_heads, capacity),
                latent_splits(1, rows * num_heads, capacity),
            ):
                assert workspace_bytes(rows, num_heads, 512, splits) <= room


def test_refusals(bench: Any) -> None:
    problem = problem_of(bench, 2, 3, VALUE)
    keys, workspace = problem.cache[None], bench.empty(16, dtype=torch.uint8)
    place, stream, kernels = CachePlace(keys, keys, 3), bench.stream, bench.kernels
    queries = bench.empty(2, HEADS, RANK, dtype=F16)
    rest = problem.q[..., NOPE:]
    with pytest.raises(NativeError, match="parts differ"):
        kernels.latent_attention(stream, queries, rest[:1], problem.form, place, workspace, 1)
    narrow = CachePlace(keys[:, :, 16:], keys, 3)
    with pytest.raises(NativeError, match=r"latent_attention\.cache"):
        kernels.latent_attention(stream, queries, rest, problem.form, narrow, workspace, 1)
    with pytest.raises(NativeError, match="sizes do not fit"):
        kernels.int8_heads(stream, queries[..., :32], *_codes(problem), queries)
    with pytest.raises(NativeError, match="does not fit x"):
        kernels.int8_heads(stream, queries, *_codes(problem), bench.empty(2, HEADS, 32))
    with pytest.raises(NativeError, match="rows differ"):
        kernels.latent_store(stream, problem.q.flatten(1), bench.empty(1, WIDTH), problem.form, place)


def _codes(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return problem.weights.to_values.codes, problem.weights.to_values.scales
