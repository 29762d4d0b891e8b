"""Which models bundles can be made of: their tensors' names are known, and layouts can hold them. Whether a
backend runs them is another question.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from krasis.formats.errors import UnsupportedModelError
from krasis.formats.layouts.expert_record import SIZE_MULTIPLE
from krasis.formats.layouts.int8_rows import K_MULTIPLE
from krasis.formats.models.registry import convertible_families, family_of
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.tensors import dense_tensors
from krasis.runtime.missing_kernels import CPU_RUNS, GPU_RUNS, lacking, refuse_missing_kernels


def check_convertible(spec: ModelSpec, where: str) -> None:
    """Raises UnsupportedModelError for a model that no bundle can be made of. where: the source."""
    if not family_of(spec).names:
        refuse_missing_kernels(spec, where)
        raise UnsupportedModelError(
            "checkpoints of this model family are not read yet",
            where=where,
            got=spec.family,
            limit=", ".join(family.name for family in convertible_families()),
        )
    for what in _unpackable(spec):
        raise UnsupportedModelError(f"bundles cannot hold {what} yet", where=where, got=spec.family)
    for name, value, multiple in _sizes(spec):
        if value % multiple:
            raise UnsupportedModelError(
                "size is not a multiple of the tile",
                where=f"{where}: {name}",
                got=value,
                limit=f"a multiple of {multiple}",
            )


def kernels_note(spec: ModelSpec, tiers: Collection[str]) -> str | None:
    """A sentence for a model that can be converted but not be run by this version, or not everywhere."""
    if missing := lacking(spec, CPU_RUNS):
        return f"this version can make the bundle but not run it yet: there are no kernels for {missing[0]}"
    if (longest := spec.block_context) is not None:
        return (
            f"this version runs the model on the CPU, in contexts of up to {longest} tokens: "
            "there are no kernels yet for the index that chooses among more"
        )
    if "gpu" in tiers and (missing := lacking(spec, GPU_RUNS)):
        return (
            f"this version runs the model on the CPU only: the GPU has no kernels yet for {missing[0]} "
            "(--tiers cpu leaves the GPU's experts out)"
        )
    return None


def _unpackable(spec: ModelSpec) -> Iterator[str]:
    if not spec.expert_layers:
        yield "a model without experts"


def _sizes(spec: ModelSpec) -> Iterator[tuple[str, int, int]]:
    """What has to be a multiple of a tile."""
    yield "hidden size", spec.hidden, SIZE_MULTIPLE
    for layer in dict.fromkeys(spec.layers):
        if layer.experts is not None:
            yield "expert size", layer.experts.intermediate, SIZE_MULTIPLE
            yield "experts' inputs", layer.experts.width(spec.hidden), SIZE_MULTIPLE
    for _, tensor in dense_tensors(spec):
        if tensor.store == "int8_rows":
            yield f"columns of {tensor.name}", tensor.shape[1], K_MULTIPLE
