"""Importance weights from a calibration file: which input features of each expert matter most.

An HDF5 file that our runtime collected: ``layers/{i}/hidden`` float [experts, hidden_size] holds E[x^2] of
the inputs of gate and up, ``layers/{i}/intermediate`` float [experts, expert_intermediate_size] those of
down.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from krasis.formats.errors import FormatError
from krasis.formats.files.regular_file import open_regular
from krasis.formats.layouts.expert_record import ExpertImportance
from krasis.formats.models.spec import ModelSpec
from krasis.formats.process.worker_process import WorkerLost, WorkerProcess, WorkerRefusal
from krasis.formats.process.worker_protocol import MAX_REFUSAL_BYTES, pack_parts, unpack_parts

Floats = npt.NDArray[np.float32]
# What reading may take: seconds of CPU and memory for opening, and more for every byte wanted (10 MB/s).
_SECONDS, _SECONDS_PER_BYTE, _MEMORY_BYTES = 2.0, 1e-7, 256 << 20


@dataclass(frozen=True, slots=True)
class Calibration:
    """Loaded weights.

    layers: ``(hidden [experts, hidden], intermediate [experts, intermediate])`` by layer.
    """

    layers: Mapping[int, tuple[Floats, Floats]]
    digest: str

    def expert(self, layer: int, expert: int) -> ExpertImportance | None:
        """One expert's weights; None for an expert that the calibration text never reached, and for those of
        a layer that drafts, which no text passes.
        """
        if layer not in self.layers:
            return None
        hidden, intermediate = (rows[expert] for rows in self.layers[layer])
        if not hidden.any() or not intermediate.any():
            return None
        return ExpertImportance(hidden, intermediate)


def load_calibration(path: Path, spec: ModelSpec) -> Calibration:
    """Reads and checks the whole file (a few MB a layer), in a worker: HDF5 does not survive every damaged
    file. Raises FormatError, and ResourceError if the system refuses."""
    os.close(open_regular(path, follow_links=True))
    file = _CalibrationFile(path)
    try:
        layers = {
            layer: (
                file.array(f"layers/{layer}/hidden", (experts.count, spec.hidden)),
                file.array(f"layers/{layer}/intermediate", (experts.count, experts.intermediate)),
            )
            for layer in spec.main.expert_layers
            for experts in (spec.experts_of(layer),)
        }
    finally:
        file.close()
    digest = xxhash.xxh3_128()
    for hidden, intermediate in layers.values():
        digest.update(hidden.tobytes())
        digest.update(intermediate.tobytes())
    return Calibration(layers, digest.hexdigest())


class _CalibrationFile:
    """The file, open in a worker."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._worker = WorkerProcess("krasis.convert.calibration_worker")
        try:
            self._ask("load", {"path": str(path.absolute())}, str(path), 0)
        except BaseException:
            self.close()
            raise

    def array(self, name: str, shape: tuple[int, int]) -> Floats:
        """A dataset. FormatError if it is missing, of another shape, or no weights."""
        where = f"{self._path}: {name}"
        num_bytes = 4 * math.prod(shape)
        answer = self._ask("read", {"name": name, "shape": shape}, where, num_bytes)
        try:
            problem, pieces = unpack_parts(answer)
            if problem is not None:
                what, got, limit = (*problem, None, None)[:3]
                raise FormatError(
                    what, where=where, got=got, limit=limit, hint="is it a calibration file of this model?"
                )
            values: Floats = np.frombuffer(pieces[0], "<f4").reshape(shape)
        except (ValueError, TypeError, IndexError) as error:
            raise FormatError("not a readable HDF5 file", where=where, got=error) from error
        if not np.isfinite(values).all() or (values < 0).any():
            raise FormatError("importance must be finite and not negative", where=where)
        return values

    def close(self) -> None:
        """Ends the worker."""
        self._worker.close()

    def _ask(self, operation: str, head: Mapping[str, Any], where: str, num_bytes: int) -> bytes:
        try:
            return self._worker.call(
                operation,
                pack_parts(head),
                cpu_s=_SECONDS + num_bytes * _SECONDS_PER_BYTE,
                memory_bytes=_MEMORY_BYTES + 4 * num_bytes,
                max_answer_bytes=num_bytes + MAX_REFUSAL_BYTES,
            )
        except (WorkerRefusal, WorkerLost) as error:
            raise FormatError("not a readable HDF5 file", where=where, got=error) from error
