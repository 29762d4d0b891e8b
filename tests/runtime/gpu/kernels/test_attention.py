"""Wrappers of the kernels around attention, against float64: forms of q, k and v, and rows
with caches of their own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from krasis.formats.errors import NativeError
from krasis.runtime.cpu.kernels import Heads
from krasis.runtime.gpu.kernels.attention_rows import CachePlace, CacheRows, QkvForm

BF16 = torch.bfloat16
HEADS, CAPACITY, POSITIONS = Heads(4, 2, 16), 16, 20


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=2**-8)


def form_of(bench: Any, kind: str) -> QkvForm:
    """Tables for 16 or 8 channels, and what the kind names besides."""
    pairs = 4 if kind == "partial" else 8
    angles = torch.arange(POSITIONS)[:, None] * torch.arange(1, pairs + 1)[None, :] * 0.1
    sizes = (64, 32) if kind == "flat" else (16, 16)
    norms = [None if kind == "bare" else bench.random(size, seed=5) for size in sizes]
    return QkvForm(
        1e-6,
        angles.cos(),
        angles.sin(),
        *norms,
        norm={"flat": "flat", "after": "head_after_rope"}.get(kind, "head"),
        bias=bench.random(HEADS.qkv_size, seed=8) if kind == "partial" else None,
        clip=1.0 if kind == "flat" else 0.0,
        interleaved=kind == "interleaved",
    )


def placed(bench: Any, form: QkvForm) -> QkvForm:
    def put(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else bench.put(tensor)

    return QkvForm(
        form.eps, bench.put(form.cos), bench.put(form.sin), put(form.q_norm), put(form.k_norm),
        form.norm, put(form.bias), form.clip, form.interleaved,
    )  # fmt: skip


def reference(qkv: torch.Tensor, positions: list[int], form: QkvForm) -> list[torch.Tensor]:
    """q [T, heads, dim], k and v [T, kv heads, dim] in float64."""
    tokens, dim = len(qkv), HEADS.head_dim
    whole = qkv.double() + (0 if form.bias is None else form.bias.double())
    counts = [HEADS.num_heads, HEADS.num_kv_heads, HEADS.num_kv_heads]
    q, k, v = whole.view(tokens, -1, dim).split(counts, 1)
    c, s = (table.double()[positions, None] for table in (form.cos, form.sin))
    turned = []
    for part, norm in zip((q, k), (form.q_norm, form.k_norm), strict=True):
        x = part if norm is None or form.norm == "head_after_rope" else normed(part, norm, form)
        if form.clip:
            x = x.clamp(-form.clip, form.clip)
        rotated, rest = x[..., : 2 * c.shape[-1]], x[..., 2 * c.shape[-1] :]
        if form.interleaved:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
            pairs = torch.stack([first * c - second * s, second * c + first * s], -1).flatten(-2)
        else:
            first, second = rotated.chunk(2, -1)
            pairs = torch.cat([first * c - second * s, second * c + first * s], -1)
        x = torch.cat([pairs, rest], -1)
        turned.append(normed(x, norm, form) if norm is not None and form.norm == "head_after_rope" else x)
    return [*turned, v.clamp(-form.clip, form.clip) if form.clip else v]


def normed(part: torch.Tensor, weight: torch.Tensor, form: QkvForm) -> torch.Tensor:
    """[T, heads, dim], each head or all of a token's together."""
    x = part.flatten(1) if form.norm == "flat" else part
    x = x * (x.square().mean(-1, keepdim=True) + form.eps).rsqrt() * weight.double()
    return x.view(part.shape)


@pytest.mark.parametrize("start", [0, 7])
@pytest.mark.parametrize("is_on_device", [False, True])
@pytest.mark.parametrize("kind", ["head", "bare", "flat", "partial", "interleaved", "after"])
def test_qk_norm_rope_store(bench: Any, start: int, is_on_device: bool, kind: str) -> None:
    tokens = 5
    qkv, form = bench.random(tokens, HEADS.qkv_size, dtype=BF16), form_of(bench, kind)
    rows = bench.put(qkv)
    caches = [bench.put(bench.random(2, CAPACITY, 16, dtype=BF16, seed=7)) for _ in range(2)]
    before = bench.get(caches[0])
    position = bench.put(torch.tensor([start])) if is_on_device else None
    place = CachePlace(*caches, 0 if is_on_device else start, position)
    bench.kernels.qk_norm_rope_store(bench.stream, rows, HEADS, placed(bench, form), place)
    q, k, v = reference(qkv, list(range(start, start + tokens)), form)
    assert_close(bench.get(rows)[:, :64].view(tokens, 4, 16), q)
    keys, values = bench.get(caches[0]), bench.get(caches[1])
    span = slice(start, start + tokens)
    assert_close(keys[:, span].transpose(0, 1), k)
    assert_close(values[:, span].transpose(0, 1), v)
    keys[:, span] = before[:, span]
    assert torch.equal(keys, before)


def test_keys_and_values_of_8_bits(bench: Any) -> None:
    """Stored as the CPU keeps them, attended to as the floats that they are, in a window."""
    memory = bench.put(torch.full((2, 2 * CAPACITY * 20), 255, dtype=torch.uint8))  # scales: NaN
    (keys, key_scales), (values, value_scales) = (
        (half[: 32 * CAPACITY].view(torch.int8).view(2, CAPACITY, 16),
         half[32 * CAPACITY :].view(torch.float32).view(2, CAPACITY, 1))
        for half in memory
    )  # fmt: skip
    place = CachePlace(keys, values, 3, scales=(key_scales, value_scales))
    qkv, form = bench.random(9, HEADS.qkv_size, dtype=BF16), form_of(bench, "head")
    rows = bench.put(qkv)
    bench.kernels.qk_norm_rope_store(bench.stream, rows, HEADS, placed(bench, form), place)
    _, k, v = reference(qkv, list(range(3, 12)), form)
    kept = []
    for codes, scales, floats in ((keys, key_scales, k), (values, value_scales, v)):
        wanted = floats.transpose(0, 1).float()
        own = bench.get(scales)[:, 3:12]
        torch.testing.assert_close(own, wanted.abs().amax(2, keepdim=True) / 127, rtol=1e-5, atol=0)
        found = bench.get(codes)[:, 3:12] * own
        assert ((found - wanted).abs() <= 0.501 * own).all()
        assert not bench.get(scales)[:, :3].isfinite().any()
        kept.append(torch.nn.functional.pad(found, (0, 0, 3, 0)))
    out, workspace = bench.empty(1, 64, dtype=BF16), bench.kernels.attention_workspace(HEADS, CAPACITY)
    at = CachePlace(*place.seen(slice(None))[:2], position=bench.put(torch.tensor([11])), scales=place.scales)
    bench.kernels.attention_decode(
        bench.stream, rows[8:, :64], HEADS, at, 0.2, out, workspace, window=8, num_positions=12
    )
    assert_close(bench.get(out)[0], attended(bench.get(rows)[8, :64], *kept, range(4, 12)))
    with pytest.raises(NativeError, match="elsewhere than behind"):
        bench.kernels.qk_norm_rope_store(
            bench.stream, rows, HEADS, placed(bench, form),
            CachePlace(keys, values, 3, scales=(value_scales, key_scales)),
        )  # fmt: skip


def slots_of(bench: Any, num_slots: int) -> torch.Tensor:
    """bf16 [slots, layers, keys and values, kv heads, capacity, dim]."""
    return bench.put(bench.random(num_slots, 2, 2, 2, CAPACITY, 16, dtype=BF16, seed=9))


def rows_of(bench: Any, memory: torch.Tensor, places: list[tuple[int, int]], layer: int) -> CacheRows:
    """places: (position, slot) of each row."""
    table = torch.tensor([[at, memory[slot].data_ptr(), memory[slot].data_ptr()] for at, slot in places])
    cell = memory[0, 0, 0].nbytes
    return CacheRows(bench.put(table), (memory,), 2 * layer * cell, (2 * layer + 1) * cell, CAPACITY)


def test_rows_go_to_slots_of_their_own(bench: Any) -> None:
    places = [(3, 2), (11, 0), (-1, 1), (0, 3)]
    qkv, form = bench.random(4, HEADS.qkv_size, dtype=BF16), form_of(bench, "head")
    rows, memory = bench.put(qkv), slots_of(bench, 4)
    before = bench.get(memory)
    on_rows = rows_of(bench, memory, places, layer=1)
    bench.kernels.qk_norm_rope_store(bench.stream, rows, HEADS, placed(bench, form), on_rows)
    q, k, v = reference(qkv, [max(at, 0) for at, _ in places], form)
    found, after = bench.get(rows)[:, :64].view(4, 4, 16), bench.get(memory)
    for row, (at, slot) in enumerate(places):
        if at < 0:
            assert torch.equal(found[row].flatten(), qkv[row, :64])
            continue
        assert_close(found[row], q[row])
        assert_close(after[slot, 1, 0, :, at], k[row])
        assert_close(after[slot, 1, 1, :, at], v[row])
        after[slot, 1, :, :, at] = before[slot, 1, :, :, at]
    assert torch.equal(after, before)


@pytest.mark.parametrize("position", [0, 5, 15])
@pytest.mark.parametrize("is_known", [False, True])
def test_attention_decode(bench: Any, position: int, is_known: bool) -> None:
    q = bench.random(1, 64, dtype=BF16)
    keys, values = (bench.random(2, CAPACITY, 16, dtype=BF16, seed=seed) for seed in (2, 3))
    out, workspace = bench.empty(1, 64, dtype=BF16), bench.kernels.attention_workspace(HEADS, CAPACITY)
    place = CachePlace(bench.put(keys), bench.put(values), position=bench.put(torch.tensor([position])))
    bench.kernels.attention_decode(
        bench.stream, bench.put(q), HEADS, place, 0.2, out, workspace,
        num_positions=position + 1 if is_known else None,
    )  # fmt: skip
    assert_close(bench.get(out)[0], attended(q[0], keys, values, range(position + 1)))


def attended(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: range, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """[heads * dim] of one query over the positions that it sees."""
    k, v = (cache.double()[:, seen.start : seen.stop].repeat_interleave(2, 0) for cache in (keys, values))
    scores = torch.einsum("hd,htd->ht", q.double().view(4, 16), k) * 0.2
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None]], 1)
    return torch.einsum("ht,htd->hd", scores.softmax(1)[:, : len(seen)], v).flatten()


def test_rows_attend_in_their_own_slots_through_a_window(bench: Any) -> None:
    places = [(3, 2), (15, 0), (-1, 1), (9, 3)]
    wide = bench.random(4, HEADS.qkv_size, dtype=BF16)
    memory, out, sinks = slots_of(bench, 4), bench.empty(4, 64, dtype=BF16), bench.random(4, seed=4)
    workspace = bench.kernels.attention_workspace(HEADS, CAPACITY, num_rows=4)
    bench.kernels.attention_decode(
        bench.stream, bench.put(wide)[:, :64], HEADS, rows_of(bench, memory, places, layer=1), 0.2, out,
        workspace, window=8, sinks=bench.put(sinks),
    )  # fmt: skip
    cells, found = bench.get(memory), bench.get(out)
    for row, (at, slot) in enumerate(places):
        if at >= 0:
            seen = range(max(0, at - 7), at + 1)
            expected = attended(wide[row, :64], cells[slot, 1, 0], cells[slot, 1, 1], seen, sinks)
            assert_close(found[row], expected)


def test_wrong_shapes_are_refused(bench: Any) -> None:
    kernels, stream = bench.kernels, bench.stream
    caches = [bench.empty(1, 8, 16, dtype=BF16) for _ in range(2)]
    form = QkvForm(1e-6, bench.empty(8, 8), bench.empty(8, 8))
    qkv, heads = bench.empty(3, 48, dtype=BF16), Heads(1, 1, 16)
    with pytest.raises(NativeError, match=r"out of range \(got \(6, 9\)"):
        kernels.qk_norm_rope_store(stream, qkv, heads, form, CachePlace(*caches, 6))
    rows = CacheRows(bench.empty(2, 3, dtype=torch.int64), caches, 0, 0, 8)
    with pytest.raises(NativeError, match="fewer places than rows"):
        kernels.qk_norm_rope_store(stream, qkv, heads, form, rows)
    position, workspace = bench.empty(1, dtype=torch.int64), bench.empty(64, dtype=torch.uint8)
    q, place = qkv[:1, :16], CachePlace(caches[0], caches[1][:, :4], position=position)
    with pytest.raises(NativeError, match=r"attention_decode\.values"):
        kernels.attention_decode(stream, q, heads, place, 0.2, q, workspace)
    with pytest.raises(NativeError, match="needs one row"):
        kernels.attention_decode(stream, qkv[:, :16], heads, place, 0.2, qkv[:, :16], workspace)
