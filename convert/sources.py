"""Weights by what they are, whatever kind of file holds them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

from krasis.convert.fused_experts import interleaved, made, transposed
from krasis.convert.hashed_tables import HashedTables
from krasis.convert.latent_parts import LatentPart, held_shape
from krasis.convert.quantised_slice import quantised_slice
from krasis.convert.slices import Bytes, TensorSlice
from krasis.convert.source_names import SourceNames
from krasis.convert.source_parts import COLUMNS, SourcePart
from krasis.convert.tensor_types import check_type
from krasis.convert.token_tables import TABLE, check_ids_type
from krasis.convert.vocabulary import check_vocabulary
from krasis.formats.checkpoints.ggml_blocks import tensor_bytes
from krasis.formats.checkpoints.quantised.weight import QuantisedWeight
from krasis.formats.errors import FormatError, MismatchError, UnsupportedModelError
from krasis.formats.layouts.expert_record import Part, parts_of
from krasis.formats.models.family import Family, Transform
from krasis.formats.models.latent_names import TOGETHER
from krasis.formats.models.mixers import Attention, LatentAttention
from krasis.formats.models.picks import Pick
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.tensors import Tensor, dense_tensors, dense_tensors_of

SourceKind = Literal["hf", "gguf"]
MXFP4 = "MXFP4"  # that a checkpoint may hold experts in


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """dtype: ``BF16``, ``Q8_0``, ...; ``fp8``, ``int4``, ... of a weight that is quantised, whose ``codes``
    the bytes are. shape: row-major, in elements. offset_bytes: in its file.
    """

    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int
    quantised: QuantisedWeight | None = None


class TensorTable(Protocol):
    """What both kinds of checkpoint offer, reduced to what the converter needs."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, quantised weights by the names of plain ones."""

    def place(self, name: str) -> tuple[int, int]:
        """(begin, end) of a tensor of the file in it, in bytes."""

    def view(self, name: str, begin: int = 0, end: int | None = None) -> Bytes:
        """The tensor's bytes, mapped; or those from begin to end."""

    def expert(self, name: str, number: int) -> Bytes | None:
        """The bytes of one expert of a tensor of all experts where they are made out of what the files hold;
        None where ``view`` has them.
        """

    def where(self, name: str) -> str:
        """File and tensor, for messages."""

    def release(self, name: str) -> None:
        """The mapped pages are not needed for now."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source, for the record and for noticing changes.

    header_digest covers names, types, shapes, offsets. version: of a file on the hub, of which only parts are
    here, so that its time stamp says nothing; None for others.
    """

    path: Path
    name: str
    num_bytes: int
    mtime_ns: int
    header_digest: str
    tensors: tuple[str, ...]
    version: str | None = None

    def check_unchanged(self) -> None:
        """Raises MismatchError if the file is not as it was when it was opened."""
        try:
            status = self.path.stat()
        except OSError as error:
            raise self._changed(error.strerror or str(error)) from error
        if status.st_size != self.num_bytes:
            raise self._changed(f"{status.st_size} bytes, were {self.num_bytes}")
        if self.version is None and status.st_mtime_ns != self.mtime_ns:
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
            **({"mtime_ns": self.mtime_ns} if self.version is None else {"version": self.version}),
            "header_digest": self.header_digest,
        }


class WeightSource:
    """One input model.

    Construction checks that every tensor is there, of a usable type and the right shape, and that no other
    tensor is. left_out: how many tensors are of what the language model does without, e.g. drafting layers.
    """

    def __init__(
        self,
        kind: SourceKind,
        path: Path,
        spec: ModelSpec,
        family: Family,
        table: TensorTable,
        files: tuple[SourceFile, ...],
    ) -> None:
        self.kind: SourceKind = kind
        self.path = path
        self.spec = spec
        self.files = files
        self._table = table
        self._infos = table.infos()
        self._names = SourceNames(kind, family, spec, self._infos)
        self._transposed = self._names.may_be_transposed and self._experts_are_transposed()
        self.tables = HashedTables(spec, self._names, table, self._slice)
        self.left_out: Counter[str] = Counter()
        self._check_complete()

    def dense(self, tensor: Tensor, layer: int | None = None) -> list[SourcePart]:
        """What a dense tensor of the bundle is stacked from, in order. A tied ``lm_head`` is the
        embedding.
        """
        return [self._part(ours, shape, layer) for ours, shape in tensor.sources()]

    def _part(self, ours: str, shape: tuple[int, ...], layer: int | None) -> SourcePart:
        name, transform = self._names.tensor(ours, layer), self._transform(ours)
        if (mixer := self._latent(transform, layer)) is not None and TOGETHER in name:
            piece = self._slice(name, held_shape(mixer, transform, together=True), 0)
            return LatentPart(piece, transform, mixer.nope_dim + mixer.value_dim, nope_dim=mixer.nope_dim)
        pick = self._pick(ours, layer)
        piece = self._slice(name, self._held_shape(ours, shape, pick), 0)
        if transform != "undo_rope_permutation":
            return SourcePart(piece, "none" if mixer is not None else transform, pick=pick)
        heads = None if layer is None else self.spec.layers[layer].mixer
        if not isinstance(heads, Attention):
            raise FormatError("only rows of attention heads can be in another order", where=piece.where)
        return SourcePart(piece, transform, heads.head_dim)

    def _latent(self, transform: Transform, layer: int | None) -> LatentAttention | None:
        """The mixer whose keys or values of latents a tensor holds, None for other tensors."""
        mixer = None if layer is None else self.spec.layers[layer].mixer
        of_latents = transform in ("latent_keys", "latent_values")
        return mixer if of_latents and isinstance(mixer, LatentAttention) else None

    def _pick(self, ours: str, layer: int | None) -> Pick | None:
        """Which rows or columns of the source's tensor are the model's."""
        source = self._names.source(ours)
        of = source.pick if self.kind == "hf" else source.gguf_pick
        # Attention without gates has the same names, and whole projections of q.
        mixer = None if layer is None else self.spec.layers[layer].mixer
        if of is None or (isinstance(mixer, Attention) and mixer.output_gate == "none"):
            return None
        return of(mixer)

    def _transform(self, ours: str) -> Transform:
        source = self._names.source(ours)
        return source.transform if self.kind == "hf" else source.gguf_transform

    def _held_shape(self, ours: str, shape: tuple[int, ...], pick: Pick | None) -> tuple[int, ...]:
        """The shape of the source's tensor, from that of what is made of it."""
        if self._transform(ours) in COLUMNS:
            return (*shape[:-1], 2 * shape[-1])
        return shape if pick is None or pick.axis else (pick.of, *shape[1:])

    def all_dense(self) -> Iterable[tuple[Tensor, int | None, list[SourcePart]]]:
        """Every dense tensor of the bundle with its layer and sources; of a tied head nothing."""
        for layer, tensor in dense_tensors(self.spec):
            if not self._is_tied_head(tensor.name):
                yield tensor, layer, self.dense(tensor, layer)

    def expert(self, layer: int, expert: int, part: Part) -> TensorSlice:
        """One matrix of one expert, ``[n, k]``."""
        rows, columns = self._expert_shape(layer, part)
        place = self._names.expert(layer, expert, part)
        if place.holds_all:
            held = self._table.expert(place.tensor, place.first_matrix // place.matrices)
            if held is not None:
                info, where = self._infos[place.tensor], self._table.where(place.tensor)
                return made(held, info.dtype, info.shape[0], where, place, (rows, columns))
        if self._transposed and place.holds_all:
            return transposed(self._slice, place, rows, columns)
        if place.interleaved:
            return interleaved(self._slice, place, rows, columns)
        return self._slice(place.tensor, (rows, columns), place.first_matrix * rows)

    def tensors_of(self, layer: int | None, *, experts: bool, tables: bool = False) -> set[str]:
        """The names of what the experts of a layer are made of, its hashed table, or the rest of it (None:
        of the model)."""
        if tables and layer is not None:
            names = set(self.tables.tensors(layer))
        elif experts and layer is not None:
            count, parts = self.spec.experts_of(layer).count, self.parts(layer)
            places = (self._names.expert(layer, one, part) for part in parts for one in range(count))
            names = {place.tensor for place in places}
        else:
            tensors = dense_tensors_of(self.spec, layer)
            names = {self._names.tensor(ours, layer) for one in tensors for ours, _ in one.sources()}
        return {held for name in names for held in self._held(name)}

    def _held(self, name: str) -> Iterable[str]:
        """The tensors of the files that a weight is made of."""
        weight = self._infos[name].quantised
        if self.kind == "hf" and self._infos[name].dtype == MXFP4:
            return (f"{name}_blocks", f"{name}_scales")
        return (name,) if weight is None else (weight.codes.name, *(part.name for part in weight.others))

    def place(self, tensor: str) -> tuple[int, int]:
        """(begin, end) of a tensor in its file, in bytes."""
        return self._table.place(tensor)

    def release(self, pieces: Iterable[TensorSlice]) -> None:
        """Unmaps the tensors of which these are the last slices; the page cache keeps what it likes.

        Without this, the page tables of half a terabyte of mappings would take a gigabyte.
        """
        for piece in pieces:
            if piece.offset_bytes + piece.raw.nbytes == piece.total_bytes:
                self._table.release(piece.tensor)
                for name, _ in piece.companions():
                    self._table.release(name)

    @cached_property
    def expert_infos(self) -> tuple[TensorInfo, ...]:
        """All expert tensors."""
        tensors = {
            self._names.expert(layer, expert, part).tensor
            for layer in self.spec.expert_layers
            for part in self.parts(layer)
            for expert in range(self.spec.experts_of(layer).count)
        }
        return tuple(self._infos[tensor] for tensor in tensors)

    def expert_types(self) -> tuple[str, ...]:
        """The types of all expert tensors, sorted."""
        return tuple(sorted({info.dtype for info in self.expert_infos}))

    def expert_bytes(self, layer: int) -> int:
        """Source bytes of one layer's experts."""
        one = sum(self.expert(layer, 0, part).raw.nbytes for part in self.parts(layer))
        return self.spec.experts_of(layer).count * one

    # ---- where things lie -------------------------------------------------------------------------------

    def _is_tied_head(self, ours: str) -> bool:
        return ours == "lm_head" and self.spec.tied

    def parts(self, layer: int) -> tuple[Part, ...]:
        """The matrices that an expert of the layer has."""
        return parts_of(self.spec.experts_of(layer).gated)

    def _expert_shape(self, layer: int, part: Part) -> tuple[int, int]:
        """``(n, k)`` of one matrix: gate, up ``[intermediate, hidden]``, down ``[hidden, intermediate]``."""
        experts = self.spec.experts_of(layer)
        hidden, intermediate = experts.width(self.spec.hidden), experts.intermediate
        return (hidden, intermediate) if part == "down" else (intermediate, hidden)

    def _slice(self, tensor: str, shape: tuple[int, ...], first_row: int) -> TensorSlice:
        quantised = self._infos[tensor].quantised
        if quantised is not None:
            return quantised_slice(quantised, self._table.where(tensor), first_row, shape[0])
        info = self._infos[tensor]
        dtype = info.dtype
        per_row = tensor_bytes(dtype, shape[1:] or (1,))
        begin = first_row * per_row
        return TensorSlice(
            tensor=tensor,
            where=self._table.where(tensor),
            dtype=dtype,
            shape=shape,
            raw=self._table.view(tensor, begin, begin + shape[0] * per_row),
            offset_bytes=begin,
            total_bytes=info.num_bytes,
        )

    def _experts_are_transposed(self) -> bool:
        """By the shapes of the first layer with experts; of a square matrix only the other one tells."""
        layer = self.spec.expert_layers[0]
        for part in ("down", self.parts(layer)[0]):
            place = self._names.expert(layer, 0, part)
            rows, columns = self._expert_shape(layer, part)
            rows *= place.matrices
            info = self._infos.get(place.tensor)
            if place.holds_all and rows != columns and info is not None and info.dtype != MXFP4:
                return self._infos[place.tensor].shape[1:] == (columns, rows)
        return False

    # ---- checks -----------------------------------------------------------------------------------------

    def _check_complete(self) -> None:
        expected: set[str] = set()
        for layer, tensor in dense_tensors(self.spec):
            for ours, shape in tensor.sources():
                name, transform = self._names.tensor(ours, layer), self._transform(ours)
                held = self._held_shape(ours, shape, self._pick(ours, layer))
                if (mixer := self._latent(transform, layer)) is not None:
                    held = held_shape(mixer, transform, together=TOGETHER in name)
                self._check_tensor(name, held, ours)
                expected.add(name)
        for layer in self.spec.expert_layers:
            for part in self.parts(layer):
                expected.update(self._check_experts(layer, part))
        expected |= self.tables.check(self._check_tensor)
        self._check_no_others(expected)

    def _check_experts(self, layer: int, part: Part) -> set[str]:
        num_experts = self.spec.experts_of(layer).count
        rows, columns = self._expert_shape(layer, part)
        first = self._names.expert(layer, 0, part)
        if first.holds_all:
            rows *= first.matrices
            shape = (num_experts, columns, rows) if self._transposed else (num_experts, rows, columns)
            self._check_tensor(first.tensor, shape)
            return {first.tensor}
        tensors = [self._names.expert(layer, expert, part).tensor for expert in range(num_experts)]
        for tensor in tensors:
            self._check_tensor(tensor, (rows, columns))
        return set(tensors)

    def _check_tensor(self, tensor: str, shape: tuple[int, ...], ours: str = "") -> None:
        if tensor not in self._infos:
            raise FormatError(
                f"tensor '{tensor}' is missing",
                where=str(self.path),
                hint="the model is incomplete, or not of the architecture its header names",
            )
        where = self._table.where(tensor)
        found = self._infos[tensor].shape
        if found != shape and not self._lies_as(found, shape):
            check_vocabulary(ours, found, shape, where, is_hf=self.kind == "hf")
            raise FormatError("wrong shape", where=where, got=list(found), limit=list(shape))
        dtype = self._infos[tensor].dtype
        if self._infos[tensor].quantised is not None:
            return
        if ours == TABLE:
            check_ids_type(dtype, where)
            return
        is_hf = self.kind == "hf"
        if not is_hf or ours or dtype != MXFP4:
            check_type(dtype, where, is_hf=is_hf, is_vector=len(shape) == 1)

    def _is_empty_bias(self, name: str) -> bool:
        """Some quantisers give every matrix that they quantise a bias, of zeros where the model has none."""
        beside = self._infos.get(f"{name.removesuffix('bias')}weight") if name.endswith(".bias") else None
        return beside is not None and beside.quantised is not None and not self._table.view(name).any()

    def _check_no_others(self, expected: set[str]) -> None:
        others = sorted(name for name in self._infos if name not in expected)
        others = [name for name in others if not self._names.is_needless(name)]
        others = [name for name in others if not self._is_empty_bias(name)]
        of = {name: self._names.left_out(name) for name in others}
        self.left_out = Counter(what for what in of.values() if what)
        others = [name for name in others if of[name] is None]
        if others:
            raise UnsupportedModelError(
                f"tensor '{others[0]}' is not part of a {self.spec.family} model",
                where=str(self.path),
                got=f"{len(others)} such tensors",
                hint="it has a feature (a bias, shared experts, dense layers, ...) that would be dropped",
            )

    def _lies_as(self, found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        """Sizes of 1 do not count; llama.cpp has some vectors in rows."""
        by_rows = self.kind == "gguf" and len(shape) == 1 and math.prod(found) == shape[0]
        return by_rows or [size for size in found if size != 1] == [size for size in shape if size != 1]
