"""Where a rank's GPU experts lie in a bundle's files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import FormatError, MismatchError, UsageError
from krasis.formats.files.regular_file import open_regular, read_range
from krasis.formats.layouts import expert_format
from krasis.formats.limits import PAGE_BYTES
from krasis.runtime.planning.shape import shape_of

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class LayerExperts:
    """A rank's experts of one layer: num_bytes from offset_bytes of a file. mapped: the same bytes, uint8
    [num_experts, record_bytes], read-only."""

    file: str
    offset_bytes: int
    num_bytes: int
    mapped: Bytes


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """A rank's experts of every layer. first_expert counts in the whole layer."""

    layers: tuple[LayerExperts, ...]
    record_bytes: int
    first_expert: int
    num_experts: int

    @property
    def layer_bytes(self) -> int:
        """The rank's bytes of one layer."""
        return self.num_experts * self.record_bytes

    @property
    def num_bytes(self) -> int:
        """The rank's bytes of all layers."""
        return len(self.layers) * self.layer_bytes

    def check_group(self, layer: int, first: int, count: int) -> None:
        """Raises UsageError for a group that is not wholly the rank's."""
        end = self.first_expert + self.num_experts
        if not 0 <= layer < len(self.layers) or count < 1 or not self.first_expert <= first <= end - count:
            raise UsageError(
                "no such group of experts in this store",
                where="host memory",
                got=f"layer {layer}, experts [{first}, {first + count})",
                limit=f"{len(self.layers)} layers, experts [{self.first_expert}, {end})",
            )


def find_experts(bundle: Bundle, first_expert: int = 0, num_experts: int | None = None) -> Experts:
    """The GPU experts [first_expert, first_expert + num_experts) of every layer that has experts; None: up to
    the last.

    Raises MismatchError if the bundle has no GPU tier, FormatError where manifest and architecture disagree,
    UsageError for experts that the model does not have.
    """
    where = str(bundle.path)
    layout_id = bundle.manifest.layouts.get("gpu")
    if layout_id is None:
        raise MismatchError("the bundle has no gpu experts", where=where, hint="convert it with a GPU tier")
    layout = expert_format(layout_id, "gpu", where)
    shape = shape_of(bundle.spec)
    count = shape.num_experts - first_expert if num_experts is None else num_experts
    if first_expert < 0 or count < 1 or first_expert + count > shape.num_experts:
        raise UsageError(
            "no such experts",
            where=where,
            got=f"[{first_expert}, {first_expert + count})",
            limit=f"{shape.num_experts} experts a layer",
        )
    record_bytes = layout.expert_record(
        shape.expert_width, shape.expert_intermediate_size, shape.gated_experts
    ).record_bytes
    blob_shape = (shape.num_experts, record_bytes)
    layers = tuple(
        _layer(bundle, f"layers.{number}.experts.gpu", blob_shape, layout_id, first_expert, count)
        for number in shape.expert_layers
    )
    return Experts(layers, record_bytes, first_expert, count)


def _layer(
    bundle: Bundle, name: str, shape: tuple[int, int], layout_id: str, first: int, count: int
) -> LayerExperts:
    blob = bundle.blob(name)
    found, wanted = (blob.dtype, blob.shape, blob.layout), ("U8", shape, layout_id)
    # Pages are what is pinned and what direct reads move.
    if found != wanted or shape[1] % PAGE_BYTES:
        where = f"{bundle.path}: {name}"
        raise FormatError("the blob is not what the architecture needs", where=where, got=found, limit=wanted)
    mapped = bundle.map(name)[first : first + count].view(np.uint8)
    return LayerExperts(blob.file, blob.offset_bytes + first * shape[1], count * shape[1], mapped)


def open_shard(bundle: Bundle, name: str) -> int:
    """A descriptor of a shard of its own. Raises FormatError if another file lies there now."""
    record = next(file for file in bundle.manifest.files if file.name == name)
    path = Path(bundle.path) / name
    fd = open_regular(path, follow_links=False)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # the header alone: experts may be read directly
        header = read_range(fd, 0, record.header_bytes, str(path))
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)
        if xxhash.xxh3_128_hexdigest(header) != record.header_xxh3_128:
            raise FormatError(
                "the bundle was exchanged while it was open", where=str(path), hint="start again"
            )
    except BaseException:
        os.close(fd)
        raise
    return fd
