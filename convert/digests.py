"""Content digests of the sources, gathered while their tensors are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import xxhash

from krasis.convert.slices import TensorSlice


class ContentDigests:
    """xxh3-128 of every tensor read, per source kind. Slices of one tensor must first come in file order.

    A tensor read again, for another tier, is not hashed again.
    """

    def __init__(self) -> None:
        self._done: dict[str, str] = {}
        self._open: dict[str, tuple[xxhash.xxh3_128, int]] = {}

    def add(self, kind: str, piece: TensorSlice) -> None:
        """Hashes a slice unless these bytes were hashed before."""
        key = f"{kind}:{piece.tensor}"
        if key in self._done:
            return
        for name, raw in piece.companions():
            if (other := f"{kind}:{name}") not in self._done:
                self._done[other] = xxhash.xxh3_128(np.ascontiguousarray(raw).data).hexdigest()
        hasher, position = self._open.get(key, (None, 0))
        if piece.offset_bytes != position:
            return  # a second reading, while another tier's first one is unfinished
        if hasher is None:
            hasher = xxhash.xxh3_128()
        hasher.update(piece.raw.data)
        position += piece.raw.nbytes
        if position < piece.total_bytes:
            self._open[key] = (hasher, position)
            return
        self._open.pop(key, None)
        self._done[key] = hasher.hexdigest()

    def restore(self, tensors: Mapping[str, str]) -> None:
        """Takes over digests that a journal recorded."""
        self._done.update(tensors)

    def finished(self) -> Iterable[str]:
        """Keys of the tensors whose digests are complete."""
        return tuple(self._done)

    def take_new(self, known: Iterable[str]) -> dict[str, str]:
        """Finished digests whose keys are not in ``known``."""
        seen = set(known)
        return {key: digest for key, digest in self._done.items() if key not in seen}

    def combined(self, kind: str, tensors: Iterable[str]) -> str | None:
        """One digest of those of a source's ``tensors`` that were read, None if none was.

        xxh3-128 over ``name NUL digest LF`` in name order.
        """
        read = sorted(tensor for tensor in tensors if f"{kind}:{tensor}" in self._done)
        if not read:
            return None
        total = xxhash.xxh3_128()
        for tensor in read:
            total.update(f"{tensor}\0{self._done[f'{kind}:{tensor}']}\n".encode())
        return str(total.hexdigest())
