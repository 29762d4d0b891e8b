"""NumPy twin of the native gated delta rule: clear, slow, in the type of what it is given.

Tests compare the kernel with it in float64; the float32 path runs on it, token by token. Shapes as in
``csrc/krasis.h``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.models.recurrent import ChannelDelta, GatedDelta
from krasis.runtime import reference

Array = npt.NDArray[Any]
_UNIT_EPS = 1e-6  # in the root of the lengths of q and k


@dataclass(frozen=True, slots=True)
class DeltaVectors:
    """conv: [channels, conv_width], the newest token's weights last. a_log, dt_bias: [value_heads].
    gate_norm: [value_dim], with its eps.
    """

    conv: Array
    a_log: Array
    dt_bias: Array
    gate_norm: Array
    eps: float


def gated_delta(
    projected: Array,
    gates: Array,
    mixer: GatedDelta,
    vectors: DeltaVectors,
    matrices: Array,
    columns: Array,
    *,
    is_first: bool,
) -> Array:
    """[T, value_heads * value_dim] of one sequence's rows: projected [T, q k v z], gates [T, b a].

    matrices [value_heads, tiles, key_dim, columns], columns [conv_width - 1, channels]: the state before
    the rows, which becomes that after them; is_first: it is zero, whatever is there.
    """
    if is_first:
        matrices[...], columns[...] = 0, 0
    channels = mixer.conv_channels
    q, k, v = mixed_heads(projected[:, :channels], mixer, vectors.conv, columns)
    b, a = np.split(gates, 2, axis=1)
    rates = -np.exp(vectors.a_log.astype(a.dtype))
    decays = np.exp(rates * np.logaddexp(np.asarray(0, a.dtype), a + vectors.dt_bias.astype(a.dtype)))
    out = over_tiles(q, k, v, reference.sigmoid(b), decays[:, :, None], matrices)
    return gated_norm(out, projected[:, channels:], vectors.gate_norm, vectors.eps, mixer.gate)


def mixed_heads(
    x: Array, mixer: GatedDelta | ChannelDelta, conv: Array, columns: Array
) -> tuple[Array, Array, Array]:
    """q, k [T, value_heads, key_dim] of length 1, q scaled, and v [T, value_heads, value_dim] of x [T,
    channels]: convolved with columns, see ``causal_conv``, and silu."""
    mixed, rows = reference.silu(causal_conv(x, conv, columns)), len(x)
    keys, share = mixer.key_heads * mixer.key_dim, mixer.value_heads // mixer.key_heads
    q, k = (
        np.repeat(unit(part.reshape(rows, mixer.key_heads, mixer.key_dim)), share, axis=1)
        for part in (mixed[:, :keys], mixed[:, keys : 2 * keys])
    )
    q = q * np.asarray(mixer.key_dim**-0.5, q.dtype)
    return q, k, mixed[:, 2 * keys :].reshape(rows, mixer.value_heads, mixer.value_dim)


def channel_decays(a: Array, mixer: ChannelDelta, a_log: Array, dt_bias: Array) -> Array:
    """What stays of the state's rows, [T, heads, dim], of projections a [T, heads * dim]."""
    a = (a + dt_bias.astype(a.dtype)).reshape(len(a), mixer.heads, mixer.dim)
    rates = np.exp(a_log.astype(a.dtype))[:, None]
    if mixer.lower_bound is None:
        logarithms = -rates * np.logaddexp(np.asarray(0, a.dtype), a)
    else:
        logarithms = np.asarray(mixer.lower_bound, a.dtype) * reference.sigmoid(rates * a)
    kept: Array = np.exp(logarithms)
    return kept


def over_tiles(q: Array, k: Array, v: Array, betas: Array, decays: Array, matrices: Array) -> Array:
    """``delta_rule`` on a state as stores keep it."""
    state = _untiled(matrices, v.shape[2])
    out = delta_rule(q, k, v, betas, decays, state)
    matrices[...] = _tiled(state, matrices.shape)
    return out


def gated_norm(out: Array, z: Array, weight: Array, eps: float, gate: str) -> Array:
    """[T, heads * value_dim] of out [T, heads, value_dim]: normed by head, times the gate of z."""
    z = z.reshape(out.shape)
    gated = reference.rms_norm(out, weight, eps)
    gated = gated * (reference.silu(z) if gate == "silu" else reference.sigmoid(z))
    return gated.reshape(len(out), -1)


def causal_conv(x: Array, weight: Array, columns: Array) -> Array:
    """A causal depthwise convolution of x [T, channels]; columns: the tokens before, the oldest first, which
    become the last ones."""
    before = len(columns)
    whole = np.concatenate([columns.astype(x.dtype), x])
    taps = weight.astype(x.dtype)
    total = sum(whole[tap : tap + len(x)] * taps[:, tap] for tap in range(before + 1))
    columns[...] = whole[len(whole) - before :]
    return np.asarray(total)


def unit(x: Array) -> Array:
    """x of length 1 over the last dimension."""
    squares = np.sum(x * x, axis=-1, keepdims=True)
    scaled: Array = x / np.sqrt(squares + np.asarray(_UNIT_EPS, x.dtype))
    return scaled


def delta_rule(q: Array, k: Array, v: Array, betas: Array, decays: Array, state: Array) -> Array:
    """[T, heads, value_dim] of q, k [T, heads, key_dim], v [T, heads, value_dim], betas [T, heads], decays
    [T, heads, key_dim or 1].

    state [heads, key_dim, value_dim], overwritten. Of each token: S = decay S; S += k (beta (v - S^T k))^T;
    S^T q.
    """
    out = np.empty_like(v)
    for t in range(len(q)):
        state *= decays[t, :, :, None]
        missing = (v[t] - np.einsum("hkv,hk->hv", state, k[t])) * betas[t, :, None]
        state += k[t, :, :, None] * missing[:, None, :]
        out[t] = np.einsum("hkv,hk->hv", state, q[t])
    return out


def _untiled(matrices: Array, value_dim: int) -> Array:
    heads, tiles, key_dim, columns = matrices.shape
    return matrices.transpose(0, 2, 1, 3).reshape(heads, key_dim, tiles * columns)[:, :, :value_dim].copy()


def _tiled(state: Array, shape: tuple[int, ...]) -> Array:
    heads, tiles, key_dim, columns = shape
    padded = np.zeros((heads, key_dim, tiles * columns), state.dtype)
    padded[:, :, : state.shape[2]] = state
    return padded.reshape(heads, key_dim, tiles, columns).transpose(0, 2, 1, 3)
