"""One code a byte: FP8 (E4M3) in blocks, by channel or by tensor, MXFP8, and INT8."""

from __future__ import annotations

from dataclasses import dataclass

from krasis.formats.checkpoints.quantised.rows import (
    FP8_TABLE,
    INT8_TABLE,
    Grid,
    RowsWeight,
    ZeroPoints,
    fit_grid,
)
from krasis.formats.checkpoints.quantised.settings import Quantisation, Settings
from krasis.formats.checkpoints.quantised.stored import Stored
from krasis.formats.checkpoints.quantised.tensors import Found, Tensors

MX_BLOCK = (1, 32)
_PARTS = ("_scale", "_scale_inv", "_scales", "_scale_2", "_global_scale", "_zero_point", "_packed", ".scale")


@dataclass(frozen=True, slots=True)
class BytesReader:
    """Weights of type F8_E4M3, or I8 if ``integers``. blocks: (rows, columns) that a scale may be for, beside
    a whole row and a whole matrix. asymmetric: integers have zero points.
    """

    blocks: tuple[tuple[int, int], ...] = ()
    integers: bool = False
    asymmetric: bool = False

    def read(self, name: str, tensors: Tensors) -> Found | None:
        """See ``Reader``."""
        if tensors.infos[name].dtype != ("I8" if self.integers else "F8_E4M3") or name.endswith(_PARTS):
            return None
        codes = tensors.codes(name, 2, 3)
        names = [f"{name}_scale_inv", f"{name}_scale"]
        names += [f"{name[:-6]}scale", f"{name[:-6]}qscale_weight"] if name.endswith(".weight") else []
        scale = tensors.need(name, *names)
        if self.integers and scale.dtype in ("U8", "F8_E8M0"):
            return None  # FP4 codes, two a byte
        if self.asymmetric:
            tensors.need(name, f"{name}_zero_point")
        grid = fit_grid(scale, codes.shape, self.blocks)
        is_mx = scale.dtype in ("U8", "F8_E8M0") and (grid.rows, grid.columns) == MX_BLOCK
        label = "int8" if self.integers else "mxfp8" if is_mx else "fp8"
        return Found(
            name,
            RowsWeight(
                dtype=label,
                shape=codes.shape,
                codes=codes,
                table=INT8_TABLE if self.integers else FP8_TABLE,
                scales=grid,
                zeros=_zeros(tensors.find(f"{name}_zero_point"), grid) if self.integers else None,
            ),
        )


def _zeros(stored: Stored | None, grid: Grid) -> ZeroPoints | None:
    if stored is None:
        return None
    stored.check_dtype("I8")
    if stored.shape != grid.stored.shape:
        raise stored.wrong_shape(f"{list(grid.stored.shape)}, as the scales have")
    return ZeroPoints(Grid(stored, grid.rows, grid.columns, grid.n, grid.k), None)


def recognise(settings: Settings) -> Quantisation:
    """``quant_method`` fp8, fbgemm_fp8 and mxfp8."""
    from krasis.formats.checkpoints.quantised.fp4 import Fp4Reader

    settings.expect("fmt", "e4m3", "float8_e4m3fn")
    blocks = [MX_BLOCK]
    if settings.has("weight_block_size"):
        blocks.insert(0, settings.pair("weight_block_size"))
    # DeepSeek's own checkpoints have experts of FP4 under the same settings.
    return Quantisation("FP8", (BytesReader(tuple(blocks)), Fp4Reader()))
