"""Quantised weights that are whole steps of a scale, which blocks of Q8_0 or codes of 4 bits can hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from krasis.formats.checkpoints.quantised.stored import Floats

BLOCK = 32
BLOCK_BYTES = 34


@dataclass(frozen=True, slots=True)
class Steps:
    """Weights [n, k] as ``codes * scales``: codes int8 [n, k], scales float32 [n, k / 32]."""

    codes: npt.NDArray[np.int8]
    scales: Floats

    @property
    def fit_4_bits(self) -> bool:
        """Whether all codes are -8..7."""
        return bool(((self.codes >= -8) & (self.codes <= 7)).all())

    def values(self) -> Floats:
        """float32 [n, k]."""
        n, k = self.codes.shape
        blocks = self.codes.reshape(n, -1, BLOCK).astype(np.float32)
        return (blocks * self.scales[:, :, None]).reshape(n, k)

    def q8_0(self) -> npt.NDArray[np.uint8]:
        """Blocks [n, k / 32 * 34] as GGML stores Q8_0: a float16 scale, 32 codes."""
        n, num_blocks = self.scales.shape
        out = np.empty((n, num_blocks, BLOCK_BYTES), np.uint8)
        out[:, :, :2] = np.ascontiguousarray(self.scales, "<f2").view(np.uint8).reshape(n, num_blocks, 2)
        out[:, :, 2:] = np.ascontiguousarray(self.codes).view(np.uint8).reshape(n, num_blocks, BLOCK)
        return out.reshape(n, -1)


def fit_float16(scales: Floats) -> bool:
    """Whether float16 holds all scales exactly."""
    with np.errstate(over="ignore"):
        return bool((scales.astype(np.float16).astype(np.float32) == scales).all())
