"""Writes saved prefixes; see ``kv_file``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import FormatError
from krasis.formats.files.atomic_file import AtomicFile
from krasis.formats.limits import PAGE_BYTES
from krasis.runtime.backend import Backend
from krasis.runtime.batch import StateRows
from krasis.runtime.state.prefix_parts import (
    DIGEST_PREFIX,
    FORMAT_NAME,
    FORMAT_VERSION,
    Group,
    bundle_identity,
    groups_of,
    keeps_index,
    keeps_windows,
)

_EMPTY_DIGEST = "0" * 32


class PrefixWriter:
    """Lays the file out before anything is written; digests join the header, of known size, at the end."""

    def __init__(
        self, path: Path, bundle: Bundle, backend: Backend, tokens: Sequence[int], conversation: bytes
    ) -> None:
        self._path, self._backend = path, backend
        self._num_tokens = len(tokens)
        self._groups = groups_of(
            bundle.spec,
            backend.kv_dtype,
            self._num_tokens,
            windows=keeps_windows(backend),
            index=keeps_index(backend),
        )
        self._texts = {
            "tokens": np.asarray(tokens, dtype="<i4").tobytes(),
            **({"conversation": conversation} if conversation else {}),
        }
        tensors: list[tuple[str, str, tuple[int, ...], int]] = [
            (name, group.dtype, dims := (len(group.layers), *shape), math.prod(dims) * group.numpy.itemsize)
            for group in self._groups
            for name, shape in zip(group.names, group.shapes, strict=True)
        ]
        tensors.append(("tokens", "I32", (self._num_tokens,), len(self._texts["tokens"])))
        if conversation:
            tensors.append(("conversation", "U8", (len(conversation),), len(conversation)))
        self._entries: dict[str, object] = {}
        self._begin: dict[str, int] = {}
        end = 0
        for name, kind, dims, num_bytes in tensors:
            self._begin[name] = end
            self._entries[name] = {"dtype": kind, "shape": list(dims), "data_offsets": [end, end + num_bytes]}
            end += num_bytes
        self._metadata = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "bundle": bundle_identity(bundle),
            "computed_by": backend.description,
        }
        self._header_bytes = len(self._header(dict.fromkeys(self._begin, _EMPTY_DIGEST)))
        self.num_bytes = self._header_bytes + end

    def _header(self, digests: dict[str, str]) -> bytes:
        marked = {DIGEST_PREFIX + name: digest for name, digest in digests.items()}
        from krasis.formats.bundle.shard_plan import encode_header  # 3 ms, which only a saved prefix needs

        return encode_header({"__metadata__": {**self._metadata, **marked}, **self._entries}, PAGE_BYTES)

    def write(self, file: AtomicFile) -> None:
        """Everything, the header last."""
        file.reserve(self.num_bytes)
        hashes = {name: xxhash.xxh3_128() for name in self._begin}
        for group in self._groups:
            for number, layer in enumerate(group.layers):
                pair = self._backend.state.export(0, layer, self._num_tokens)
                for name, rows, shape in zip(group.names, pair, group.shapes, strict=False):
                    if rows.shape != shape or rows.dtype != group.numpy:
                        raise self._other_state(rows, shape, group)
                    data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
                    hashes[name].update(data)
                    file.write(data, self._header_bytes + self._begin[name] + number * len(data))
        for name, text in self._texts.items():
            hashes[name].update(text)
            file.write(text, self._header_bytes + self._begin[name])
        file.write(self._header({name: str(one.hexdigest()) for name, one in hashes.items()}), 0)

    def _other_state(self, rows: StateRows, shape: tuple[int, ...], group: Group) -> FormatError:
        return FormatError(
            "the backend gave other keys and values than its cache has",
            where=str(self._path),
            got=f"{rows.dtype} {rows.shape}",
            limit=f"{group.numpy} {shape}",
        )
