"""GGUF tensors of NVFP4 with a scale beside them: ``X.weight`` and ``X.scale``, one number a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from krasis.formats.checkpoints.ggml_blocks import block_size, dequantize, row_bytes
from krasis.formats.checkpoints.quantised.settings import Quantisation
from krasis.formats.checkpoints.quantised.steps import Steps
from krasis.formats.checkpoints.quantised.stored import Floats, Stored, scale_array, scale_values
from krasis.formats.checkpoints.quantised.tensors import Found, Tensors
from krasis.formats.errors import FormatError

_TYPE = "NVFP4"


@dataclass(frozen=True, slots=True)
class ScaledBlocks:
    """See ``QuantisedWeight``. Weights are the blocks' times their matrix's factor."""

    shape: tuple[int, ...]
    codes: Stored
    factor: Stored
    dtype: str = "nvfp4"
    by_rows: bool = True

    @property
    def others(self) -> tuple[Stored, ...]:
        """The factor."""
        return (self.factor,)

    @property
    def block(self) -> tuple[int, int]:
        """GGML's."""
        return block_size(self.codes.dtype)

    def decode(self, first: int, count: int) -> Floats:
        """float32 [count, k]; see ``QuantisedWeight``."""
        k = self.shape[-1]
        raw = self.codes.bytes().reshape(-1, row_bytes(self.codes.dtype, k))[first : first + count]
        values = dequantize(raw, self.codes.dtype, (count, k), self.codes.where)
        factors = scale_values(scale_array(self.factor), self.factor)
        matrix = np.arange(first, first + count) // self.shape[-2]
        with np.errstate(all="ignore"):
            return values * (factors[matrix, None] if factors.size > 1 else factors)

    @property
    def symmetric_group(self) -> int | None:
        """None: codes are floats."""
        return None

    def step_scales(self, first: int, count: int) -> Floats | None:
        """None: a block has a scale for 16 weights."""
        return None

    def pairs(self, first: int, count: int) -> None:
        """None, likewise."""

    def steps(self, first: int, count: int) -> Steps:
        """None are."""
        raise FormatError("weights of NVFP4 are not whole steps of a scale", where=self.codes.where)

    def locate(self, block: int) -> tuple[int, int]:
        """(row, column) of the first weight of a block."""
        weights = self.block[0]
        return block * weights // self.shape[-1], block * weights % self.shape[-1]


@dataclass(frozen=True, slots=True)
class ScaledBlocksReader:
    """Weights of NVFP4 that have a scale beside them; others are whole without."""

    def read(self, name: str, tensors: Tensors) -> Found | None:
        """See ``Reader``."""
        if tensors.infos[name].dtype != _TYPE or not name.endswith(".weight"):
            return None
        factor = tensors.find(f"{name.removesuffix('weight')}scale")
        if factor is None:
            return None
        codes = tensors.codes(name, 2, 3)
        factor.check_dtype("F32")
        if math.prod(factor.shape) not in (1, math.prod(codes.shape[:-2])) or 0 in factor.shape:
            raise factor.wrong_shape(f"one number a matrix of {list(codes.shape)}")
        return Found(name, ScaledBlocks(codes.shape, codes, factor))


def of_gguf(tensors: Tensors) -> Quantisation | None:
    """What a GGUF needs; None if it has no tensors of this kind."""
    if not any(info.dtype == _TYPE for info in tensors.infos.values()):
        return None
    return Quantisation(_TYPE, (ScaledBlocksReader(),))
