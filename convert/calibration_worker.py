"""The worker that reads calibration files: HDF5 is a large C library, and a damaged file can make it raise
anything, crash, loop or grow. ``importance`` is its owner; what it answers is checked there."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np

from krasis.formats.process.worker_main import Handler
from krasis.formats.process.worker_protocol import pack_parts, unpack_parts

_open: list[h5py.File] = []


class _UnfitError(Exception):
    """What is wrong with a dataset: a sentence, and perhaps what was found and what is allowed."""


def _load(payload: bytes) -> bytes:
    head, _ = unpack_parts(payload)
    _open.append(h5py.File(head["path"], "r"))
    return b""


def _read(payload: bytes) -> bytes:
    """A dataset as float32, or why not."""
    head, _ = unpack_parts(payload)
    try:
        return pack_parts(None, _values(head["name"], tuple(head["shape"])))
    except _UnfitError as error:
        return pack_parts([str(part) for part in error.args])


def _values(name: str, shape: tuple[int, int]) -> bytes:
    group: Any = _open[0]
    for part in name.split("/"):
        # A link out of the file could read anything on this machine.
        if not isinstance(group, h5py.Group) or not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise _UnfitError("dataset is missing")
        group = group[part]
    if not isinstance(group, h5py.Dataset) or group.external or group.is_virtual or group.dtype.kind != "f":
        raise _UnfitError("not a plain dataset of floats")
    if group.shape != shape:
        raise _UnfitError("wrong shape: the file is of another model", group.shape, shape)
    return np.ascontiguousarray(group[()], dtype="<f4").tobytes()


HANDLERS: dict[str, Handler] = {"load": _load, "read": _read}
