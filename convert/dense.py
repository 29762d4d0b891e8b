"""Packs the non-expert tensors: INT8 rows for the matrices, the tensor's own bytes for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from krasis.convert.alarms import Alarms
from krasis.convert.digests import ContentDigests
from krasis.convert.plan import CHUNK_BYTES, PLAIN_LAYER, Unit
from krasis.convert.quality import UnitQuality
from krasis.convert.slices import TensorSlice, first_nonfinite_row
from krasis.convert.sources import WeightSource
from krasis.convert.writer_thread import WriterThread
from krasis.formats.bundle.writer import BlobSink, BundleWriter
from krasis.formats.errors import FormatError
from krasis.formats.files.aligned import aligned_empty
from krasis.formats.layouts import STRIP_ROWS, Int8RowsLayout, padded_rows
from krasis.formats.layouts.matrix import MatrixView
from krasis.formats.native import Pool

QKV_PARTS = ("attention.q", "attention.k", "attention.v")


@dataclass(frozen=True, slots=True)
class DensePacker:
    """Packs dense units. advance is called with source bytes as they are dealt with."""

    pool: Pool
    source: WeightSource
    writer: BundleWriter
    thread: WriterThread
    digests: ContentDigests
    alarms: Alarms
    advance: Callable[[int], None]

    def pack(self, unit: Unit) -> tuple[dict[str, str], UnitQuality]:
        """Writes the unit's blobs; their digests and errors. Raises FormatError for NaN or infinity."""
        quality = UnitQuality(unit.layer)
        if unit.layer is None:
            digests = self._plain("embedding", self.source.dense("embedding"))
            digests |= self._plain("final_norm", self.source.dense("final_norm"))
            rows = padded_rows(self.source.architecture.vocab_size)
            digests |= self._int8("lm_head", [self.source.dense("lm_head")], rows, quality)
            return digests, quality
        prefix = f"layers.{unit.layer}."
        parts = [self.source.dense(part, unit.layer) for part in QKV_PARTS]
        rows = self.source.architecture.qkv_rows
        digests = self._int8(f"{prefix}attention.qkv", parts, rows, quality)
        output = self.source.dense("attention.output", unit.layer)
        digests |= self._int8(f"{prefix}attention.output", [output], output.shape[0], quality)
        for ours in PLAIN_LAYER:
            digests |= self._plain(f"{prefix}{ours}", self.source.dense(ours, unit.layer))
        return digests, quality

    def _read(self, piece: TensorSlice) -> None:
        piece.touch()
        self.digests.add(self.source.kind, piece)
        self.advance(piece.raw.nbytes)

    def _plain(self, name: str, piece: TensorSlice) -> dict[str, str]:
        with self.writer.open_blob(name) as sink:
            for block in _row_blocks(piece, 1):
                self._read(block)
                data = block.raw if block.is_float else _decoded_bytes(block)
                _check_finite(block if block.is_float else _as_f32(block, data), piece)
                self.thread.write(sink, data)
            self.alarms.look_at(piece)
            self.thread.flush()
            return {name: sink.close()}

    def _int8(self, name: str, parts: list[TensorSlice], rows: int, quality: UnitQuality) -> dict[str, str]:
        """parts: stacked row-wise; zero rows fill the last one up to ``rows``."""
        kind = name.split(".", 2)[-1]
        scales = np.zeros(rows, np.float32)
        with ExitStack() as stack:
            sink = stack.enter_context(self.writer.open_blob(name))
            done = 0
            for matrix, where in self._matrices(parts):
                done += self._pack_matrix(sink, matrix, where, scales[done:], kind, quality)
            for piece in parts:
                self.alarms.look_at(piece)
            self.thread.flush()
            digests = {name: sink.close()}
            scale_sink = stack.enter_context(self.writer.open_blob(f"{name}.scale"))
            scale_sink.write(scales.view(np.uint8))
            digests[f"{name}.scale"] = scale_sink.close()
        return digests

    def _matrices(self, parts: list[TensorSlice]) -> Iterator[tuple[MatrixView, str]]:
        """The parts in blocks of whole strips; check_architecture made sure that parts end at strips."""
        for piece in parts:
            for block in _row_blocks(piece, STRIP_ROWS):
                self._read(block)
                yield block.matrix(), block.where

    def _pack_matrix(
        self,
        sink: BlobSink,
        matrix: MatrixView,
        where: str,
        scales: npt.NDArray[np.float32],
        kind: str,
        quality: UnitQuality,
    ) -> int:
        padded = padded_rows(matrix.n)
        if padded != matrix.n:
            filled = np.zeros((padded, matrix.k), matrix.data.dtype)
            filled[: matrix.n] = matrix.data
            matrix = MatrixView(filled, matrix.dtype)
        layout = Int8RowsLayout()
        shape = layout.codes_shape(padded, matrix.k)
        codes = aligned_empty(math.prod(shape)).view(np.int8).reshape(shape)
        quality.add(kind, layout.pack(self.pool, matrix, codes, scales[:padded], where=where))
        self.thread.write(sink, codes.reshape(-1).view(np.uint8))
        return padded


def _row_blocks(piece: TensorSlice, multiple: int) -> list[TensorSlice]:
    """Blocks of at most CHUNK_BYTES of float32, each but the last a multiple of ``multiple`` rows."""
    columns = piece.shape[1] if len(piece.shape) > 1 else 1
    rows = max(1, CHUNK_BYTES // (4 * columns * multiple)) * multiple
    return [piece.rows(start, start + rows) for start in range(0, piece.shape[0], rows)]


def _decoded_bytes(block: TensorSlice) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(block.decode()).reshape(-1).view(np.uint8)


def _as_f32(block: TensorSlice, data: npt.NDArray[np.uint8]) -> TensorSlice:
    return TensorSlice(
        block.tensor, block.where, "F32", block.shape, data, block.offset_bytes, block.total_bytes
    )


def _check_finite(block: TensorSlice, piece: TensorSlice) -> None:
    row = first_nonfinite_row(block)
    if row is None:
        return
    first = (block.offset_bytes - piece.offset_bytes) // piece.row_bytes
    raise FormatError("NaN or infinity among the weights", where=piece.where, got=f"row {first + row}")
