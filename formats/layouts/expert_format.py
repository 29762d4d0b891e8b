"""What the rest of the program asks a layout, and more of one that holds experts: an expert format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from krasis.formats.layouts.expert_record import ExpertImportance, ExpertRecord, Part
from krasis.formats.layouts.matrix import MatrixView, PackStats
from krasis.formats.native import DTYPE_CODES, Pool

ExpertTier = Literal["gpu", "cpu"]
Acceptance = Literal["as is", "decoded"]


@dataclass(frozen=True, slots=True)
class Int8Tile:
    """What repeats in a weight of int8 codes: num_bytes, of which the last scales_bytes are no codes."""

    num_bytes: int
    scales_bytes: int


@dataclass(frozen=True, slots=True)
class Strips:
    """Bytes of a blob that the CPU's threads share out in ``count`` equal strips.

    offset_bytes: in the blob. mirrored: the last NUMA node has the first strips.
    """

    offset_bytes: int
    num_bytes: int
    count: int
    mirrored: bool = False


class Layout(Protocol):
    """A layout of packed weights, dense or of experts."""

    @property
    def layout_id(self) -> str:
        """The name a bundle stores."""

    @property
    def int8_tile(self) -> Int8Tile | None:
        """Where int8 codes lie that are never -128; None for codes of another kind."""

    def explained_error(self, k: int) -> float:
        """The squared error, relative to the squared weights, that rounding can leave of k columns."""

    def strips(
        self, shape: tuple[int, ...], num_bytes: int, hidden: int, intermediate: int, gated: bool = True
    ) -> Iterator[Strips]:
        """What the NUMA nodes share of a blob of this shape and size; nothing if no CPU kernel reads it.

        hidden, intermediate, gated: of the model's experts.
        """


class ExpertFormat(Layout, Protocol):
    """A layout of experts. A new one is a class in a file of its own and an entry in ``registry``."""

    @property
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def tier(self) -> ExpertTier:
        """The copy of the experts that may be in this format."""

    @property
    def backends(self) -> frozenset[ExpertTier]:
        """Those with kernels for it."""

    @property
    def tiles(self) -> str | None:
        """The name of the CPU kernels' tiles; None for a format without them."""

    @property
    def scale_dtype(self) -> str:
        """``BF16``, ``F16`` or ``E8M0``."""

    def group_of(self, k: int, where: str = "") -> int:
        """Input features a scale, for k of them. Raises UnsupportedModelError unless that divides k."""

    def fitted(self, sizes: Iterable[int]) -> ExpertFormat:
        """This format, or if its group does not divide all sizes the same with the largest one that does.

        Raises UnsupportedModelError, naming a size, if there is none.
        """

    def accepts(self, dtype: str) -> Acceptance:
        """Whether ``pack_part`` takes weights of a source's dtype as they are, or decoded to float32."""

    def expert_record(self, hidden: int, intermediate: int, gated: bool = True) -> ExpertRecord:
        """Sections of one expert, which has no gate unless gated: its w13 is up alone. Raises
        UnsupportedModelError for sizes that do not fit.
        """

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
        """Packs one matrix of an expert into its place in a record, ``out``."""

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
        """Packs gate (None: experts without), up [intermediate, hidden] and down [hidden, intermediate]
        into a record.
        """

    def unpack_expert(
        self, record: npt.NDArray[np.uint8], hidden: int, intermediate: int, gated: bool = True
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """gate, up [intermediate, hidden] and down [hidden, intermediate], dequantised; a gate of no rows
        for an expert without.
        """


def accepts_floats(dtype: str) -> Acceptance:
    """The answer of a format whose packer takes plain floats alone."""
    return "as is" if dtype in DTYPE_CODES else "decoded"


def rounding_error(bits: int, group: int) -> float:
    """What rounding to symmetric codes with a scale a group explains of the squared weights; for 4 bits, of
    weights that models have: the bound would explain anything.
    """
    if bits == 4:
        return 0.25 if group <= 128 else 0.5
    # Each weight is off by half a step of largest / 127 at most. A tenth and more for the scale's rounding.
    return 1.1 * group / 254**2 + 5e-4
