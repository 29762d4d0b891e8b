"""Finds codes that no packer writes: -128 among int8 codes, which are absmax / 127."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from krasis.formats.bundle.manifest import BlobRecord, Manifest
from krasis.formats.layouts import find_expert_format, layout_from_id
from krasis.formats.layouts.expert_format import Int8Tile
from krasis.formats.models.mlps import Experts

_LOWEST = 0x80  # -128


@dataclass(slots=True)
class CodeRange:
    """Looks for -128 in a blob's bytes as they are read in order.

    sections: (first byte, end, tile) of the record that repeats in the blob; None: all are codes.
    first: where the first was, in bytes of the blob; None: nowhere so far.
    """

    record_bytes: int
    sections: tuple[tuple[int, int, Int8Tile], ...] | None
    first: int | None = None
    _position: int = 0

    def add(self, chunk: bytes) -> None:
        """The next bytes of the blob."""
        begin, self._position = self._position, self._position + len(chunk)
        if self.first is not None:
            return
        if self.sections is None:
            at = chunk.find(_LOWEST)
            self.first = None if at < 0 else begin + at
            return
        places = np.flatnonzero(np.frombuffer(chunk, np.uint8) == _LOWEST) + begin
        within = places % self.record_bytes
        for start, end, tile in self.sections:
            inside = (within >= start) & (within < end)
            codes = inside & ((within - start) % tile.num_bytes < tile.num_bytes - tile.scales_bytes)
            if codes.any():
                at = int(places[codes][0])
                self.first = at if self.first is None else min(at, self.first)


def _experts(manifest: Manifest, blob: BlobRecord) -> Experts | None:
    """Those that a blob is of; None for a blob that the model does not have."""
    layers = manifest.spec.layers
    number = blob.name.split(".")[1] if blob.name.startswith("layers.") else ""
    if not number.isdecimal() or len(number) > 5 or int(number) >= len(layers):
        return None
    return layers[int(number)].experts


def code_range(manifest: Manifest, blob: BlobRecord) -> CodeRange | None:
    """What looks for -128 in a blob; None for one that holds no int8 codes, or those of a GGUF unchanged."""
    layout = layout_from_id(blob.layout)
    tile = None if layout is None else layout.int8_tile
    if tile is None:
        return None
    packed = find_expert_format(blob.layout)
    if packed is None:
        return CodeRange(blob.num_bytes, None)
    from_gguf = str(manifest.recipe.get("cpu_experts_from", "")).startswith("gguf")
    if from_gguf and packed.accepts("Q8_0") == "as is":
        return None
    experts = _experts(manifest, blob)
    if experts is None:
        return None
    width = experts.width(manifest.spec.hidden)
    record = packed.expert_record(width, experts.intermediate, experts.gated)
    if blob.shape != (experts.count, record.record_bytes):
        return None  # opening it for a run says what is wrong
    sections = tuple((one.offset_bytes, one.end_bytes, tile) for one in record.sections)
    return CodeRange(record.record_bytes, sections)
