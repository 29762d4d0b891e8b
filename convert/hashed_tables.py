"""Hashed n-gram tables in a checkpoint: whole or in shards, and the numbers of the hashes beside them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from krasis.convert.slices import FLOAT_BYTES, TensorSlice
from krasis.convert.source_names import SourceNames
from krasis.convert.source_parts import SourcePart
from krasis.formats.errors import FormatError, UnsupportedModelError
from krasis.formats.models.ngram import TableHash, table_hash
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.tensors import TABLE, table_tensors

if TYPE_CHECKING:
    from krasis.convert.sources import TensorTable

_DECODED = "BF16"  # of 8 bits with scales a number has less than these
_HASHES = {"multipliers": "layer_multipliers", "moduli": "ngram_heads_vocab_sizes"}
_HASHES |= {"offsets": "ngram_heads_offsets"}


class HashedTables:
    """The tables of one checkpoint. take: a tensor of that name and shape, from its first row on."""

    def __init__(
        self,
        spec: ModelSpec,
        names: SourceNames,
        table: TensorTable,
        take: Callable[[str, tuple[int, ...], int], TensorSlice],
    ) -> None:
        self._spec, self._names, self._table, self._take = spec, names, table, take
        self._infos = table.infos()

    def tensors(self, layer: int) -> list[str]:
        """The names of what a layer's table is made of, in the order of its rows."""
        whole = self._names.tensor(TABLE, layer)
        if whole in self._infos:
            return [whole]
        stems = [name.removesuffix(".weight") for name in self._names.all_of(TABLE, layer)]
        shards = (
            itertools.takewhile(
                self._infos.__contains__, (f"{stem}.shard_{i}.weight" for i in itertools.count())
            )
            for stem in stems
        )
        return list(itertools.chain.from_iterable(shards)) or [whole]

    def parts(self, layer: int) -> list[SourcePart]:
        """The same as parts that are stacked."""
        names = self.tensors(layer)
        return [SourcePart(self._take(name, self._infos[name].shape, 0)) for name in names]

    def check(self, check_tensor: Callable[[str, tuple[int, ...], str], None]) -> set[str]:
        """The names of all that belongs to tables. check_tensor: raises for one that is missing, or not of
        that shape. Raises FormatError for tables of other sizes, UnsupportedModelError for other hashes.
        """
        expected: set[str] = set()
        for number, (layer, tensor) in enumerate(table_tensors(self._spec)):
            names, hashes = self.tensors(layer), table_hash(self._spec, number)
            rows = 0
            for name in names:
                own = self._infos[name].shape[0] if name in self._infos and self._infos[name].shape else 1
                check_tensor(name, (own, tensor.shape[1]), TABLE)
                rows += own
            least = int(hashes.moduli.sum())
            if not least <= rows <= tensor.shape[0]:
                where, limit = self._table.where(names[0]), f"{least}..{tensor.shape[0]} together"
                raise FormatError("wrong number of rows", where=where, got=rows, limit=limit)
            expected |= {*names, *self._check_hashes(layer, hashes)}
        return expected

    def _check_hashes(self, layer: int, hashes: TableHash) -> Iterator[str]:
        """Multipliers, moduli and offsets are the configuration's where the checkpoint has them."""
        roots = {name.removesuffix("ngram_embedding.weight") for name in self._names.all_of(TABLE, layer)}
        for ours, theirs in _HASHES.items():
            for name in sorted(f"{root}{theirs}" for root in roots):
                if name not in self._infos:
                    continue
                values = getattr(hashes, ours)
                found = np.ascontiguousarray(self._table.view(name)).tobytes()
                if self._infos[name].dtype != "I64" or found != values.astype("<i8").tobytes():
                    raise UnsupportedModelError(
                        "the hashes of n-grams are not those that the configuration says",
                        where=self._table.where(name),
                        hint="seed, ngram_vocab_size_base, ple_layer_ids or vocab_size are of another model",
                    )
                yield name


def table_dtype(parts: Sequence[SourcePart]) -> str:
    """The type of a table in a bundle: its own, BF16 where it is in 8 bits or in several."""
    dtypes = {part.piece.dtype for part in parts}
    own = dtypes.pop() if len(dtypes) == 1 else _DECODED
    return own if own in FLOAT_BYTES else _DECODED


def in_dtype(block: TensorSlice, dtype: str) -> TensorSlice:
    """A block of rows in a table's type, rounded to the nearest even."""
    if block.dtype == dtype:
        return block
    bits = np.ascontiguousarray(block.decode(), np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorSlice(
        tensor=block.tensor,
        where=block.where,
        dtype=_DECODED,
        shape=block.shape,
        raw=rounded.reshape(-1).view(np.uint8),
        offset_bytes=block.offset_bytes,
        total_bytes=block.total_bytes,
    )
