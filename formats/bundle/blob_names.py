"""Which blobs a bundle has: those of its architecture and tiers, and no others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from krasis.formats.architecture_record import Architecture
from krasis.formats.bundle.manifest import FORMAT_MINOR, Manifest
from krasis.formats.errors import FormatError, VersionError
from krasis.formats.names import shown

_TOP = ("embedding", "final_norm", "lm_head", "lm_head.scale")
_LAYER = (
    "attention.norm",
    "attention.qkv",
    "attention.qkv.scale",
    "attention.q_norm",
    "attention.k_norm",
    "attention.output",
    "attention.output.scale",
    "experts.norm",
    "experts.router",
)


def blob_names(architecture: Architecture, tiers: Iterable[str]) -> Iterator[str]:
    """The names of all blobs of a model. tiers: of the bundle; ``dense`` is always there."""
    yield from _TOP
    parts = (*_LAYER, *(f"experts.{tier}" for tier in tiers if tier != "dense"))
    for layer in range(architecture.num_layers):
        yield from (f"layers.{layer}.{part}" for part in parts)


def check_blob_names(manifest: Manifest, where: str) -> None:
    """FormatError if a blob is missing or is none of the architecture's; VersionError for one that a newer
    format may have added.
    """
    expected = set(blob_names(manifest.architecture, manifest.layouts))
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
