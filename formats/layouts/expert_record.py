"""Where the parts of one packed expert lie inside its record, and what all expert layouts share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import FormatError, UnsupportedModelError
from krasis.formats.layouts.matrix import MatrixView, PackStats
from krasis.formats.native import Pool

RECORD_ALIGNMENT_BYTES = 4096
SIZE_MULTIPLE = 64

Part = Literal["gate", "up", "down"]
PARTS: tuple[Part, ...] = ("gate", "up", "down")


def parts_of(gated: bool) -> tuple[Part, ...]:
    """The matrices of an expert: without a gate it has two."""
    return PARTS if gated else PARTS[1:]


@dataclass(frozen=True, slots=True)
class Section:
    """A range of bytes inside a record."""

    offset_bytes: int
    num_bytes: int

    @property
    def end_bytes(self) -> int:
        """One past the last byte."""
        return self.offset_bytes + self.num_bytes

    def of(self, record: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The section's bytes of a record, as a view."""
        return record[self.offset_bytes : self.end_bytes]


@dataclass(frozen=True, slots=True)
class ExpertRecord:
    """One expert: w13 (gate and up fused, or up alone) and w2 (down). Scales inside tiles: their sections are
    empty.
    """

    w13_codes: Section
    w13_scales: Section
    w2_codes: Section
    w2_scales: Section
    record_bytes: int

    @property
    def sections(self) -> tuple[Section, ...]:
        """All sections in the order they lie in."""
        return (self.w13_codes, self.w13_scales, self.w2_codes, self.w2_scales)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertImportance:
    """Weights of the squared error per input feature: E[x^2] of what multiplies it. None: all alike.

    hidden: float32 [hidden], for gate and up. intermediate: float32 [intermediate], for down.
    """

    hidden: npt.NDArray[np.float32] | None = None
    intermediate: npt.NDArray[np.float32] | None = None

    def of(self, part: Part) -> npt.NDArray[np.float32] | None:
        """The weights that apply to one matrix."""
        return self.intermediate if part == "down" else self.hidden


class ExpertPacker(ABC):
    """An expert format that packs whole experts out of their parts."""

    __slots__ = ()

    @abstractmethod
    def expert_record(self, hidden: int, intermediate: int, gated: bool = True) -> ExpertRecord:
        """See ``ExpertFormat``."""

    @abstractmethod
    def pack_part(
        self,
        pool: Pool,
        part: Part,
        matrix: MatrixView,
        out: npt.NDArray[np.uint8],
        *,
        hidden: int,
        intermediate: int,
        gated: bool = True,
        importance: npt.NDArray[np.float32] | None = None,
        where: str = "",
    ) -> PackStats:
        """See ``ExpertFormat``."""

    def pack_expert(
        self,
        pool: Pool,
        gate: MatrixView | None,
        up: MatrixView,
        down: MatrixView,
        out: npt.NDArray[np.uint8],
        importance: ExpertImportance | None = None,
        *,
        where: str = "",
    ) -> PackStats:
        """Packs gate (None: experts without), up [intermediate, hidden] and down [hidden, intermediate] into
        a record, padding included, and adds up what was lost. Raises as ``pack_part`` does.
        """
        gated = gate is not None
        parts: dict[Part, MatrixView] = {"up": up, "down": down}
        if gate is not None:
            parts = {"gate": gate, **parts}
        first = gate or up
        intermediate, hidden = first.n, first.k
        record = self.expert_record(hidden, intermediate, gated)
        check_record(out, record, where, writable=True)
        clear_padding(out, record)
        stats = PackStats()
        for part, matrix in parts.items():
            stats += self.pack_part(
                pool,
                part,
                matrix,
                out,
                hidden=hidden,
                intermediate=intermediate,
                gated=gated,
                importance=None if importance is None else importance.of(part),
                where=f"{where}.{part}" if where else part,
            )
        return stats


def lay_out(sizes_bytes: Mapping[str, int], alignment_bytes: int) -> ExpertRecord:
    """Sections of the given sizes one after the other, each at a multiple of alignment_bytes."""
    sections: dict[str, Any] = {}
    end = 0
    for name, num_bytes in sizes_bytes.items():
        offset = -(-end // alignment_bytes) * alignment_bytes
        sections[name] = Section(offset, num_bytes)
        end = offset + num_bytes
    record_bytes = -(-end // RECORD_ALIGNMENT_BYTES) * RECORD_ALIGNMENT_BYTES
    return ExpertRecord(**sections, record_bytes=record_bytes)


def check_expert_sizes(hidden: int, intermediate: int, where: str) -> None:
    """Raises UnsupportedModelError unless both sizes are positive multiples of 64."""
    for name, size in (("hidden", hidden), ("intermediate", intermediate)):
        if size <= 0 or size % SIZE_MULTIPLE:
            raise UnsupportedModelError(
                f"{name} size of the experts is not a multiple of the tile",
                where=where,
                got=size,
                limit=f"a positive multiple of {SIZE_MULTIPLE}",
            )


def check_part(part: Part, matrix: MatrixView, hidden: int, intermediate: int, where: str) -> None:
    """Raises FormatError unless the matrix is [intermediate, hidden] (gate, up) or the reverse (down)."""
    expected = (hidden, intermediate) if part == "down" else (intermediate, hidden)
    if (matrix.n, matrix.k) != expected:
        raise FormatError(
            "expert matrix has the wrong shape",
            where=where,
            got=f"({matrix.n}, {matrix.k})",
            limit=f"{expected}",
        )


def check_record(out: npt.NDArray[np.uint8], record: ExpertRecord, where: str, *, writable: bool) -> None:
    """Raises FormatError unless out is a contiguous uint8 [record_bytes] (and, if asked, writable)."""
    if out.dtype != np.uint8 or out.shape != (record.record_bytes,) or not out.flags.c_contiguous:
        raise FormatError(
            "expert record has the wrong form",
            where=where,
            got=f"{out.dtype} {out.shape}",
            limit=f"contiguous uint8 ({record.record_bytes},)",
        )
    if writable and not out.flags.writeable:
        raise FormatError("expert record is read-only", where=where)


def clear_padding(out: npt.NDArray[np.uint8], record: ExpertRecord) -> None:
    """Zeroes what lies between and after the sections, so that records are the same bytes every time."""
    end = 0
    for section in record.sections:
        out[end : section.offset_bytes] = 0
        end = max(end, section.end_bytes)
    out[end:] = 0
