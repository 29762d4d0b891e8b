"""Matrices of floats as blocks of MXFP4, for the formats that hold such."""

from __future__ import annotations

import numpy as np

from krasis.formats.layouts import mxfp4, native_pack
from krasis.formats.layouts.matrix import MatrixView, PackStats


def as_mxfp4(matrix: MatrixView, where: str) -> tuple[MatrixView, PackStats]:
    """A matrix of floats in blocks of MXFP4, and what that lost. Raises FormatError for weights that are not
    finite.
    """
    weights = matrix.to_float32()
    if not np.isfinite(weights).all():
        raise native_pack.bad_row(matrix, int((~np.isfinite(weights)).any(axis=1).argmax()), np.inf, where)
    blocks = MatrixView(mxfp4.quantize(weights), "MXFP4")
    error = (weights - blocks.to_float32()).astype(np.float64)
    largest = float(np.abs(error).max())
    squares = float(np.square(error).sum()), float(np.square(weights, dtype=np.float64).sum())
    return blocks, PackStats(*squares, largest)
