"""Do the checkpoint and the GGUF hold the same model? Checked on samples, before any long work."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from krasis.convert.slices import TensorSlice
from krasis.convert.source_parts import SourcePart
from krasis.convert.sources import WeightSource
from krasis.formats.errors import FormatError, MismatchError
from krasis.formats.layouts.matrix import PackStats
from krasis.formats.models.record import Record
from krasis.formats.models.spec import ModelSpec

if TYPE_CHECKING:
    from krasis.convert.hub.streamed import StreamedSources

NUM_SAMPLED_LAYERS = 6
NUM_SAMPLED_EXPERTS = 3
NUM_SAMPLED_ROWS = 4

# Largest relative error (root of squared error over squared weights) that each type's rounding explains, with
# room for heavy tails; two unrelated matrices differ by about 1.4. Plain floats hold BF16 weights (almost)
# exactly.
_LIMITS = {
    "F32": 1e-3,
    "F16": 4e-3,
    "BF16": 8e-3,
    "Q8_0": 0.025,
    "Q8_K": 0.025,
    "Q6_K": 0.08,
    "Q5_0": 0.15,
    "Q5_1": 0.15,
    "Q5_K": 0.15,
    "Q4_0": 0.3,
    "Q4_1": 0.3,
    "Q4_K": 0.25,
    "IQ4_NL": 0.25,
    "IQ4_XS": 0.25,
    "MXFP4": 0.35,
    "NVFP4": 0.35,
    "Q3_K": 0.45,
    "IQ3_S": 0.5,
    "IQ3_XXS": 0.55,
    "Q2_K": 0.7,
    "IQ2_S": 0.75,
    "IQ2_XS": 0.75,
    "IQ2_XXS": 0.8,
    # Checkpoints' own.
    "int8": 0.03,
    "fp8": 0.06,
    "mxfp8": 0.06,
    "nvfp4": 0.3,
    "mxfp4": 0.35,
    "int4": 0.3,
}
_LOOSEST_LIMIT = 0.9  # types of fewer than 2 bits

# What a GGUF's metadata cannot say or says in another way; the checkpoint's word counts.
_NOT_COMPARED = frozenset(
    {
        "draft_layers",
        "family",
        "max_positions",
        "min_step",
        "renormalise",
        "scaling",
        "sum_epsilon",
        "sum_floor",
        "tied",
    }
)


@dataclass(frozen=True, slots=True)
class CrossCheck:
    """What the comparison found.

    experts: errors of the GGUF's sampled expert rows against the checkpoint's.
    """

    num_tensors: int
    worst_tensor: str
    worst_relative_error: float
    experts: PackStats


def error_limit(dtype: str) -> float:
    """The relative error that a type may show against the original weights."""
    return _LIMITS.get(dtype, _LOOSEST_LIMIT)


def _limit(ours: TensorSlice, theirs: TensorSlice) -> float:
    """The same of two types against each other; plain floats of a checkpoint are the original weights."""
    if ours.is_float:
        return error_limit(theirs.dtype)
    return min(math.hypot(error_limit(ours.dtype), error_limit(theirs.dtype)), _LOOSEST_LIMIT)


def check_same_model(hf: WeightSource, gguf: WeightSource) -> CrossCheck:
    """MismatchError naming the field or tensor that differs, FormatError for NaN or infinity in a sample."""
    _check_specs(hf.spec, gguf.spec, str(gguf.path))
    num_tensors, worst, worst_share = 0, ("", 0.0), -1.0
    experts = PackStats(0.0, 0.0, 0.0, 0)
    for ours, theirs, is_expert in _pairs(hf, gguf):
        stats = _compare(ours, theirs)
        relative = _relative_error(stats)
        limit = _limit(ours.piece, theirs.piece)
        if not relative <= limit:
            raise MismatchError(
                f"the weights are not those of '{ours.piece.tensor}' in {hf.path}, but of another model or "
                "version",
                where=theirs.piece.where,
                got=f"relative error {relative:.3g}",
                limit=f"{limit:g} for {theirs.piece.dtype}",
                hint="give the GGUF that was made from this checkpoint, or only one of the two",
            )
        num_tensors += 1
        if relative / limit > worst_share:
            worst, worst_share = (theirs.piece.tensor, relative), relative / limit
        if is_expert:
            experts = experts + stats
    return CrossCheck(num_tensors, worst[0], worst[1], experts)


def check_once(hf: WeightSource, gguf: WeightSource, streamed: StreamedSources | None) -> CrossCheck:
    """As ``check_same_model``; where samples are downloaded, a run that goes on recalls what was found."""
    if streamed is None:
        return check_same_model(hf, gguf)
    files = [file.fingerprint() for source in (hf, gguf) for file in source.files]
    memo = f"cross-check {xxhash.xxh3_128_hexdigest(json.dumps(files).encode())}"
    if (known := streamed.recall(memo)) is not None:
        return CrossCheck(**{**known, "experts": PackStats(**known["experts"])})
    found = check_same_model(hf, gguf)
    streamed.remember(memo, asdict(found))
    return found


def _check_specs(hf: ModelSpec, gguf: ModelSpec, where: str) -> None:
    if len(hf.layers) != len(gguf.layers):
        raise _other_model("num_layers", len(hf.layers), len(gguf.layers), where)
    layers = dict.fromkeys(zip(hf.layers, gguf.layers, strict=True))
    for pair in ((hf, gguf), *layers):
        expected, found = (_flat(record) for record in pair)
        for field in sorted(expected.keys() | found.keys()):
            if not _is_same(expected.get(field), found.get(field)):
                raise _other_model(field, expected.get(field), found.get(field), where)


def _flat(record: Record) -> dict[str, Any]:
    """Every compared field of a record and of those inside it, by its path."""
    values: dict[str, Any] = {}
    names: tuple[str, ...] = type(record).__slots__
    for field in names:
        value = getattr(record, field)
        if isinstance(value, Record):
            values |= {f"{field}.{name}": inner for name, inner in _flat(value).items()}
        elif not isinstance(value, tuple):
            values[field] = value
    return {name: value for name, value in values.items() if name.rpartition(".")[2] not in _NOT_COMPARED}


def _is_same(expected: object, found: object) -> bool:
    if isinstance(expected, float) and isinstance(found, float):
        return math.isclose(expected, found, rel_tol=1e-5)
    return expected == found


def _other_model(field: str, expected: object, found: object, where: str) -> MismatchError:
    return MismatchError(
        f"the GGUF is of another model: {field} differs",
        where=where,
        got=found,
        limit=f"{expected} in the checkpoint's config.json",
        hint="give the GGUF that was made from this checkpoint, or only one of the two",
    )


def _pairs(hf: WeightSource, gguf: WeightSource) -> Iterator[tuple[SourcePart, SourcePart, bool]]:
    spec = hf.spec
    sampled = set(spread(len(spec.layers), NUM_SAMPLED_LAYERS))
    for tensor, layer, parts in hf.all_dense():
        # Norms are small and kept as floats: every layer's is compared, which tells apart even close
        # relatives.
        if len(tensor.shape) == 1 or layer is None or layer in sampled:
            for ours, theirs in zip(parts, gguf.dense(tensor, layer), strict=True):
                yield ours, theirs, False
    layers = spec.expert_layers
    for layer in (layers[i] for i in spread(len(layers), NUM_SAMPLED_LAYERS)):
        for expert in spread(spec.experts_of(layer).count, NUM_SAMPLED_EXPERTS):
            for part in hf.parts(layer):
                pair = (source.expert(layer, expert, part) for source in (hf, gguf))
                ours, theirs = (SourcePart(piece) for piece in pair)
                yield ours, theirs, True


def spread(count: int, samples: int) -> list[int]:
    """Up to ``samples`` indices below ``count``, evenly spread, first and last among them."""
    if count <= samples:
        return list(range(count))
    return sorted({round(i * (count - 1) / (samples - 1)) for i in range(samples)})


def _compare(ours: SourcePart, theirs: SourcePart) -> PackStats:
    stats = PackStats(0.0, 0.0, 0.0, 0)
    if len(ours.piece.shape) == 1:
        return _difference(ours.restored(ours.piece), theirs.restored(theirs.piece))
    for row in spread(ours.num_rows, NUM_SAMPLED_ROWS):
        stats = stats + _difference(ours.row(row), theirs.row(row))
    return stats


def _difference(ours: TensorSlice, theirs: TensorSlice) -> PackStats:
    expected, found = (piece.decode().astype(np.float64).ravel() for piece in (ours, theirs))
    for piece, values in ((ours, expected), (theirs, found)):
        if not np.isfinite(values).all():
            raise FormatError("NaN or infinity among the weights", where=piece.where)
    error = expected - found
    return PackStats(
        float(error @ error), float(expected @ expected), float(np.abs(error).max(initial=0.0)), expected.size
    )


def _relative_error(stats: PackStats) -> float:
    if stats.squared_sum == 0.0:
        return 0.0 if stats.squared_error == 0.0 else math.inf
    return math.sqrt(stats.squared_error / stats.squared_sum)
