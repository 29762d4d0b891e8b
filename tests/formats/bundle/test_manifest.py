import dataclasses
import json

import pytest
import xxhash
from format_builders import ASSETS, SPECS, manifest_of

from krasis.formats.bundle.manifest import AssetRecord, Manifest, canonical_json
from krasis.formats.bundle.shard_plan import plan_shards
from krasis.formats.errors import ChecksumError, FormatError, UnsupportedModelError, VersionError


@pytest.fixture(scope="module")
def manifest():
    assets = [AssetRecord(name, name + ".zst", 100, len(data), "0" * 32) for name, data in ASSETS.items()]
    return manifest_of(plan_shards(SPECS), {spec.name: "ab" * 16 for spec in SPECS}, assets)


def sealed(record):
    """Canonical bytes with a true checksum, whatever else is wrong."""
    body = {key: value for key, value in record.items() if key != "checksum"}
    text = json.dumps(body, sort_keys=True, indent=1).encode() + b"\n"
    digest = xxhash.xxh3_128_hexdigest(text)
    return json.dumps(body | {"checksum": digest}, sort_keys=True, indent=1).encode() + b"\n"


def test_round_trip(manifest):
    data = manifest.to_bytes()
    assert Manifest.from_bytes(data) == manifest
    assert Manifest.from_bytes(data).to_bytes() == data
    assert sealed(json.loads(data)) == data  # the specification's recipe, done independently


def test_bytes_are_canonical(manifest):
    data = manifest.to_bytes()
    assert data.isascii()
    assert data.endswith(b"}\n")
    assert list(json.loads(data)) == sorted(json.loads(data))
    recipe = {"z": 1, "a": {"y": 2, "b": 3}}
    other = dataclasses.replace(manifest, recipe=recipe)
    same = dataclasses.replace(manifest, recipe={"a": {"b": 3, "y": 2}, "z": 1})
    assert other.to_bytes() == same.to_bytes()


def test_a_flip_of_any_byte_is_found(manifest):
    data = manifest.to_bytes()
    for position in range(len(data)):
        altered = bytearray(data)
        altered[position] ^= 1
        with pytest.raises((FormatError, UnsupportedModelError)):
            Manifest.from_bytes(bytes(altered))


def test_white_space_is_part_of_the_form(manifest):
    with pytest.raises(FormatError, match="canonical"):
        Manifest.from_bytes(json.dumps(json.loads(manifest.to_bytes())).encode())


def test_altered_values_fail_the_checksum(manifest):
    with pytest.raises(ChecksumError, match="altered"):
        Manifest.from_bytes(manifest.to_bytes().replace(b'"0.0.test"', b'"0.1.test"'))


def test_a_newer_major_version_says_what_to_do(manifest):
    record = json.loads(manifest.to_bytes()) | {"format_major": 2, "tool_version": "9.9", "novel": []}
    with pytest.raises(VersionError, match=r"newer format.*format 2\.0.*'9\.9'.*limit format 1\.0.*upgrade"):
        Manifest.from_bytes(json.dumps(record).encode())  # not even canonical: the version comes first


def test_a_newer_minor_version_opens_unless_it_holds_something_unknown(manifest):
    record = json.loads(manifest.to_bytes()) | {"format_minor": 7}
    assert Manifest.from_bytes(sealed(record)).format_minor == 7
    with pytest.raises(VersionError, match="'novel'"):
        Manifest.from_bytes(sealed(record | {"novel": 1}))
    record["blobs"][0]["dtype"] = "F8_E8M0"
    with pytest.raises(VersionError, match=r"newer format.*unknown dtype"):
        Manifest.from_bytes(sealed(record))


def test_values_that_json_cannot_hold(manifest):
    for value in (float("nan"), float("inf"), object()):
        with pytest.raises(FormatError, match="cannot be written"):
            dataclasses.replace(manifest, quality={"x": value}).to_bytes()
    assert canonical_json({"a": "ä"}) == b'{\n "a": "\\u00e4"\n}\n'


def change(path, value):
    """An edit of the JSON record; ... removes."""

    def edit(record):
        *parents, last = path
        for key in parents:
            record = record[key]
        if value is ...:
            del record[last]
        else:
            record[last] = value

    return edit


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (["surprise"], 1, "unknown field.*'surprise'"),
        (["files"], ..., "missing.*'files'"),
        (["format"], "other", "not the manifest"),
        (["format_major"], "1", "version"),
        (["format_major"], True, "version"),
        (["format_major"], 0, "version"),
        (["format_minor"], -1, "version"),
        (["tool_version"], "x" * 2000, "tool_version"),
        (["architecture", "hidden_size"], "64", "hidden_size"),
        (["layouts", "disk"], "plain", "unknown tier"),
        (["layouts", "cpu"], 5, "layout id"),
        (["files", 0, "name"], "../x.safetensors", "plain name"),
        (["files", 0, "name"], "x.safetensors", "name of a shard"),
        (["files", 0, "num_bytes"], -1, "negative"),
        (["files", 0, "num_bytes"], 1.5, "integer"),
        (["files", 0, "header_bytes"], 0, "header"),
        (["files", 0, "header_bytes"], 1 << 40, "header"),
        (["files", 0, "header_xxh3_128"], "xyz", "digest"),
        (["files", 0, "extra"], 1, "other fields"),
        (["files", 1, "name"], "dense-000.safetensors", "occurs twice"),
        (["blobs"], {}, "list"),
        (["blobs", 0], 5, "other fields"),
        (["blobs", 0, "name"], "", "empty"),
        (["blobs", 1, "name"], "embedding", "occurs twice"),
        (["blobs", 0, "tier"], "gpu", "another tier"),
        (["blobs", 0, "file"], "dense-009.safetensors", "does not list"),
        (["blobs", 0, "dtype"], "I64", "unknown dtype"),
        (["blobs", 0, "shape"], [100, 65], "another size"),
        (["blobs", 0, "shape"], [1 << 40, 1 << 40], "overflow"),
        (["blobs", 0, "shape"], [-100, -64], "negative"),
        (["blobs", 0, "shape"], [1.0], "integers"),
        (["blobs", 0, "shape"], [1] * 9, "rank"),
        (["blobs", 0, "offset_bytes"], 100, "aligned"),
        (["blobs", 0, "offset_bytes"], 0, "overlap"),
        (["blobs", 0, "offset_bytes"], 1 << 62, "exceeds its file"),
        (["blobs", 0, "xxh3_128"], "0" * 31, "digest"),
        (["assets", 0, "file"], "other.zst", "file name"),
        (["assets", 0, "name"], "a/b", "plain name"),
        (["assets", 0, "decompressed_bytes"], 1 << 40, "too large"),
        (["assets", 0, "decompressed_bytes"], 5 << 20, "too large"),
        (["sources", 0, "num_bytes"], -5, "negative"),
        (["recipe"], [], "object"),
    ],
)
def test_unsound_manifests(manifest, path, value, complaint):
    record = json.loads(manifest.to_bytes())
    change(path, value)(record)
    with pytest.raises(FormatError, match=complaint) as caught:
        Manifest.from_bytes(sealed(record), "dir/manifest.json")
    assert str(caught.value).startswith("dir/manifest.json")
