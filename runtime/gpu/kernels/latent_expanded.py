"""Latent attention of many queries: keys and values of all heads are made of the latents, as many heads at a
time as there is room for, and attention runs over these as over any others (``kernels/attention.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from krasis.formats.errors import NativeError
from krasis.formats.layouts import STRIP_ROWS
from krasis.runtime.device.api import Stream
from krasis.runtime.gpu.kernels.attention import (
    APART_PIECE_BYTES,
    PIECE_BYTES,
    causal_attention,
    pieces,
)
from krasis.runtime.gpu.kernels.gpu_kernels import GpuKernels
from krasis.runtime.gpu.kernels.latent import LatentForm
from krasis.runtime.gpu.weights import GpuInt8
from krasis.runtime.planning.latent_workspace import head_matrices, head_numbers


@dataclass(frozen=True, slots=True)
class LatentWeights:
    """What makes keys and values of latents, of all heads: see ``latent_attention``'s tensors."""

    to_keys: GpuInt8  # rows heads * kv_rank, of nope_dim
    to_values: GpuInt8  # rows heads * value_dim, of kv_rank


@dataclass(frozen=True, slots=True)
class _Expanded:
    """Of the heads [first, end): their weights [heads, kv_rank, nope_dim] and [heads, value_dim, kv_rank],
    keys [heads, n, head_dim] and values [heads, n, wide], wide with zeros up to head_dim: flash wants keys
    and values of one size."""

    first: int
    end: int
    to_keys: torch.Tensor
    to_values: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def attend_expanded(
    kernels: GpuKernels,
    stream: Stream,
    form: LatentForm,
    weights: LatentWeights,
    q: torch.Tensor,
    cache: torch.Tensor,
    start: int,
    out: torch.Tensor,
    room: torch.Tensor,
) -> None:
    """out [T, heads, value_dim] = attention of q [T, heads, head_dim], turned, at positions start.. over
    latents [n, kv_rank + rope_dim] of positions 0..start+T-1. room: 16-bit, overwritten. Raises NativeError
    if a head does not fit there."""
    kept = cache[: start + len(q)]
    first = 0
    while first < form.mixer.heads:
        group = _place(form, first, len(kept), room)
        _unpack(kernels, stream, weights, group)
        _expand(stream, form, group, kept)
        queries, columns = q[:, group.first : group.end], out[:, group.first : group.end]
        wide = (group.end - group.first) * group.values.shape[2]
        is_whole = start == 0 and 2 * len(q) * wide <= PIECE_BYTES
        for begin, end in pieces(0, len(q), wide, PIECE_BYTES if is_whole else APART_PIECE_BYTES):
            _attend(stream, form, queries[begin:end], group, start + end, columns[begin:end])
        first = group.end


def _place(form: LatentForm, first: int, num_keys: int, room: torch.Tensor) -> _Expanded:
    """As many heads as the room has space for."""
    sizes = head_matrices(form.mixer, num_keys)
    count = min(form.mixer.heads - first, room.numel() // head_numbers(form.mixer, num_keys))
    if count < 1:
        raise NativeError("no room for a head's keys and values", where="attention", got=room.numel())
    views, end = [], 0
    for rows, columns in sizes:
        begin, end = end, end + count * rows * columns
        views.append(room[begin:end].view(count, rows, columns))
    return _Expanded(first, first + count, *views)


def fits(form: LatentForm, num_keys: int, room: torch.Tensor) -> bool:
    """Whether a head's keys and values have room."""
    return head_numbers(form.mixer, num_keys) <= room.numel()


def _unpack(kernels: GpuKernels, stream: Stream, weights: LatentWeights, group: _Expanded) -> None:
    for weight, out in ((weights.to_keys, group.to_keys), (weights.to_values, group.to_values)):
        rows, columns = out.shape[1:]
        begin, end = group.first * rows, group.end * rows
        kernels.int8_dequant(
            stream,
            weight.codes[begin // STRIP_ROWS : end // STRIP_ROWS],
            weight.scales[begin:end],
            out.view(-1, columns),
        )


def _expand(stream: Stream, form: LatentForm, group: _Expanded, kept: torch.Tensor) -> None:
    mixer, count = form.mixer, group.end - group.first

    def action(_: int) -> None:
        latents = kept[:, : mixer.kv_rank].expand(count, -1, -1)
        _product(latents, group.to_keys, group.keys[:, :, : mixer.nope_dim])
        group.keys[:, :, mixer.nope_dim :] = kept[:, mixer.kv_rank :]
        _product(latents, group.to_values.transpose(1, 2), group.values[:, :, : mixer.value_dim])
        group.values[:, :, mixer.value_dim :] = 0

    stream.launch(
        "expand latents",
        action,
        reads=(kept, group.to_keys, group.to_values),
        writes=(group.keys, group.values),
    )


def _product(x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    if x.is_cuda:
        torch.bmm(x, weights, out=out)
    else:  # the double: torch's CPU products of 16-bit floats round where they please
        out.copy_(x.float() @ weights.float())


def _attend(
    stream: Stream, form: LatentForm, q: torch.Tensor, group: _Expanded, num_keys: int, out: torch.Tensor
) -> None:
    keys, values = group.keys[:, :num_keys], group.values[:, :num_keys]

    def action(_: int) -> None:
        mixed = causal_attention(q.transpose(0, 1)[None], keys[None], values[None], form.mixer.scale)
        out.copy_(mixed[0].transpose(0, 1)[:, :, : form.mixer.value_dim])

    stream.launch("latent attention", action, reads=(q, keys, values), writes=(out,))
