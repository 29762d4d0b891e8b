"""Which blobs a bundle has: those of its model and tiers, and no others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from krasis.formats.bundle.manifest import FORMAT_MINOR, Manifest
from krasis.formats.errors import FormatError, VersionError
from krasis.formats.models.spec import ModelSpec
from krasis.formats.models.tensors import blob_name, blobs, table_tensors
from krasis.formats.names import shown


def expert_blob(layer: int, tier: str) -> str:
    """The name of the blob that holds a layer's experts of a tier."""
    return f"layers.{layer}.experts.{tier}"


def blob_names(spec: ModelSpec, tiers: Iterable[str]) -> Iterator[str]:
    """The names of all blobs of a model. tiers: of the bundle; ``dense`` is always there, and so
    are hashed tables."""
    yield from (blob.name for blob in blobs(spec))
    yield from (blob_name(tensor, layer) for layer, tensor in table_tensors(spec))
    layers = spec.expert_layers
    for tier in tiers:
        if tier != "dense":
            yield from (expert_blob(layer, tier) for layer in layers)


def check_blob_names(manifest: Manifest, where: str) -> None:
    """FormatError if a blob is missing or is none of the model's; VersionError for one that a newer format
    may have added.
    """
    expected = set(blob_names(manifest.spec, manifest.layouts))
    found = {blob.name for blob in manifest.blobs}
    if missing := sorted(expected - found):
        raise FormatError(
            "the bundle lacks a blob of its architecture",
            where=f"{where}: {shown(missing[0])}",
            got=f"{len(missing)} missing",
            hint="convert the model again",
        )
    if others := sorted(found - expected):
        kind = VersionError if manifest.format_minor > FORMAT_MINOR else FormatError
        raise kind(
            "the bundle has a blob that its architecture has no use for",
            where=f"{where}: {shown(others[0])}",
            got=f"{len(others)} such blobs",
            hint="upgrade krasis-bundle"
            if kind is VersionError
            else "it was not made by krasis-convert; convert the model again",
        )
