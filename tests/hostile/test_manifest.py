"""Manifests that lie. Their checksums are true, so that only the lie itself can be noticed."""

import json

import pytest
from bundle_edits import edit_manifest, header_bytes, read_manifest
from format_builders import architecture

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import ChecksumError, FormatError, UnsupportedModelError, VersionError

CPU = "cpu-000.safetensors"

MANIFEST_CASES = {
    "file_named_as_a_path": (
        lambda m: m["files"][0].update(name="../../cpu-000.safetensors"),
        FormatError,
        ["not a plain name"],
    ),
    "file_named_absolutely": (
        lambda m: m["files"][0].update(name="/etc/passwd"),
        FormatError,
        ["not a plain name"],
    ),
    "file_named_as_the_manifest": (
        lambda m: m["files"][0].update(name="manifest.json"),
        FormatError,
        ["not the name of a shard"],
    ),
    "asset_named_as_a_path": (
        lambda m: m["assets"][0].update(name="../x", file="../x.zst"),
        FormatError,
        ["not a plain name"],
    ),
    "asset_that_is_a_shard": (
        lambda m: m["assets"][0].update(file=CPU),
        FormatError,
        ["unexpected file name"],
    ),
    "quality_of_many_numbers": (
        lambda m: m.update(quality={"a": [1] * 30_000}),
        FormatError,
        ["quality", "the record is too large"],
    ),
    "quality_of_many_kinds": (
        lambda m: m.update(quality={f"k{i}": {"count": 1} for i in range(20_000)}),
        FormatError,
        ["quality", "the record is too large"],
    ),
    "recipe_of_megabytes": (
        lambda m: m.update(recipe={"a": "x" * 3_000_000}),
        FormatError,
        ["recipe", "the record is too large"],
    ),
    "quality_of_sixty_megabytes": (
        lambda m: m.update(quality={"a": "x" * (60 << 20)}),
        FormatError,
        ["too l"],
    ),
    "file_of_negative_size": (lambda m: m["files"][0].update(num_bytes=-1), FormatError, ["negative"]),
    "file_of_exabytes": (
        lambda m: m["files"][0].update(num_bytes=1 << 62),
        FormatError,
        ["another size than the manifest says"],
    ),
    "header_larger_than_its_file": (
        lambda m: m["files"][0].update(header_bytes=1 << 40),
        FormatError,
        ["impossible size of a header"],
    ),
    "blob_of_overflowing_shape": (
        lambda m: m["blobs"][0].update(shape=[1 << 33, 1 << 33]),
        FormatError,
        ["overflows"],
    ),
    "blob_beyond_its_file": (
        lambda m: m["blobs"][0].update(offset_bytes=1 << 50),
        FormatError,
        ["exceeds its file"],
    ),
    "blob_inside_the_header": (lambda m: m["blobs"][0].update(offset_bytes=0), FormatError, ["overlap"]),
    "blobs_that_overlap": (
        lambda m: m["blobs"][1].update(offset_bytes=m["blobs"][0]["offset_bytes"]),
        FormatError,
        ["overlap"],
    ),
    "blob_in_no_file": (
        lambda m: m["blobs"][0].update(file="dense-777.safetensors"),
        FormatError,
        ["does not list"],
    ),
    "blob_of_another_dtype": (
        lambda m: m["blobs"][0].update(dtype="F16"),
        FormatError,
        ["disagree", "'embedding'"],
    ),
    "blob_of_another_shape": (
        lambda m: m["blobs"][0].update(shape=[64, 100]),
        FormatError,
        ["disagree", "'embedding'"],
    ),
    "blob_left_out": (
        lambda m: m["blobs"].pop(0),
        FormatError,
        ["the manifest does not list", "'embedding'"],
    ),
    "blob_invented": (
        lambda m: m["blobs"].append(
            next(blob for blob in m["blobs"] if blob["tier"] == "gpu")
            | {"name": "ghost", "offset_bytes": 5 << 20, "shape": [1], "num_bytes": 1}
        ),
        FormatError,
        ["lacks a blob", "'ghost'"],
    ),
    "blob_twice": (lambda m: m["blobs"].append(m["blobs"][0]), FormatError, ["occurs twice"]),
    "format_of_the_future": (lambda m: m.update(format_major=2), VersionError, ["newer format", "upgrade"]),
    "unknown_field": (lambda m: m.update(hooks=["evil"]), FormatError, ["unknown field", "'hooks'"]),
    "asset_bomb_declared": (
        lambda m: m["assets"][0].update(decompressed_bytes=1 << 50),
        FormatError,
        ["would be too large"],
    ),
    "model_of_absurd_size": (lambda m: m["model"].update(vocab=1 << 40), FormatError, ["vocab", "range"]),
    "model_of_too_many_layers": (
        lambda m: m["model"].update(pattern=[0] * 20_000),
        FormatError,
        ["pattern", "1..10000"],
    ),
    "model_with_a_layer_that_is_not_there": (
        lambda m: m["model"].update(pattern=[0, -1]),
        FormatError,
        ["no such layer", "-1"],
    ),
    "model_of_unknown_blocks": (
        lambda m: m["model"]["layers"][0].update(mixer={"kind": "evil"}),
        FormatError,
        ["unknown kind", "'evil'", "attention"],
    ),
    "model_whose_family_is_a_path": (
        lambda m: m["model"].update(family="../../evil"),
        FormatError,
        ["not the name of a family", "'../../evil'"],
    ),
    "model_whose_family_paints": (
        lambda m: m["model"].update(family="\x1b[2Jqwen"),
        FormatError,
        ["not the name of a family"],
    ),
    "model_beside_an_architecture": (
        lambda m: m.update(architecture={"model_type": "qwen3_moe"}),
        FormatError,
        ["unknown field", "'architecture'"],
    ),
    "model_nested_deeply": (lambda m: m["model"].update(norm=_nested(20)), FormatError, ["norm"]),
    "old_version_with_a_new_model": (
        lambda m: m.update(format_minor=0),
        FormatError,
        ["unknown field", "'model'"],
    ),
    "old_architecture_unknown": (
        lambda m: m.update(format_minor=0, architecture=m.pop("model") and _flat("evil")),
        UnsupportedModelError,
        ["'evil'", "qwen3_moe"],
    ),
    "old_architecture_of_absurd_size": (
        lambda m: m.update(format_minor=0, architecture=m.pop("model") and _flat("qwen3_moe", 1 << 40)),
        FormatError,
        ["num_layers"],
    ),
}


def _nested(depth):
    value = {"eps": 1e-6}
    for _ in range(depth):
        value = {"eps": value}
    return value


def _flat(model_type, num_layers=2):
    """The record of the model in format 1.0."""
    return architecture().to_json() | {"model_type": model_type, "num_layers": num_layers}


@pytest.mark.parametrize("case", MANIFEST_CASES)
def test_lying_manifests(case, bundle, refuses):
    edit, error, parts = MANIFEST_CASES[case]
    edit_manifest(bundle, edit)
    refuses(lambda: Bundle.open(bundle), *parts, header_bytes=header_bytes(bundle), error=error)


MANIFEST_BYTES = {
    "manifest_empty": (b"", FormatError, ["the file is empty"]),
    "manifest_is_a_list": (b"[]\n", FormatError, ["must be an object"]),
    "manifest_nested_deeply": (b'{"recipe":' * 100_000, FormatError, ["nested too deeply"]),
    "manifest_wide": (b"[" + b"{}," * 200_000, FormatError, ["too many objects"]),
    "manifest_of_another_program": (b'{"format": "other"}\n', FormatError, ["not the manifest of a bundle"]),
    "manifest_with_infinite_version": (
        b'{"format": "krasis-bundle", "format_major": Infinity}',
        FormatError,
        ["Infinity"],
    ),
    "manifest_checksum_not_text": (None, ChecksumError, ["altered"]),
}


@pytest.mark.parametrize("case", MANIFEST_BYTES)
def test_malformed_manifests(case, bundle, refuses):
    data, error, parts = MANIFEST_BYTES[case]
    if data is None:
        data = (
            json.dumps(read_manifest(bundle) | {"checksum": [1]}, sort_keys=True, indent=1).encode() + b"\n"
        )
    (bundle / "manifest.json").write_bytes(data)
    refuses(lambda: Bundle.open(bundle), *parts, header_bytes=len(data), error=error)
