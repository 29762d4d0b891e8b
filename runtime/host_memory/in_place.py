"""No copy at all: the pages that the bundle's files have in memory are pinned where they are.

What platforms allow differs. Many drivers pin a mapping that may only be read if they are told so; others
want it writable, which a file in RAM (tmpfs, hugetlbfs) can be; a disk's file is never mapped for writing
here.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import KrasisError
from krasis.formats.files.file_mapping import prefault
from krasis.runtime.host.filesystem import IN_RAM
from krasis.runtime.host_memory.experts import Experts, open_shard
from krasis.runtime.host_memory.memory import anonymous, tensor_of, writable_file
from krasis.runtime.host_memory.registrar import Registrar
from krasis.runtime.host_memory.shards import Shards

Bytes = npt.NDArray[np.uint8]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """A way to the files' pages. layers: uint8 [num_experts, record_bytes] each."""

    layers: tuple[Bytes, ...]
    read_only: bool
    description: str


def find_pages(
    bundle: Bundle, experts: Experts, shards: Shards, registrar: Registrar
) -> tuple[Pages | None, str]:
    """The first way whose first expert can be registered, and why the others cannot (or, found at once,
    empty).
    """
    refusals = []
    mapped = tuple(layer.mapped for layer in experts.layers)
    pages = Pages(mapped, True, "the bundle's own mapping, registered for reading only")
    refusal = _try(pages, registrar)
    if refusal is None:
        return pages, ""
    refusals.append(f"{pages.description}: {refusal}")
    if set(shards.filesystems) <= IN_RAM:
        try:
            pages = Pages(_map_for_writing(bundle, experts), False, "a writable mapping of the files in RAM")
        except KrasisError as error:
            return None, "; ".join([*refusals, str(error)])
        refusal = _try(pages, registrar)
        if refusal is None:
            return pages, "; ".join(refusals)
        refusals.append(f"{pages.description}: {refusal}")
    return None, "; ".join(refusals)


def _try(pages: Pages, registrar: Registrar) -> str | None:
    """Registers one expert, for a moment. None, or the words of the refusal."""
    return try_register(pages.layers[0][:1], registrar, read_only=pages.read_only)


def try_register(rows: Bytes, registrar: Registrar, *, read_only: bool) -> str | None:
    """Whether such memory can be registered: None, or the words of the refusal."""
    memory = tensor_of(rows).view(-1)
    try:
        registrar.register(memory, read_only=read_only)
        registrar.unregister(memory)
    except KrasisError as error:
        return str(error)
    return None


def _map_for_writing(bundle: Bundle, experts: Experts) -> tuple[Bytes, ...]:
    sizes = {file.name: file.num_bytes for file in bundle.manifest.files}
    files: dict[str, Bytes] = {}
    layers = []
    for layer in experts.layers:
        if layer.file not in files:
            files[layer.file] = _map_file(bundle, layer.file, sizes[layer.file])
        flat = files[layer.file][layer.offset_bytes : layer.offset_bytes + layer.num_bytes]
        layers.append(flat.reshape(experts.num_experts, experts.record_bytes))
    return tuple(layers)


def _map_file(bundle: Bundle, name: str, num_bytes: int) -> Bytes:
    fd = open_shard(bundle, name)
    try:
        return writable_file(fd, num_bytes, str(Path(bundle.path) / name))
    finally:
        os.close(fd)


class InPlaceSource:
    """See ``pinned_store.Source``. spare_bytes: how much may be copied where a registration is refused after
    all.
    """

    direct_bytes = cached_bytes = 0
    in_place_bytes: int

    def __init__(self, experts: Experts, shards: Shards, pages: Pages, spare_bytes: int) -> None:
        self.read_only = pages.read_only
        self.in_place_bytes = 0
        self._experts, self._shards, self._pages = experts, shards, pages
        self._spare_bytes = spare_bytes
        self._lock = Lock()

    def memory(self, layer: int) -> Bytes:
        """See ``pinned_store.Source``."""
        return self._pages.layers[layer]

    def fill(self, layer: int, begin: int, end: int) -> None:
        """Brings the pages into memory, so that registering them does not read the file page by page."""
        offset = self._experts.layers[layer].offset_bytes + begin
        reader = self._shards.reader(layer)
        reader.check_size(offset + end - begin)
        reader.prefetch(offset, end - begin)
        prefault(int(self.memory(layer).ctypes.data) + begin, end - begin)
        with self._lock:
            self.in_place_bytes += end - begin

    def replacement(self, layer: int, first: int, count: int) -> Bytes | None:
        """See ``pinned_store.Source``."""
        rows = self.memory(layer)[first : first + count]
        with self._lock:
            if rows.nbytes > self._spare_bytes:
                return None
            self._spare_bytes -= rows.nbytes
            self.in_place_bytes -= rows.nbytes
        copy = anonymous(rows.nbytes, where="copy of experts").reshape(rows.shape)
        np.copyto(copy, rows)
        return copy

    def close(self) -> None:
        """See ``pinned_store.Source``."""
        self._pages = Pages((), self.read_only, "closed")
        self._shards.close()
