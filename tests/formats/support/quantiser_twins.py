"""The native quantisers restated in NumPy, operation for operation: same codes, same scales, on any machine.

Slow: it is the readable statement of what ``csrc/cpu/pack_search.h`` computes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.layouts.matrix import bf16_to_float32, float32_to_bf16

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

NARROW = (6.0, 6.5, 7.0, 7.3, 7.6, 7.8, 8.0, 8.2, 8.4, 8.65, 8.9, 9.2, 9.5, 9.8, 10.2, 10.7)
WIDE = (
    *(6.0, 6.5, 7.0, 7.4, 7.7, 8.0, 8.3, 8.65, 9.0, 9.4, 9.8, 10.2, 10.7, 11.2, 11.7, 12.3),
    *(12.9, 13.6, 14.3, 15.0, 16.0, 17.0, 18.0, 19.5, 21.0, 23.0, 25.0, 28.0, 31.0, 35.0, 40.0, 48.0),
)
NARROW_GROUP = 128
LEAST_SCALE = {"BF16": np.float32(2.0**-126), "F16": np.float32(2.0**-24)}

_F32 = np.float32


def fused_multiply_add(a: Array, b: Array, c: Array) -> Floats:
    """a * b + c of float32 arrays with one rounding.

    The product is exact in float64. The sum is rounded to odd there, so that rounding it again is right.
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = np.broadcast_to(c, product.shape).astype(np.float64)
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)
    even = (total.view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & even, odd, total).astype(np.float32)


def stored_scale(magnitude: Floats, scale_dtype: str) -> Floats:
    """A positive scale as the kernels read it back: rounded to 16 bits, neither zero nor infinite."""
    if scale_dtype == "BF16":
        rounded = bf16_to_float32(float32_to_bf16(magnitude))
    else:
        with np.errstate(over="ignore"):
            rounded = np.minimum(magnitude.astype(np.float16).astype(np.float32), _F32(65504))
    return np.maximum(rounded, LEAST_SCALE[scale_dtype])


def _sums(w: Floats, inverse: Floats, importance: Floats | None) -> tuple[Floats, Floats, Floats]:
    """Sums over the group of (q - x)^2, x * q and q^2. w: [groups, k]; inverse: [groups, candidates]."""
    error, xq, qq = (np.zeros(inverse.shape, np.float32) for _ in range(3))
    for i in range(w.shape[1]):
        x = w[:, i : i + 1]
        level = _rounded_levels(x, inverse)
        e = fused_multiply_add(-x, inverse, level)
        factor = _F32(1) if importance is None else importance[:, i : i + 1]
        error = fused_multiply_add(e, e * factor, error)
        xq = fused_multiply_add(x * inverse, level * factor, xq)
        qq = fused_multiply_add(level, level * factor, qq)
    return error, xq, qq


def _rounded_levels(x: Floats, inverse: Floats) -> Floats:
    """round(x * inverse), ties of the exact product to even, within -8..7."""
    exact = x.astype(np.float64) * inverse.astype(np.float64)
    return np.clip(np.rint(exact), -8, 7).astype(np.float32)


def _better_sign(w: Floats, absmax: Floats) -> Floats:
    bound = absmax * _F32(7.5 / 8)
    excess = np.zeros_like(absmax)
    for i in range(w.shape[1]):
        excess = excess + (w[:, i] - np.maximum(np.minimum(w[:, i], bound), -bound))
    return np.where(excess > 0, _F32(-1), _F32(1))


def search_int4_scale(w: Floats, scale_dtype: str, importance: Floats | None = None) -> tuple[Floats, Floats]:
    """(magnitude, sign) [groups] of the scales of groups w [groups, k]. importance: alike, at most 1."""
    absmax = np.abs(w).max(axis=1)
    base = np.maximum(absmax, LEAST_SCALE[scale_dtype])
    narrow = importance is None and w.shape[1] <= NARROW_GROUP
    grid = NARROW if narrow else WIDE
    signs = [_better_sign(w, absmax)] if narrow else [np.full_like(absmax, s) for s in (1, -1)]
    best_error = np.full_like(absmax, np.inf)
    best_magnitude, best_sign = np.ones_like(absmax), np.ones_like(absmax)
    sums: list[Floats] = [np.zeros_like(absmax), np.zeros_like(absmax)]

    def offer(magnitude: Floats, sign: Floats, found: tuple[Floats, Floats, Floats]) -> None:
        nonlocal best_error, best_magnitude, best_sign
        ratio = magnitude / base
        error = found[0] * (ratio * ratio)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_magnitude = np.where(better, magnitude, best_magnitude)
        best_sign = np.where(better, sign, best_sign)
        sums[:] = [np.where(better, new, old) for new, old in zip(found[1:], sums, strict=True)]

    for sign in signs:
        reciprocals = _F32(1) / np.array(grid, np.float32)
        magnitudes = stored_scale(absmax[:, None] * reciprocals, scale_dtype)
        found = _sums(w, sign[:, None] / magnitudes, importance)
        for c in range(len(grid)):
            offer(magnitudes[:, c], sign, (found[0][:, c], found[1][:, c], found[2][:, c]))
    for _ in range(2 if narrow else 3):
        ratio = sums[0] / np.maximum(sums[1], _F32(2.0**-100))
        magnitude = stored_scale(best_magnitude * ratio, scale_dtype)
        error, xq, qq = _sums(w, (best_sign / magnitude)[:, None], importance)
        offer(magnitude, best_sign, (error[:, 0], xq[:, 0], qq[:, 0]))
    return best_magnitude, best_sign


def quantize_int4(
    weights: Floats, group: int, scale_dtype: str, importance: Floats | None = None
) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Codes q + 8 [n, k] and scales float32 [n, k/group] of weights [n, k]. importance: float32 [k]."""
    n, k = weights.shape
    w = weights.reshape(-1, group)
    spread = None
    if importance is not None:
        spread = np.tile((importance / importance.max()).reshape(-1, group), (n, 1))
    magnitude, sign = search_int4_scale(w, scale_dtype, spread)
    levels = _rounded_levels(w, (sign / magnitude)[:, None])
    occupied = _rounded_levels(np.abs(w).max(axis=1), _F32(1) / magnitude) > 0
    scales = np.where(occupied, sign * magnitude, _F32(1))
    return (levels + 8).astype(np.uint8).reshape(n, k), scales.reshape(n, k // group)


def quantize_marlin_int8(
    weights: Floats, group: int, scale_dtype: str
) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Codes q + 128 [n, k] and scales float32 [n, k/group], absmax / 127 rounded to 16 bits."""
    n, k = weights.shape
    w = weights.reshape(-1, group)
    absmax = np.abs(w).max(axis=1)
    magnitude = stored_scale(absmax / _F32(127), scale_dtype)
    inverse = _F32(1) / magnitude
    exact = w.astype(np.float64) * inverse.astype(np.float64)[:, None]
    codes = (np.clip(np.rint(exact), -128, 127) + 128).astype(np.uint8)
    occupied = np.rint(absmax.astype(np.float64) * inverse) > 0
    return codes.reshape(n, k), np.where(occupied, magnitude, _F32(1)).reshape(n, k // group)


def quantize_q8_0(weights: Floats) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Codes [n, k] and float16 scales [n, k/32] as ggml's Q8_0: d = absmax / 127, ties away from 0."""
    n, k = weights.shape
    w = weights.reshape(-1, 32)
    d = np.abs(w).max(axis=1) / _F32(127)
    usable = d >= _F32(float.fromhex("0x1.00001p-128"))
    inverse = np.where(usable, _F32(1) / np.where(usable, d, _F32(1)), _F32(0))
    scaled = (w * inverse[:, None]).astype(np.float64)
    codes = np.copysign(np.floor(np.abs(scaled) + 0.5), scaled).astype(np.int8)
    return codes.reshape(n, k), d.astype(np.float16).reshape(n, k // 32)


def quantize_int8_rows(weights: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """Codes [n, k] and float32 scales [n]: absmax / 127, rounded half to even."""
    scale = np.abs(weights).max(axis=1) / _F32(127)
    usable = scale >= _F32(2.0**-126)
    safe = np.where(usable, scale, _F32(1))
    inverse = np.where(usable, _F32(1) / safe, _F32(0))
    return np.rint(weights * inverse[:, None]).astype(np.int8), safe
