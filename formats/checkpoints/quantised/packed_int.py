"""Integers packed into 32-bit words along each row, as compressed-tensors does ("pack-quantized")."""

from __future__ import annotations

from dataclasses import dataclass

from krasis.formats.checkpoints.quantised.rows import (
    PACKED_TABLES,
    Grid,
    RowsWeight,
    ZeroPoints,
    fit_grid,
)
from krasis.formats.checkpoints.quantised.stored import Stored
from krasis.formats.checkpoints.quantised.tensors import Found, Tensors
from krasis.formats.errors import FormatError

PACKED_BITS = tuple(PACKED_TABLES)


@dataclass(frozen=True, slots=True)
class PackedScheme:
    """One of the settings' ways. group: weights a scale, None for a row or a matrix. symmetric: there are no
    zero points. ordered: which input feature is of which group has to be told.
    """

    bits: int
    group: int | None
    symmetric: bool = True
    ordered: bool = False


@dataclass(frozen=True, slots=True)
class PackedReader:
    """schemes: those that the settings name."""

    schemes: tuple[PackedScheme, ...]

    def read(self, name: str, tensors: Tensors) -> Found | None:
        """See ``Reader``."""
        if not name.endswith("_packed") or tensors.infos[name].dtype != "I32":
            return None
        base = name.removesuffix("_packed")
        codes = tensors.codes(name, 2, 3)
        scale = tensors.need(name, f"{base}_scale")
        told = tensors.find(f"{base}_shape")
        if told is not None:
            told.check_dtype("I64", "I32")
            if told.shape != (len(codes.shape),):
                raise told.wrong_shape(f"{len(codes.shape)} sizes")
        scheme, grid = self._scheme(codes, scale, told)
        bits = scheme.bits
        if not scheme.symmetric:
            tensors.need(name, f"{base}_zero_point")
        if scheme.ordered:
            tensors.need(name, f"{base}_g_idx")
        return Found(
            base,
            RowsWeight(
                dtype=f"int{bits}",
                shape=(*codes.shape[:-1], grid.k),
                codes=codes,
                table=PACKED_TABLES[bits],
                scales=grid,
                zeros=_zeros(tensors.find(f"{base}_zero_point"), grid, bits, codes.shape),
                group_of_column=_groups(tensors.find(f"{base}_g_idx"), grid.k),
                told_shape=told,
            ),
        )

    def _scheme(self, codes: Stored, scale: Stored, told: Stored | None) -> tuple[PackedScheme, Grid]:
        """The one of the settings' schemes that the shapes fit; the shape that is told decides between
        several.
        """
        fitting: list[tuple[PackedScheme, Grid]] = []
        error: FormatError | None = None
        for scheme in self.schemes:
            shape = (*codes.shape[:-1], codes.shape[-1] * 32 // scheme.bits)
            try:
                grid = fit_grid(scale, shape, () if scheme.group is None else ((1, scheme.group),))
            except FormatError as caught:
                error = error or caught
            else:
                fitting.append((scheme, grid))
        if len({scheme.bits for scheme, _ in fitting}) > 1 and told is not None:
            columns = told.array().tolist()[-1]
            fitting = [one for one in fitting if one[1].k == columns] or fitting
        if fitting:
            return fitting[0]
        raise error or scale.wrong_shape("settings of packed integers")


def _zeros(stored: Stored | None, grid: Grid, bits: int, shape: tuple[int, ...]) -> ZeroPoints | None:
    if stored is None:
        return None
    zeros = Grid(stored, grid.rows, grid.columns, grid.n, grid.k)
    if stored.dtype == "I8":
        if stored.shape != grid.stored.shape:
            raise stored.wrong_shape(f"{list(grid.stored.shape)}, as the scales have")
        return ZeroPoints(zeros, None)
    stored.check_dtype("I32", "I8")
    expected = (*shape[:-2], -(-grid.n * bits // 32), grid.width)
    if stored.shape != expected or grid.rows != 1:
        raise stored.wrong_shape(str(list(expected)))
    return ZeroPoints(zeros, bits)


def _groups(stored: Stored | None, k: int) -> Stored | None:
    if stored is None:
        return None
    stored.check_dtype("I32", "I64")
    if stored.shape != (k,):
        raise stored.wrong_shape(str([k]))
    return stored
