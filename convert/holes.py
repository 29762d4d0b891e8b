"""Parts of a source that were never written: what a download that broke off leaves of a file that was given
its size at once. The file system knows them, so that they are found before any work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from krasis.convert.alarms import Alarms, PackedPart
from krasis.convert.constant_runs import LONG_BYTES, constant_runs
from krasis.convert.slices import TensorSlice
from krasis.convert.sources import WeightSource
from krasis.formats.layouts.matrix import PackStats


def file_holes(path: Path) -> Iterator[tuple[int, int]]:
    """(begin, end) of the stretches that take no place on the disk, in order; none where no system tells."""
    with path.open("rb") as file:
        size, position = os.fstat(file.fileno()).st_size, 0
        while position < size:
            try:
                begin = os.lseek(file.fileno(), position, os.SEEK_HOLE)
            except OSError:
                return
            if begin >= size:
                return
            try:
                position = os.lseek(file.fileno(), begin, os.SEEK_DATA)
            except OSError:  # no data from here on
                position = size
            yield begin, position


def look_into_holes(source: WeightSource, alarms: Alarms) -> None:
    """Reports the tensors that a hole of their file makes zero, as the conversion would on reaching them.

    Reads only tensors with a hole. A hole is no fault by itself: file systems that compress, and copies made
    thin, have them where a sound model is zero.
    """
    suspects = set(_tensors_in_holes(source))
    if not suspects:
        return
    for tensor, _, parts in source.all_dense():
        for part in parts:
            if part.piece.tensor in suspects and not tensor.is_bias:
                alarms.look_at(part.piece)
    for layer in source.spec.expert_layers:
        num_experts = source.spec.experts_of(layer).count
        for expert in range(num_experts):
            pieces = [source.expert(layer, expert, part) for part in source.parts(layer)]
            if not suspects.isdisjoint(piece.tensor for piece in pieces):
                alarms.look_at_expert(f"layer {layer} expert {expert}", [_unpacked(one) for one in pieces])
        alarms.end_layer(num_experts)


def _tensors_in_holes(source: WeightSource) -> Iterator[str]:
    for file in source.files:
        if file.version is not None:  # parts of it come when they are needed
            continue
        holes = list(file_holes(file.path))
        for tensor in file.tensors if holes else ():
            begin, end = source.place(tensor)
            shortest = min(LONG_BYTES, end - begin)
            if any(min(end, last) - max(begin, first) >= shortest for first, last in holes):
                yield tensor


def _unpacked(piece: TensorSlice) -> PackedPart:
    """What is known of a matrix before packing: whether it is zero as a whole."""
    runs = constant_runs(piece)
    count = piece.shape[0] * piece.shape[1]
    is_zero = any(run.is_zero and run.num_weights == count for run in runs)
    return PackedPart(piece, runs, PackStats(0.0, 0.0 if is_zero else 1.0, 0.0, count), 1.0, "")
