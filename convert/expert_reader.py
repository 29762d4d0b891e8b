"""Reads experts ahead of the packer: disk, source digests and dequantisation overlap with packing."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from krasis.convert.constant_runs import ConstantRun, constant_runs
from krasis.convert.digests import ContentDigests
from krasis.convert.slices import TensorSlice
from krasis.convert.sources import WeightSource
from krasis.formats.layouts import ExpertFormat
from krasis.formats.layouts.given_steps import STEP_K
from krasis.formats.layouts.matrix import MatrixView
from krasis.formats.process.machine_limits import usable_cpus

READ_AHEAD_EXPERTS = 3
# NumPy code holds the interpreter lock half of the time: more threads only need more memory.
MAX_DECODE_THREADS = 16
_ROWS_PER_TASK = 64
_BLOCK_BYTES = {"MXFP4": 17, "Q8_0": 34}


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert, ready to pack: its matrices with the slices they came from and the stretches of one
    weight in these."""

    views: tuple[MatrixView, ...]
    pieces: tuple[TensorSlice, ...]
    runs: tuple[list[ConstantRun], ...]

    @property
    def num_bytes(self) -> int:
        """Source bytes of the expert."""
        return sum(piece.raw.nbytes for piece in self.pieces)


class ExpertReader:
    """Yields a layer's experts in order, ``decode_slots`` of them dequantised ahead."""

    def __init__(self, digests: ContentDigests, num_threads: int, decode_slots: int) -> None:
        self._digests = digests
        self._decode_slots = decode_slots
        # One thread reads and hashes, so that digests see slices in file order.
        self._reader = ThreadPoolExecutor(1, "krasis-read")
        num_workers = num_threads or usable_cpus()
        self._decoders = ThreadPoolExecutor(min(num_workers, MAX_DECODE_THREADS), "krasis-decode")

    def __enter__(self) -> ExpertReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._decoders.shutdown(wait=True, cancel_futures=True)

    def experts(self, source: WeightSource, layer: int, layout: ExpertFormat) -> Iterator[ExpertWeights]:
        """All experts of a layer: matrices that the layout accepts as they lie, all others dequantised."""
        num_experts = source.spec.experts_of(layer).count
        ahead = max(1, min(READ_AHEAD_EXPERTS, num_experts))
        reads: deque[Future[_Read]] = deque()
        decodes: deque[_Decode] = deque()
        next_read = 0
        for _ in range(num_experts):
            while next_read < num_experts and len(reads) + len(decodes) < ahead + self._decode_slots:
                reads.append(self._reader.submit(self._read, source, layer, next_read))
                next_read += 1
            while reads and len(decodes) < max(1, self._decode_slots):
                decodes.append(_Decode(reads.popleft().result(), self._decoders, layout))
            yield decodes.popleft().result()

    def _read(self, source: WeightSource, layer: int, expert: int) -> _Read:
        pieces = [source.expert(layer, expert, part) for part in source.parts(layer)]
        for piece in pieces:
            piece.touch()
            self._digests.add(source.kind, piece)
        return _Read(pieces, tuple(constant_runs(piece) for piece in pieces))


@dataclass(frozen=True, slots=True)
class _Read:
    pieces: list[TensorSlice]
    runs: tuple[list[ConstantRun], ...]


class _Decode:
    """An expert on its way to MatrixViews; quantised parts are dequantised in row blocks on all threads."""

    def __init__(self, read: _Read, pool: ThreadPoolExecutor, layout: ExpertFormat) -> None:
        self._read = read
        self._futures: list[Future[None]] = []
        self._views = [self._start(piece, pool, layout) for piece in read.pieces]

    def _start(
        self, piece: TensorSlice, pool: ThreadPoolExecutor, layout: ExpertFormat
    ) -> Callable[[], MatrixView]:
        """Called when all is done, the result gives the matrix."""
        if layout.accepts(piece.dtype) == "as is":
            return piece.matrix if piece.is_float else functools.partial(piece.blocks, piece.dtype)
        for dtype, block_bytes in _BLOCK_BYTES.items():
            if layout.accepts(dtype) == "as is" and piece.keeps(dtype):
                return self._start_blocks(piece, pool, dtype, block_bytes)
        rows, columns = piece.shape
        out = np.empty((rows, columns), np.float32)
        steps = np.empty((rows, columns // STEP_K), np.float32)
        unknown: list[int] = []

        def decode(start: int) -> None:
            block = piece.rows(start, start + _ROWS_PER_TASK).matrix()
            out[start : start + block.n] = block.data
            if block.steps is None:
                unknown.append(start)
            else:
                steps[start : start + block.n] = block.steps

        self._submit(pool, decode, rows)
        return lambda: MatrixView(out, "F32", None if unknown else steps)

    def _start_blocks(
        self, piece: TensorSlice, pool: ThreadPoolExecutor, dtype: str, block_bytes: int
    ) -> Callable[[], MatrixView]:
        """Weights become blocks of a type that keeps them."""
        out = np.empty((piece.shape[0], piece.shape[1] // 32 * block_bytes), np.uint8)

        def fill(start: int) -> None:
            block = piece.rows(start, start + _ROWS_PER_TASK)
            out[start : start + block.shape[0]] = block.blocks(dtype).data

        self._submit(pool, fill, piece.shape[0])
        return lambda: MatrixView(out, dtype)

    def _submit(self, pool: ThreadPoolExecutor, work: Callable[[int], None], num_rows: int) -> None:
        self._futures.extend(pool.submit(work, start) for start in range(0, num_rows, _ROWS_PER_TASK))

    def result(self) -> ExpertWeights:
        for future in self._futures:
            future.result()
        views = tuple(view() for view in self._views)
        return ExpertWeights(views, tuple(self._read.pieces), self._read.runs)
