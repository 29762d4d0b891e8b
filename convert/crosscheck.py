"""Do the checkpoint and the GGUF hold the same model? Checked on samples, before any long work."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from krasis.convert.names import DENSE, PARTS
from krasis.convert.slices import TensorSlice
from krasis.convert.sources import WeightSource
from krasis.formats.architecture import Architecture
from krasis.formats.errors import FormatError, MismatchError
from krasis.formats.layouts.matrix import PackStats

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
}
_LOOSEST_LIMIT = 0.9  # types of fewer than 2 bits

_EQUAL_FIELDS = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "num_experts",
    "num_experts_per_token",
    "expert_intermediate_size",
    "vocab_size",
)
_CLOSE_FIELDS = ("rms_norm_eps", "rope_theta")


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
    """The relative error that a GGUF type may show against the original weights."""
    return _LIMITS.get(dtype, _LOOSEST_LIMIT)


def check_same_model(hf: WeightSource, gguf: WeightSource) -> CrossCheck:
    """MismatchError naming the field or tensor that differs, FormatError for NaN or infinity in a sample."""
    _check_architectures(hf.architecture, gguf.architecture, str(gguf.path))
    num_tensors, worst, worst_share = 0, ("", 0.0), -1.0
    experts = PackStats(0.0, 0.0, 0.0, 0)
    for ours, theirs, is_expert in _pairs(hf, gguf):
        stats = _compare(ours, theirs)
        relative = _relative_error(stats)
        limit = error_limit(theirs.dtype)
        if not relative <= limit:
            raise MismatchError(
                f"the weights are not those of '{ours.tensor}' in {hf.path}, but of another model or version",
                where=theirs.where,
                got=f"relative error {relative:.3g}",
                limit=f"{limit:g} for {theirs.dtype}",
                hint="give the GGUF that was made from this checkpoint, or only one of the two",
            )
        num_tensors += 1
        if relative / limit > worst_share:
            worst, worst_share = (theirs.tensor, relative), relative / limit
        if is_expert:
            experts = experts + stats
    return CrossCheck(num_tensors, worst[0], worst[1], experts)


def _check_architectures(hf: Architecture, gguf: Architecture, where: str) -> None:
    for field in _EQUAL_FIELDS:
        expected, found = getattr(hf, field), getattr(gguf, field)
        if expected != found:
            raise _other_model(field, expected, found, where)
    for field in _CLOSE_FIELDS:
        expected, found = getattr(hf, field), getattr(gguf, field)
        if not math.isclose(expected, found, rel_tol=1e-5):
            raise _other_model(field, expected, found, where)


def _other_model(field: str, expected: object, found: object, where: str) -> MismatchError:
    return MismatchError(
        f"the GGUF is of another model: {field} differs",
        where=where,
        got=found,
        limit=f"{expected} in the checkpoint's config.json",
        hint="give the GGUF that was made from this checkpoint, or only one of the two",
    )


def _pairs(hf: WeightSource, gguf: WeightSource) -> Iterator[tuple[TensorSlice, TensorSlice, bool]]:
    arch = hf.architecture
    sampled = set(spread(arch.num_layers, NUM_SAMPLED_LAYERS))
    for name in DENSE:
        # Norms are small and kept as floats: every layer's is compared, which tells apart even close
        # relatives.
        layers = range(arch.num_layers) if len(name.shape) == 1 else sorted(sampled)
        for layer in layers if name.per_layer else (None,):
            yield hf.dense(name.ours, layer), gguf.dense(name.ours, layer), False
    for layer in sorted(sampled):
        for expert in spread(arch.num_experts, NUM_SAMPLED_EXPERTS):
            for part in PARTS:
                yield hf.expert(layer, expert, part), gguf.expert(layer, expert, part), True


def spread(count: int, samples: int) -> list[int]:
    """Up to ``samples`` indices below ``count``, evenly spread, first and last among them."""
    if count <= samples:
        return list(range(count))
    return sorted({round(i * (count - 1) / (samples - 1)) for i in range(samples)})


def _compare(ours: TensorSlice, theirs: TensorSlice) -> PackStats:
    stats = PackStats(0.0, 0.0, 0.0, 0)
    if len(ours.shape) == 1:
        return _difference(ours, theirs)
    for row in spread(ours.shape[0], NUM_SAMPLED_ROWS):
        stats = stats + _difference(ours.rows(row, row + 1), theirs.rows(row, row + 1))
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
