"""Opens the recognised inputs as weight sources, with their text assets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from krasis.convert.convertible import check_convertible
from krasis.convert.drafting import drafting_spec
from krasis.convert.inputs import Inputs
from krasis.convert.mxfp4_table import Mxfp4Table, is_mxfp4
from krasis.convert.own_head import has_own_head
from krasis.convert.slices import Bytes
from krasis.convert.sources import SourceFile, TensorInfo, TensorTable, WeightSource
from krasis.convert.text_assets import assets_from_folder, assets_from_gguf
from krasis.convert.vocabulary import check_gguf_tokens
from krasis.formats.checkpoints.gguf import GgufCheckpoint
from krasis.formats.checkpoints.gguf_kind import check_is_model
from krasis.formats.checkpoints.hf_config import read_hf_config
from krasis.formats.checkpoints.quantised.registry import quantisation_beside, quantisation_of
from krasis.formats.checkpoints.quantised.scaled_blocks import of_gguf
from krasis.formats.checkpoints.quantised.settings import Quantisation
from krasis.formats.checkpoints.quantised.table import quantised_table
from krasis.formats.checkpoints.quantised.tensors import Tensors
from krasis.formats.checkpoints.quantised_checkpoint import refuse_side_files
from krasis.formats.checkpoints.safetensors import ShardedCheckpoint
from krasis.formats.errors import FormatError, KrasisError
from krasis.formats.files.file_kinds import refuse_text
from krasis.formats.files.regular_file import read_small_file
from krasis.formats.limits import MAX_CONFIG_BYTES
from krasis.formats.models.family import DRAFTING
from krasis.formats.models.long_context import gguf_context_notes, hf_context_notes
from krasis.formats.models.registry import family_of, spec_from_gguf
from krasis.formats.strict_json import parse_json_object

if TYPE_CHECKING:
    from krasis.convert.hub.streamed import StreamedSources


@dataclass(frozen=True, slots=True)
class OpenInputs:
    """Sources (at least one is set) and the text files that go into the bundle, by name. notes: what was
    taken for what was given, and what was left alone. unreadable: text files that are there but could not be
    read, and why.
    """

    hf: WeightSource | None
    gguf: WeightSource | None
    assets: Mapping[str, bytes]
    notes: tuple[str, ...] = ()
    unreadable: Mapping[str, KrasisError] = field(default_factory=dict)

    def sources(self) -> tuple[WeightSource, ...]:
        """The sources that were given."""
        return tuple(source for source in (self.hf, self.gguf) if source is not None)


class _Table:
    """A checkpoint of either kind as a TensorTable."""

    def __init__(
        self,
        checkpoint: ShardedCheckpoint | GgufCheckpoint,
        streamed: StreamedSources | None,
        quantisation: Quantisation | None = None,
    ) -> None:
        self._checkpoint, self._streamed = checkpoint, streamed
        self._infos: dict[str, TensorInfo] = {}
        if isinstance(checkpoint, GgufCheckpoint):
            for name, gguf in checkpoint.tensors.items():
                self._infos[name] = TensorInfo(gguf.ggml_type, gguf.shape, gguf.offset_bytes, gguf.num_bytes)
            quantisation = of_gguf(Tensors(self._infos, self.view, self.where))
        else:
            for name, info in checkpoint.tensors.items():
                self._infos[name] = TensorInfo(info.dtype, info.shape, info.offset_bytes, info.num_bytes)
        self._weights = self._infos if quantisation is None else self._dequantised(quantisation)

    def _dequantised(self, quantisation: Quantisation) -> dict[str, TensorInfo]:
        """The weights as they would be if none were quantised."""
        table = quantised_table(quantisation, Tensors(self._infos, self.view, self.where))
        weights = {name: self._infos[name] for name in self._infos if name in table.plain}
        for name, weight in table.weights.items():
            codes = self._infos[weight.codes.name]
            weights[name] = replace(codes, dtype=weight.dtype, shape=weight.shape, quantised=weight)
        return weights

    @property
    def is_quantised(self) -> bool:
        """Whether any weight is."""
        return any(info.quantised is not None for info in self._weights.values())

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._weights

    def place(self, name: str) -> tuple[int, int]:
        info = self._infos[name]
        return info.offset_bytes, info.offset_bytes + info.num_bytes

    def view(self, name: str, begin: int = 0, end: int | None = None) -> Bytes:
        return self._checkpoint.view(self._held(name), begin, end)

    def expert(self, name: str, number: int) -> Bytes | None:
        return None

    def where(self, name: str) -> str:
        name = self._held(name)
        return f"{self._checkpoint.file_of(name).path}: '{name}'"

    def release(self, name: str) -> None:
        self._checkpoint.release(self._held(name))

    def _held(self, name: str) -> str:
        """The file's tensor: of a quantised weight that holds the codes."""
        weight = self._weights[name].quantised if name not in self._infos else None
        return name if weight is None else weight.codes.name

    def files(self) -> tuple[SourceFile, ...]:
        """Name, size, time and a digest of what the headers say, per file."""
        tensors: dict[Path, list[str]] = {file.path: [] for file in self._checkpoint.files}
        for name in sorted(self._infos):
            tensors[self._checkpoint.file_of(name).path].append(name)
        return tuple(self._file(path, names) for path, names in tensors.items())

    def _file(self, path: Path, names: list[str]) -> SourceFile:
        header = "".join(f"{name} {self._infos[name]}\n" for name in names)
        status = path.stat()
        digest = xxhash.xxh3_128_hexdigest(header.encode())
        version = None if self._streamed is None else self._streamed.version(path)
        return SourceFile(path, path.name, status.st_size, status.st_mtime_ns, digest, tuple(names), version)


def open_inputs(inputs: Inputs, streamed: StreamedSources | None = None, *, mtp: bool = False) -> OpenInputs:
    """Opens and checks every header, shape and type; reads no weights. Raises KrasisError.

    streamed: gets what is not on the disk. mtp: with the layer that drafts, which must be there then.
    """
    hf, (hf_assets, unreadable), notes = (
        _open_hf(inputs.hf, streamed, mtp=mtp) if inputs.hf is not None else (None, ({}, {}), ())
    )
    notes = (*inputs.notes, *notes)
    gguf, metadata = _open_gguf(inputs.gguf, streamed, mtp=mtp) if inputs.gguf is not None else (None, {})
    if gguf is not None:
        notes = (*notes, *_gguf_notes(hf, gguf, metadata))
    if "tokenizer.json" in (*hf_assets, *unreadable) or gguf is None:
        return OpenInputs(hf, gguf, hf_assets, notes, unreadable)
    # Without a checkpoint, or with one that lacks its tokenizer. What the folder has goes first.
    try:
        rebuilt = assets_from_gguf(metadata, str(gguf.path))
    except KrasisError as error:
        return OpenInputs(hf, gguf, hf_assets, notes, {**unreadable, "tokenizer.json": error})
    return OpenInputs(hf, gguf, {**rebuilt, **hf_assets}, notes, unreadable)


def _gguf_notes(
    hf: WeightSource | None, gguf: WeightSource, metadata: Mapping[str, object]
) -> tuple[str, ...]:
    if hf is None:
        return (*_left_out_notes(gguf), *gguf_context_notes(metadata, gguf.spec))
    ours, theirs = hf.spec.rope_scaling, gguf.spec.rope_scaling
    if (ours.kind, ours.factor) == (theirs.kind, theirs.factor):
        return ()
    return (
        f"the checkpoint's rope scaling ({ours.kind} x{ours.factor:g}) is used, not the GGUF's "
        f"({theirs.kind} x{theirs.factor:g})",
    )


def _left_out_notes(source: WeightSource) -> tuple[str, ...]:
    """A sentence for every kind of tensors that are left out."""
    can_draft = family_of(source.spec).drafts is not None and not source.spec.layers[-1].drafts
    return tuple(
        f"{count} tensors of {what} are left out: the model makes the same of text without them"
        + (" (--mtp takes such a layer, to draft with it)" if what == DRAFTING and can_draft else "")
        for what, count in source.left_out.items()
    )


def _open_hf(
    path: Path, streamed: StreamedSources | None, *, mtp: bool
) -> tuple[WeightSource, tuple[dict[str, bytes], dict[str, KrasisError]], tuple[str, ...]]:
    folder = path if path.is_dir() else path.parent
    config_path = folder / "config.json"
    data = read_small_file(config_path, MAX_CONFIG_BYTES, follow_links=True)
    refuse_text(data, config_path)
    config = parse_json_object(data, str(config_path), max_bytes=MAX_CONFIG_BYTES)
    spec = read_hf_config(config, str(config_path))
    check_convertible(spec, str(config_path))
    family = family_of(spec)
    mxfp4 = is_mxfp4(config) and family.released_in == "MXFP4"
    quantisation = None if mxfp4 else quantisation_of(config, str(config_path)) or quantisation_beside(folder)
    notes = list(hf_context_notes(config, spec))
    checkpoint = ShardedCheckpoint.open(path, None if streamed is None else streamed.need)
    table = _Table(checkpoint, streamed, quantisation)
    if quantisation is not None:
        notes.append(_quantised_note(quantisation, is_quantised=table.is_quantised))
    if spec.tied and has_own_head(table, family):
        # As transformers loads it: two matrices that differ are not tied, whatever config.json says.
        spec = replace(spec, tied=False)
        notes.append(
            "config.json ties the output head to the embedding, but the checkpoint has a head of its own: "
            "that one is used, as transformers does"
        )
    if mtp:
        spec = drafting_spec("hf", path, spec, family, table.infos())
    try:
        made = Mxfp4Table(table) if mxfp4 else None
        files = table.files() if made is None else made.files(table.files())
        source = WeightSource("hf", path, spec, family, _as_table(table) if made is None else made, files)
    except FormatError:
        if quantisation is None:
            refuse_side_files(folder)  # if one explains it
        raise
    return source, assets_from_folder(folder), (*checkpoint.notes, *notes, *_left_out_notes(source))


def _quantised_note(quantisation: Quantisation, *, is_quantised: bool) -> str:
    if not is_quantised:
        return f"the settings say that the weights are quantised ({quantisation.name}), but none of them is"
    return (
        f"the checkpoint is quantised ({quantisation.name}): its weights are dequantised, and what they were "
        "rounded to is rounded again; from the BF16 checkpoint the bundle is more precise"
    )


def _open_gguf(
    path: Path, streamed: StreamedSources | None, *, mtp: bool
) -> tuple[WeightSource, Mapping[str, object]]:
    checkpoint = GgufCheckpoint.open(path, None if streamed is None else streamed.need)
    check_is_model(checkpoint.metadata, checkpoint.tensors, str(path))
    spec = spec_from_gguf(checkpoint.metadata, checkpoint.tensors, str(path))
    check_convertible(spec, str(path))
    check_gguf_tokens(checkpoint.metadata, spec.vocab, str(path))
    table = _Table(checkpoint, streamed)
    if mtp:
        spec = drafting_spec("gguf", path, spec, family_of(spec), table.infos())
    source = WeightSource("gguf", path, spec, family_of(spec), _as_table(table), table.files())
    return source, checkpoint.metadata


def _as_table(table: _Table) -> TensorTable:
    return table
