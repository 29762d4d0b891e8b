"""The work that every kernel of stage ``layer`` gets: one layer's experts, routings, a token, and the result.

All of it is made from the shape alone, so that programs of different environments compute the same. Needs
NumPy only. Weights are codes times a float16 scale a group of 32 input features: exactly a Q8_0 tensor for 8
bits; for 4 bits, codes of -8 to 7 whose scales fit bfloat16 too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

GROUP = 32
NUM_ROUTINGS = 509  # prime, and so many that a cache cannot know them
MIN_SAMPLE_S = 0.5
# Results of sound kernels differ by their rounding; a wrong layout or a lost expert gives 1 and more.
MOST_ERROR = 0.5
PARTS = ("gate", "up", "down")

Array = npt.NDArray[Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all runners share."""
    for name in ("threads", "hidden", "intermediate", "experts", "top-k", "repeats"):
        parser.add_argument(f"--{name}", type=int, required=True)


@dataclass(frozen=True)
class LayerWork:
    """bits: 8 or 4. group: input features that share a scale; a multiple of 32."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    bits: int
    group: int = GROUP

    def shape(self, part: str) -> tuple[int, int]:
        """(n, k) of a matrix."""
        return (self.hidden, self.intermediate) if part == "down" else (self.intermediate, self.hidden)

    @cached_property
    def _base(self) -> dict[str, tuple[Array, Array]]:
        rng = np.random.default_rng(3)
        found = {}
        for part in PARTS:
            n, k = self.shape(part)
            low, high = (-127, 128) if self.bits == 8 else (-8, 8)
            codes = rng.integers(low, high, (n, k), dtype=np.int8)
            # Four significant bits, about as large as trained weights: exact in float16 and in bfloat16.
            scales = rng.integers(8, 16, (n, k // self.group)) * (2.0**-15 if self.bits == 8 else 2.0**-11)
            found[part] = codes, scales.astype(np.float16)
        return found

    def matrix(self, expert: int, part: str) -> tuple[Array, Array]:
        """Codes int8 [n, k] and scales float16 [n, k/group]. Experts have the same rows, in other orders."""
        codes, scales = self._base[part]
        return np.roll(codes, expert, axis=0), np.roll(scales, 3 * expert, axis=0)

    def values(self, expert: int, part: str) -> Array:
        """The same as float32 [n, k]."""
        codes, scales = self.matrix(expert, part)
        n, k = codes.shape
        blocks = codes.reshape(n, -1, self.group).astype(np.float32) * scales[..., None].astype(np.float32)
        return blocks.reshape(n, k)

    def q8_0(self, expert: int, part: str) -> Array:
        """The same as Q8_0 blocks, uint8 [n, k/32, 34]."""
        codes, scales = self.matrix(expert, part)
        n, k = codes.shape
        blocks = np.empty((n, k // GROUP, 34), np.uint8)
        blocks[..., :2] = scales.view(np.uint8).reshape(n, -1, 2)
        blocks[..., 2:] = codes.view(np.uint8).reshape(n, -1, GROUP)
        return blocks

    def nibbles(self, expert: int, part: str) -> tuple[Array, Array]:
        """4-bit codes plus 8, two input features a byte (the first one low), uint8 [n, k/2]; scales."""
        codes, scales = self.matrix(expert, part)
        raised = (codes + 8).astype(np.uint8)
        return raised[:, ::2] | raised[:, 1::2] << 4, scales

    @property
    def num_weights(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.intermediate

    @cached_property
    def routings(self) -> Array:
        """Experts of each token, int64 [509, top_k], without repetition."""
        order = np.random.default_rng(5).random((NUM_ROUTINGS, self.experts)).argsort(axis=-1)
        return np.ascontiguousarray(order[:, : self.top_k].astype(np.int64))

    @cached_property
    def token(self) -> Array:
        """The input, float32 [1, hidden], of values that bfloat16 can hold."""
        values = np.random.default_rng(7).standard_normal((1, self.hidden)).astype(np.float32)
        return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)

    def expected(self, routing: int = 0) -> Array:
        """What the layer gives for the token, float64 [hidden]; all routed experts weigh 1/top_k."""
        x, total = self.token[0].astype(np.float64), np.zeros(self.hidden)
        for expert in self.routings[routing]:
            gate, up, down = (self.values(int(expert), part) for part in PARTS)
            inner = gate @ x
            total += down @ (inner / (1 + np.exp(-inner)) * (up @ x))
        return total / self.top_k

    def error(self, result: Array, routing: int = 0) -> float:
        """Relative error of a result, by the 2-norm. Raises RuntimeError if that cannot be rounding."""
        expected = self.expected(routing)
        error = float(
            np.linalg.norm(result.astype(np.float64).reshape(-1) - expected) / np.linalg.norm(expected)
        )
        if not error <= MOST_ERROR:
            raise RuntimeError(f"the layer's result is wrong: relative error {error:.3g}")
        return error

    def pieces(self) -> Iterator[tuple[int, str]]:
        """(expert, part) of all matrices."""
        return ((expert, part) for expert in range(self.experts) for part in PARTS)
