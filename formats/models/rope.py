"""Rotary embeddings and what depends on a position besides them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from krasis.formats.models.record import MAX_HEAD_DIM, MAX_POSITIONS, Record, fail, number, size


@dataclass(frozen=True, slots=True)
class RopeScaling(Record):
    """Long-context scaling of a rotary embedding.

    factor: context length over the original. ``yarn``: https://arxiv.org/abs/2309.00071 as transformers
    reads it; attention_factor None stands for 0.1 ln(factor) + 1. ``llama3`` blends by wavelength between the
    two frequency factors. ``proportional``: all pairs of the head, those beyond ``dims`` with frequency 0.
    """

    kind: Literal["none", "linear", "yarn", "llama3", "proportional"] = "none"
    factor: float = number(1.0, 1e6, 1.0)
    original_max_positions: int = size(MAX_POSITIONS, 0, 0)
    attention_factor: float | None = number(1e-3, 1e3, None)
    beta_fast: float = number(1e-6, 1e6, 32.0)
    beta_slow: float = number(1e-6, 1e6, 1.0)
    truncate: bool = True
    low_freq_factor: float = number(1e-6, 1e6, 1.0)
    high_freq_factor: float = number(1e-6, 1e6, 4.0)

    def check(self) -> None:
        if self.kind in ("yarn", "llama3") and self.original_max_positions < 1:
            raise fail(
                "size is out of range", self, "original_max_positions", self.original_max_positions, ">= 1"
            )


@dataclass(frozen=True, slots=True)
class Rope(Record):
    """Rotation of ``dims`` channels of each head, at its first or last place.

    style: ``half`` pairs channel i with i + dims/2, ``interleaved`` 2i with 2i + 1.
    """

    dims: int = size(MAX_HEAD_DIM)
    theta: float = number(1.0, 1e15)
    style: Literal["half", "interleaved"] = "half"
    place: Literal["first", "last"] = "first"
    scaling: RopeScaling = RopeScaling()

    def check(self) -> None:
        if self.dims % 2:
            raise fail("rotated channels come in pairs", self, "dims", self.dims, "an even number")


@dataclass(frozen=True, slots=True)
class QueryTemperature(Record):
    """Queries at position p are multiplied by 1 + scale * ln(1 + floor((p + shift) / period))."""

    scale: float = number(0.0, 1e3)
    period: int = size(MAX_POSITIONS)
    shift: int = size(1, 0, 0)
