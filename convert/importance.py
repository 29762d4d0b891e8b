"""Importance weights from a calibration file: which input features of each expert matter most.

An HDF5 file that our runtime collected: ``layers/{i}/hidden`` float [experts, hidden_size] holds E[x^2] of
the inputs of gate and up, ``layers/{i}/intermediate`` float [experts, expert_intermediate_size] those of
down.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import xxhash

from krasis.formats.architecture import Architecture
from krasis.formats.errors import FormatError
from krasis.formats.layouts.expert_record import ExpertImportance
from krasis.formats.regular_file import open_regular

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Loaded weights.

    layers: ``(hidden [experts, hidden], intermediate [experts, intermediate])`` by layer.
    """

    layers: Mapping[int, tuple[Floats, Floats]]
    digest: str

    def expert(self, layer: int, expert: int) -> ExpertImportance | None:
        """One expert's weights; None for an expert that the calibration text never reached."""
        hidden, intermediate = (rows[expert] for rows in self.layers[layer])
        if not hidden.any() or not intermediate.any():
            return None
        return ExpertImportance(hidden, intermediate)


def load_calibration(path: Path, architecture: Architecture) -> Calibration:
    """Reads and checks the whole file (a few MB a layer). Raises FormatError."""
    os.close(open_regular(path, follow_links=True))  # HDF5 would wait at a FIFO for ever
    try:
        with h5py.File(path, "r") as file:
            layers = {i: _layer(file, i, architecture, str(path)) for i in range(architecture.num_layers)}
    except OSError as error:
        raise FormatError("not a readable HDF5 file", where=str(path), got=error) from error
    digest = xxhash.xxh3_128()
    for hidden, intermediate in layers.values():
        digest.update(hidden.tobytes())
        digest.update(intermediate.tobytes())
    return Calibration(layers, digest.hexdigest())


def _layer(file: h5py.File, layer: int, arch: Architecture, path: str) -> tuple[Floats, Floats]:
    experts = arch.num_experts
    return (
        _array(file, f"layers/{layer}/hidden", (experts, arch.hidden_size), path),
        _array(file, f"layers/{layer}/intermediate", (experts, arch.expert_intermediate_size), path),
    )


def _array(file: h5py.File, name: str, shape: tuple[int, int], path: str) -> Floats:
    where = f"{path}: {name}"
    group: Any = file
    for part in name.split("/"):
        # A link out of the file could read anything on this machine.
        if not isinstance(group, h5py.Group) or not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise FormatError(
                "dataset is missing", where=where, hint="is it a calibration file of this model?"
            )
        group = group[part]
    if not isinstance(group, h5py.Dataset) or group.external or group.is_virtual or group.dtype.kind != "f":
        raise FormatError("not a plain dataset of floats", where=where)
    if group.shape != shape:
        raise FormatError(
            "wrong shape: the file is of another model", where=where, got=group.shape, limit=shape
        )
    values: Floats = group[()].astype(np.float32)
    if not np.isfinite(values).all() or (values < 0).any():
        raise FormatError("importance must be finite and not negative", where=where)
    return values
