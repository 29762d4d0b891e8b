"""Checkpoints whose experts are in MXFP4 as gpt-oss has them: each tensor of all experts is a pair of files'
tensors, ``X_blocks`` with the codes and ``X_scales``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from krasis.convert.slices import Bytes
from krasis.convert.sources import MXFP4, SourceFile, TensorInfo, TensorTable
from krasis.formats.errors import FormatError
from krasis.formats.layouts import mxfp4

_BLOCKS, _SCALES = "_blocks", "_scales"


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` says that the experts are such pairs."""
    value = config.get("quantization_config")
    return isinstance(value, Mapping) and value.get("quant_method") == "mxfp4"


class Mxfp4Table:
    """A TensorTable in which the pairs are tensors of MXFP4, [experts, n, k], read an expert at a time.

    Raises FormatError where codes and scales are not of one tensor.
    """

    def __init__(self, table: TensorTable) -> None:
        self._table = table
        self._infos: dict[str, TensorInfo] = {}
        known = table.infos()
        for name, info in known.items():
            root = name.removesuffix(_BLOCKS)
            if root != name:
                self._infos[root] = self._pair(name, f"{root}{_SCALES}", known)
            elif not name.endswith(_SCALES) or f"{name.removesuffix(_SCALES)}{_BLOCKS}" not in known:
                self._infos[name] = info

    def _pair(self, blocks: str, scales: str, known: Mapping[str, TensorInfo]) -> TensorInfo:
        held, where = known[blocks], self._table.where(blocks)
        root = blocks.removesuffix(_BLOCKS)
        if root in known:
            raise FormatError(f"'{root}' is there as codes and scales, and in another form too", where=where)
        if scales not in known:
            raise FormatError(
                f"tensor '{scales}' is missing", where=where, hint="the checkpoint is incomplete"
            )
        if held.dtype != "U8" or known[scales].dtype != "U8":
            raise FormatError(
                "MXFP4 codes and scales are bytes", where=where, got=f"{held.dtype}, {known[scales].dtype}"
            )
        shape = held.shape
        if len(shape) != 4 or shape[3] != mxfp4.BLOCK_K // 2 or known[scales].shape != shape[:3]:
            raise FormatError(
                "MXFP4 codes and scales do not fit",
                where=where,
                got=f"{list(shape)} and {list(known[scales].shape)}",
                limit="[experts, n, k/32, 16] and [experts, n, k/32]",
            )
        return replace(held, dtype=MXFP4, shape=(shape[0], shape[1], shape[2] * mxfp4.BLOCK_K))

    def infos(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, pairs by that of both. Of a pair place and size are the codes'."""
        return self._infos

    def place(self, name: str) -> tuple[int, int]:
        """(begin, end) in its file, of a pair of the codes."""
        return self._table.place(f"{name}{_BLOCKS}" if self._is_pair(name) else name)

    def view(self, name: str, begin: int = 0, end: int | None = None) -> Bytes:
        """The tensor's bytes, mapped, or those from begin to end; of a pair see ``expert``."""
        if self._is_pair(name):
            raise FormatError("a pair of tensors has no bytes of its own", where=name)
        return self._table.view(name, begin, end)

    def expert(self, name: str, number: int) -> Bytes | None:
        """Of a pair the blocks of one expert as GGML has them, uint8 [n, k/32 * 17]: a copy."""
        if not self._is_pair(name):
            return None
        _, rows, columns = self._infos[name].shape
        parts = []
        for suffix, width in ((_BLOCKS, mxfp4.BLOCK_K // 2), (_SCALES, 1)):
            num_bytes = rows * (columns // mxfp4.BLOCK_K) * width
            begin = number * num_bytes
            parts.append(self._table.view(f"{name}{suffix}", begin, begin + num_bytes))
        codes, scales = parts
        shape = (rows, columns // mxfp4.BLOCK_K)
        return mxfp4.blocks_of_pairs(codes.reshape(*shape, -1), scales.reshape(shape))

    def where(self, name: str) -> str:
        """File and tensor, for messages."""
        return self._table.where(f"{name}{_BLOCKS}" if self._is_pair(name) else name)

    def release(self, name: str) -> None:
        """The mapped pages are not needed for now."""
        for one in (f"{name}{_BLOCKS}", f"{name}{_SCALES}") if self._is_pair(name) else (name,):
            self._table.release(one)

    def files(self, files: tuple[SourceFile, ...]) -> tuple[SourceFile, ...]:
        """The files with the pairs' names, each in the file of its codes."""
        return tuple(replace(file, tensors=tuple(self._named(file.tensors))) for file in files)

    def _named(self, tensors: tuple[str, ...]) -> list[str]:
        roots = [name.removesuffix(_BLOCKS) for name in tensors]
        return [name for name in roots if name in self._infos]

    def _is_pair(self, name: str) -> bool:
        return self._infos[name].dtype == MXFP4
