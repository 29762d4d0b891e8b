"""Weights by what they are, whatever kind of file holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from krasis.convert.names import (
    BY_OURS,
    GGUF_EXPERT,
    GGUF_FUSED_GATE_UP,
    GGUF_MERGED,
    HF_EXPERT,
    HF_FUSED_DOWN,
    HF_FUSED_GATE_UP,
    IGNORED_SUFFIXES,
    PARTS,
    DenseName,
    dense_keys,
    dense_shape,
    expert_shape,
)
from krasis.convert.slices import FLOAT_BYTES, Bytes, TensorSlice
from krasis.convert.vocabulary import check_vocabulary
from krasis.formats.architecture import Architecture
from krasis.formats.checkpoints.ggml_blocks import SUPPORTED_TYPES, tensor_bytes
from krasis.formats.checkpoints.quantised_checkpoint import type_hint
from krasis.formats.errors import FormatError, MismatchError, UnsupportedModelError
from krasis.formats.layouts.expert_record import Part

SourceKind = Literal["hf", "gguf"]
_COMPARED_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """dtype: ``BF16``, ``Q8_0``, ... shape: row-major, in elements. offset_bytes: in its file."""

    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int


class TensorTable(Protocol):
    """What both kinds of checkpoint offer, reduced to what the converter needs."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """All tensors by name."""

    def view(self, name: str) -> Bytes:
        """The tensor's bytes, mapped."""

    def where(self, name: str) -> str:
        """File and tensor, for messages."""

    def release(self, name: str) -> None:
        """The mapped pages are not needed for now."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source, for the record and for noticing changes.

    header_digest covers names, types, shapes, offsets.
    """

    path: Path
    name: str
    num_bytes: int
    mtime_ns: int
    header_digest: str
    tensors: tuple[str, ...]

    def check_unchanged(self) -> None:
        """Raises MismatchError if the file is not as it was when it was opened."""
        try:
            status = self.path.stat()
        except OSError as error:
            raise self._changed(error.strerror or str(error)) from error
        if status.st_size != self.num_bytes:
            raise self._changed(f"{status.st_size} bytes, were {self.num_bytes}")
        if status.st_mtime_ns != self.mtime_ns:
            raise self._changed("another time stamp")

    def _changed(self, got: str) -> MismatchError:
        return MismatchError(
            "this source file was changed while it was being converted",
            where=str(self.path),
            got=got,
            hint="let nothing write to it, then run the same command with --restart",
        )

    def fingerprint(self) -> dict[str, str | int]:
        """What a resume must find unchanged."""
        return {
            "name": self.name,
            "num_bytes": self.num_bytes,
            "mtime_ns": self.mtime_ns,
            "header_digest": self.header_digest,
        }


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """Where one part of one expert lies: a tensor, and the expert's first row in it."""

    tensor: str
    first_row: int


class WeightSource:
    """One input model.

    Construction checks that every tensor is there, of a usable type and the right shape.
    """

    def __init__(
        self,
        kind: SourceKind,
        path: Path,
        architecture: Architecture,
        table: TensorTable,
        files: tuple[SourceFile, ...],
    ) -> None:
        self.kind: SourceKind = kind
        self.path = path
        self.architecture = architecture
        self.files = files
        self._table = table
        self._infos = table.infos()
        self._expert_types: tuple[str, ...] | None = None
        self._check_complete()

    def dense(self, ours: str, layer: int | None = None) -> TensorSlice:
        """A whole dense tensor by our name (``attention.q``). A tied ``lm_head`` is the embedding."""
        if ours == "lm_head" and self.architecture.tie_word_embeddings:
            ours = "embedding"
        name = BY_OURS[ours]
        return self._slice(self._dense_tensor(name, layer), dense_shape(self.architecture, name), 0)

    def expert(self, layer: int, expert: int, part: Part) -> TensorSlice:
        """One matrix of one expert, ``[n, k]``."""
        place = self._expert_place(layer, expert, part)
        return self._slice(place.tensor, expert_shape(self.architecture, part), place.first_row)

    def place(self, tensor: str) -> tuple[int, int]:
        """(begin, end) of a tensor in its file, in bytes."""
        info = self._infos[tensor]
        return info.offset_bytes, info.offset_bytes + info.num_bytes

    def release(self, pieces: Iterable[TensorSlice]) -> None:
        """Unmaps the tensors of which these are the last slices; the page cache keeps what it likes.

        Without this, the page tables of half a terabyte of mappings would take a gigabyte.
        """
        for piece in pieces:
            if piece.offset_bytes + piece.raw.nbytes == piece.total_bytes:
                self._table.release(piece.tensor)

    def expert_types(self) -> tuple[str, ...]:
        """The types of all expert tensors, sorted."""
        if self._expert_types is None:
            experts = range(self.architecture.num_experts)
            tensors = {
                self._expert_place(layer, expert, part).tensor
                for layer in range(self.architecture.num_layers)
                for part in PARTS
                for expert in experts
            }
            self._expert_types = tuple(sorted({self._infos[tensor].dtype for tensor in tensors}))
        return self._expert_types

    def expert_bytes(self, layer: int) -> int:
        """Source bytes of one layer's experts."""
        return self.architecture.num_experts * sum(self.expert(layer, 0, part).raw.nbytes for part in PARTS)

    # ---- where things lie -------------------------------------------------------------------------------

    def _dense_tensor(self, name: DenseName, layer: int | None) -> str:
        template = name.hf if self.kind == "hf" else name.gguf
        if name.ours == "embedding" and self.architecture.tie_word_embeddings and template not in self._infos:
            template = BY_OURS["lm_head"].hf  # a tied checkpoint may hold the one matrix under either name
        return template if layer is None else template.format(i=layer)

    def _expert_place(self, layer: int, expert: int, part: Part) -> ExpertTensors:
        rows, _ = expert_shape(self.architecture, part)
        if self.kind == "gguf":
            merged = GGUF_MERGED.format(i=layer, part=part)
            if merged in self._infos:
                return ExpertTensors(merged, expert * rows)
            fused = GGUF_FUSED_GATE_UP.format(i=layer)
            if part != "down" and fused in self._infos:
                return ExpertTensors(fused, (2 * expert + (part == "up")) * rows)
            return ExpertTensors(GGUF_EXPERT.format(i=layer, part=part, e=expert), 0)
        fused = (HF_FUSED_DOWN if part == "down" else HF_FUSED_GATE_UP).format(i=layer)
        if fused not in self._infos:
            return ExpertTensors(HF_EXPERT.format(i=layer, e=expert, part=part), 0)
        if part == "down":
            return ExpertTensors(fused, expert * rows)
        return ExpertTensors(fused, (2 * expert + (part == "up")) * rows)

    def _slice(self, tensor: str, shape: tuple[int, ...], first_row: int) -> TensorSlice:
        dtype = self._infos[tensor].dtype
        per_row = tensor_bytes(dtype, shape[1:] or (1,))
        view = self._table.view(tensor)
        begin = first_row * per_row
        return TensorSlice(
            tensor=tensor,
            where=self._table.where(tensor),
            dtype=dtype,
            shape=shape,
            raw=view[begin : begin + shape[0] * per_row],
            offset_bytes=begin,
            total_bytes=view.nbytes,
        )

    # ---- checks -----------------------------------------------------------------------------------------

    def _check_complete(self) -> None:
        expected: set[str] = set()
        for name, layer in dense_keys(self.architecture):
            tensor = self._dense_tensor(name, layer)
            self._check_tensor(tensor, dense_shape(self.architecture, name))
            expected.add(tensor)
        for layer in range(self.architecture.num_layers):
            for part in PARTS:
                expected.update(self._check_experts(layer, part))
        self._check_no_others(expected)

    def _check_experts(self, layer: int, part: Part) -> set[str]:
        num_experts = self.architecture.num_experts
        rows, columns = expert_shape(self.architecture, part)
        first = self._expert_place(layer, 0, part).tensor
        last = self._expert_place(layer, num_experts - 1, part).tensor
        if first == last and num_experts > 1:
            fused = 2 if first in self._fused_gate_up(layer) else 1
            self._check_tensor(first, (num_experts, fused * rows, columns))
            return {first}
        tensors = [self._expert_place(layer, expert, part).tensor for expert in range(num_experts)]
        for tensor in tensors:
            self._check_tensor(tensor, (rows, columns))
        return set(tensors)

    def _fused_gate_up(self, layer: int) -> tuple[str, str]:
        """What a layer's gate and up of all experts are called where they are one tensor."""
        return HF_FUSED_GATE_UP.format(i=layer), GGUF_FUSED_GATE_UP.format(i=layer)

    def _check_tensor(self, tensor: str, shape: tuple[int, ...]) -> None:
        if tensor not in self._infos:
            raise FormatError(
                f"tensor '{tensor}' is missing",
                where=str(self.path),
                hint="the model is incomplete, or not of the architecture its header names",
            )
        where = self._table.where(tensor)
        found = self._infos[tensor].shape
        if found != shape and _without_ones(found) != _without_ones(shape):
            check_vocabulary(tensor, found, shape, where)
            raise FormatError("wrong shape", where=where, got=list(found), limit=list(shape))
        dtype = self._infos[tensor].dtype
        if self.kind == "hf" and dtype not in FLOAT_BYTES:
            raise FormatError(
                "unsupported weight type",
                where=where,
                got=dtype,
                limit=", ".join(FLOAT_BYTES),
                hint=type_hint(dtype),
            )
        if self.kind == "gguf" and dtype not in SUPPORTED_TYPES:
            raise FormatError(
                "unsupported GGUF type", where=where, got=dtype, limit=", ".join(SUPPORTED_TYPES)
            )
        if len(shape) == 1 and dtype not in FLOAT_BYTES:
            raise FormatError(
                "a vector must not be quantised", where=where, got=dtype, limit=", ".join(FLOAT_BYTES)
            )

    def _check_no_others(self, expected: set[str]) -> None:
        tied_head = BY_OURS["lm_head"]
        allowed = expected | {tied_head.hf, tied_head.gguf}
        others = sorted(
            name for name in self._infos if name not in allowed and not name.endswith(IGNORED_SUFFIXES)
        )
        if others:
            raise UnsupportedModelError(
                f"tensor '{others[0]}' is not part of a {self.architecture.model_type} model",
                where=str(self.path),
                got=f"{len(others)} such tensors",
                hint="it has a feature (a bias, shared experts, dense layers, ...) that would be dropped",
            )


def has_own_head(table: TensorTable) -> bool:
    """Whether a Hugging Face checkpoint holds an output head whose bytes are not the embedding's.

    Reads both until they differ, so equal ones in full: such checkpoints are rare.
    """
    infos = table.infos()
    head, embedding = BY_OURS["lm_head"].hf, BY_OURS["embedding"].hf
    if head not in infos or embedding not in infos:
        return False
    if (infos[head].dtype, infos[head].shape) != (infos[embedding].dtype, infos[embedding].shape):
        return True
    ours, theirs = table.view(head), table.view(embedding)
    return any(
        not np.array_equal(ours[begin : begin + _COMPARED_BYTES], theirs[begin : begin + _COMPARED_BYTES])
        for begin in range(0, ours.nbytes, _COMPARED_BYTES)
    )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def quantised_types(types: Iterable[str]) -> list[str]:
    """The types that lose precision against BF16 weights."""
    return [name for name in types if name not in FLOAT_BYTES]


def dense_types(source: WeightSource) -> list[str]:
    """The types of all dense tensors, sorted."""
    return sorted({source.dense(name.ours, layer).dtype for name, layer in dense_keys(source.architecture)})
