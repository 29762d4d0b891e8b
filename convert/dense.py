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
from krasis.convert.hashed_tables import in_dtype, table_dtype
from krasis.convert.plan import CHUNK_BYTES, Unit
from krasis.convert.quality import UnitQuality
from krasis.convert.slices import FLOAT_BYTES, TensorSlice, first_nonfinite_row
from krasis.convert.source_parts import SourcePart, stacked_dtype
from krasis.convert.sources import WeightSource
from krasis.convert.token_tables import expert_numbers
from krasis.convert.writer_thread import WriterThread
from krasis.formats.bundle.writer import BlobSink, BundleWriter
from krasis.formats.errors import FormatError
from krasis.formats.files.aligned import aligned_empty
from krasis.formats.layouts import STRIP_ROWS, Int8RowsLayout, padded_rows
from krasis.formats.layouts.matrix import MatrixView, bf16_to_float32
from krasis.formats.models.tensors import blob_name, dense_tensors_of, table_tensors
from krasis.formats.native import Pool


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
        digests: dict[str, str] = {}
        for tensor in dense_tensors_of(self.source.spec, unit.layer):
            name, parts = blob_name(tensor, unit.layer), self.source.dense(tensor, unit.layer)
            if tensor.store == "int8_rows":
                digests |= self._int8(name, tensor.name, parts, padded_rows(tensor.shape[0]), quality)
            elif tensor.store == "ids":
                digests |= self._ids(name, parts, unit)
            else:
                dtype = "F32" if tensor.store == "f32" else stacked_dtype(parts)
                digests |= self._plain(name, parts, dtype, looked_at=not tensor.is_bias)
        return digests, quality

    def pack_table(self, unit: Unit) -> tuple[dict[str, str], UnitQuality]:
        """Writes a layer's hashed table, block after block: rows that the source has, then zeros up to what
        the model says. The digest."""
        for layer, tensor in table_tensors(self.source.spec):
            if layer != unit.layer:
                continue
            parts = self.source.tables.parts(layer)
            dtype, name = table_dtype(parts), blob_name(tensor, layer)
            with self.writer.open_blob(name) as sink:
                for part in parts:
                    for raw in _row_blocks(part, 1):
                        self._read(raw)
                        block = in_dtype(raw, dtype)
                        _check_finite(block, part.piece)
                        self.thread.write(sink, block.raw)
                    self.source.release([part.piece])
                missing = tensor.shape[0] - sum(part.num_rows for part in parts)
                if missing:
                    row_bytes = tensor.shape[1] * FLOAT_BYTES[dtype]
                    self.thread.write(sink, np.zeros(missing * row_bytes, np.uint8))
                self.thread.flush()
                return {name: sink.close()}, UnitQuality(unit.layer)
        raise FormatError("the layer has no hashed table", where=unit.name)

    def _read(self, piece: TensorSlice) -> None:
        piece.touch()
        self.digests.add(self.source.kind, piece)
        self.advance(piece.raw.nbytes)

    def _plain(self, name: str, parts: list[SourcePart], dtype: str, *, looked_at: bool) -> dict[str, str]:
        """parts: stacked row-wise, in their own type or decoded to F32."""
        with self.writer.open_blob(name) as sink:
            for part in parts:
                for raw in _row_blocks(part, 1):
                    self._read(raw)
                    block = part.restored(raw)
                    if block.dtype != dtype:
                        block = _as_f32(block)
                    _check_finite(block, part.piece)
                    self.thread.write(sink, block.raw)
            for part in parts:
                if looked_at:
                    self.alarms.look_at(part.piece)
            self.thread.flush()
            return {name: sink.close()}

    def _ids(self, name: str, parts: list[SourcePart], unit: Unit) -> dict[str, str]:
        """A table of expert numbers."""
        if unit.layer is None:
            raise FormatError("the model itself has no experts", where=name)
        num_experts = self.source.spec.experts_of(unit.layer).count
        with self.writer.open_blob(name) as sink:
            for part in parts:
                for block in _row_blocks(part, 1):
                    self._read(block)
                    self.thread.write(sink, expert_numbers(block, num_experts))
            self.thread.flush()
            return {name: sink.close()}

    def _int8(
        self, name: str, kind: str, parts: list[SourcePart], rows: int, quality: UnitQuality
    ) -> dict[str, str]:
        """parts: stacked row-wise; zero rows fill the last one up to ``rows``."""
        scales = np.zeros(rows, np.float32)
        with ExitStack() as stack:
            sink = stack.enter_context(self.writer.open_blob(name))
            done = 0
            for matrix, where in self._matrices(parts):
                done += self._pack_matrix(sink, matrix, where, scales[done:], kind, quality)
            for part in parts:
                self.alarms.look_at(part.piece)
            self.thread.flush()
            digests = {name: sink.close()}
            scale_sink = stack.enter_context(self.writer.open_blob(f"{name}.scale"))
            scale_sink.write(scales.view(np.uint8))
            digests[f"{name}.scale"] = scale_sink.close()
        return digests

    def _matrices(self, parts: list[SourcePart]) -> Iterator[tuple[MatrixView, str]]:
        """The parts in blocks of whole strips, but for the last. Rows that a part has beyond its last strip
        begin the next part's first.
        """
        blocks = [(part, block) for part in parts for block in _row_blocks(part, STRIP_ROWS)]
        rest: MatrixView | None = None
        for number, (part, block) in enumerate(blocks, 1):
            self._read(block)
            matrix = part.restored(block).matrix()
            if rest is not None:
                matrix, rest = _joined(rest, matrix), None
            whole = matrix.n if number == len(blocks) else matrix.n - matrix.n % STRIP_ROWS
            if whole < matrix.n:
                rest = MatrixView(matrix.data[whole:].copy(), matrix.dtype)
            if whole:
                yield MatrixView(matrix.data[:whole], matrix.dtype), block.where

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


def _row_blocks(part: SourcePart, multiple: int) -> Iterator[TensorSlice]:
    """Blocks of at most CHUNK_BYTES of float32, each but the last a multiple of ``multiple`` rows."""
    columns = part.piece.shape[1] if len(part.piece.shape) > 1 else 1
    return part.blocks(CHUNK_BYTES // (4 * columns), multiple)


def _joined(first: MatrixView, second: MatrixView) -> MatrixView:
    """Two matrices as one, in float32 where their types differ (which loses nothing)."""
    if first.dtype == second.dtype:
        return MatrixView(np.concatenate([first.data, second.data]), first.dtype)
    return MatrixView(np.concatenate([_floats(first), _floats(second)]), "F32")


def _floats(matrix: MatrixView) -> npt.NDArray[np.float32]:
    if matrix.dtype == "BF16":
        return bf16_to_float32(matrix.data)
    return matrix.data.astype(np.float32)


def _as_f32(block: TensorSlice) -> TensorSlice:
    return block.plain(block.decode())


def _check_finite(block: TensorSlice, piece: TensorSlice) -> None:
    row = first_nonfinite_row(block)
    if row is None:
        return
    first = (block.offset_bytes - piece.offset_bytes) // piece.row_bytes
    raise FormatError("NaN or infinity among the weights", where=piece.where, got=f"row {first + row}")
