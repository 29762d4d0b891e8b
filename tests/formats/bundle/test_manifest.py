import dataclasses
import json
from pathlib import Path

import pytest
import xxhash
from format_builders import ASSETS, SPECS, manifest_of

from krasis.formats.bundle.manifest import AssetRecord, Manifest, canonical_json
from krasis.formats.bundle.shard_plan import plan_shards
from krasis.formats.checkpoints.hf_config import read_hf_config
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
    record = json.loads(manifest.to_bytes()) | {
        "format_major": 2,
        "format_minor": 0,
        "tool_version": "9.9",
        "novel": [],
    }
    with pytest.raises(VersionError, match=r"newer format.*format 2\.0.*'9\.9'.*limit format 1\.2.*upgrade"):
        Manifest.from_bytes(json.dumps(record).encode())  # not even canonical: the version comes first


def test_a_newer_minor_version_opens_unless_it_holds_something_unknown(manifest):
    record = json.loads(manifest.to_bytes()) | {"format_minor": 7}
    assert Manifest.from_bytes(sealed(record)).format_minor == 7
    with pytest.raises(VersionError, match="'novel'"):
        Manifest.from_bytes(sealed(record | {"novel": 1}))
    record["blobs"][0]["dtype"] = "F8_E8M0"
    with pytest.raises(VersionError, match=r"newer format.*unknown dtype"):
        Manifest.from_bytes(sealed(record))


def as_1_0(manifest):
    """The record that a writer of format 1.0 made of the same bundle."""
    record = json.loads(manifest.to_bytes()) | {"format_minor": 0}
    del record["model"]
    return record | {"architecture": manifest.architecture.to_json()}


def test_format_1_0_is_read_as_the_same_model_and_kept(manifest):
    data = sealed(as_1_0(manifest))
    old = Manifest.from_bytes(data)
    assert (old.format_minor, old.spec, old.architecture) == (0, manifest.spec, manifest.architecture)
    assert old.to_bytes() == data
    assert dataclasses.replace(old, recipe={}).format_minor == 0


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (["model"], {}, "unknown field.*'model'"),
        (["architecture"], ..., "missing.*'architecture'"),
        (["architecture", "hidden_size"], "64", "hidden_size"),
        (["architecture", "num_layers"], 10**9, "num_layers"),
        (["architecture", "rope_scaling"], None, "rope_scaling"),
    ],
)
def test_unsound_manifests_of_format_1_0(manifest, path, value, complaint):
    record = as_1_0(manifest)
    change(path, value)(record)
    with pytest.raises(FormatError, match=complaint) as caught:
        Manifest.from_bytes(sealed(record), "dir/manifest.json")
    assert str(caught.value).startswith("dir/manifest.json")


@pytest.mark.parametrize(
    "name", ["glm-4.5-air", "mixtral-8x7b", "olmoe-1b-7b", "deepseek-v3", "qwen3-next-80b-a3b"]
)
def test_every_model_goes_in_and_out(manifest, name):
    path = Path(__file__).parents[1] / "models" / "configs" / f"{name}.json"
    spec = read_hf_config(json.loads(path.read_text("utf-8")), name)
    changed = dataclasses.replace(manifest, spec=spec)
    assert Manifest.from_bytes(changed.to_bytes()) == changed
    with pytest.raises(UnsupportedModelError):  # a flat record cannot say what it is
        _ = changed.architecture
    with pytest.raises(UnsupportedModelError):
        dataclasses.replace(changed, format_minor=0).to_bytes()


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
        (["model", "hidden"], "64", r"model\.hidden|ModelSpec\.hidden"),
        (["model", "hidden"], ..., "model.*'?hidden'?"),
        (["model", "hidden"], 1 << 40, "out of range"),
        (["model", "surprise"], 1, "unknown field"),
        (["model", "tied"], False, "canonical form"),  # its default
        (["model", "pattern"], [0] * 20_000, "out of range"),
        (["model", "pattern", 0], 7, "no such layer"),
        (["model", "pattern", 0], True, "no such layer"),
        (["model", "layers"], [], "out of range"),
        (["model", "layers", 0, "mixer", "kind"], "magic", "unknown kind"),
        (["model", "layers", 0, "mixer", "kv_heads"], 3, "evenly"),
        (["model", "layers", 0, "mlp", "router", "top_k"], 100, "more experts"),
        (["model"], ..., "missing.*'model'"),
        (["model"], [], "object"),
        (["architecture"], {}, "unknown field.*'architecture'"),
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
