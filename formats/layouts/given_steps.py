"""Scales that come with a matrix, for packers to 4 bits: which group and type can take them as they are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from krasis.formats.layouts.matrix import MatrixView, bf16_to_float32, float32_to_bf16

STEP_K = 32
# A scale that its type rounds by more is too small or too large for it, and is searched for instead.
_LARGEST_ROUNDING = np.float32(2.0**-8)


def given_steps(matrix: MatrixView, group: int, scale_dtype: str) -> npt.NDArray[np.float32] | None:
    """The scales [n, k/group] of which each group's weights are -8..7 whole steps; None if they are not
    known, differ within a group, or are out of the range of scale_dtype (``BF16``, ``F16``).
    """
    if matrix.steps is None or group % STEP_K or matrix.k % group:
        return None
    spread = matrix.steps.reshape(matrix.n, matrix.k // group, group // STEP_K)
    steps = np.ascontiguousarray(spread[:, :, 0])
    if not (spread == steps[:, :, None]).all() or not np.isfinite(steps).all():
        return None
    with np.errstate(over="ignore"):
        stored = (
            bf16_to_float32(float32_to_bf16(steps))
            if scale_dtype == "BF16"
            else steps.astype(np.float16).astype(np.float32)
        )
    return steps if (np.abs(stored - steps) <= _LARGEST_ROUNDING * np.abs(steps)).all() else None
