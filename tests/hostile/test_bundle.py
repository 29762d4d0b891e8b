"""Bundles whose manifest or shards lie. Checksums are made true, so that only the lie itself can be noticed."""

import json
import os
import shutil
import struct

import pytest
import xxhash
import zstandard
from format_builders import tensor_entry

from krasis.formats.bundle_reader import Bundle
from krasis.formats.bundle_verify import verify_bundle
from krasis.formats.errors import ChecksumError, FormatError, UnsupportedModelError, VersionError

CPU = "cpu-000.safetensors"
DENSE = "dense-000.safetensors"


@pytest.fixture
def bundle(sound_bundle, tmp_path):
    return shutil.copytree(sound_bundle, tmp_path / "model.krasis")


def read_manifest(bundle):
    return json.loads((bundle / "manifest.json").read_text())


def write_manifest(bundle, record):
    """Canonical, checksum true."""
    body = {key: value for key, value in record.items() if key != "checksum"}
    dump = lambda value: json.dumps(value, sort_keys=True, indent=1).encode() + b"\n"  # noqa: E731
    (bundle / "manifest.json").write_bytes(dump(body | {"checksum": xxhash.xxh3_128_hexdigest(dump(body))}))


def edit_manifest(bundle, edit):
    record = read_manifest(bundle)
    edit(record)
    write_manifest(bundle, record)


def edit_shard_header(bundle, name, edit):
    """Replaces the JSON of a shard's header; length, padding and digest stay true."""
    path = bundle / name
    data = path.read_bytes()
    record = read_manifest(bundle)
    entry = next(file for file in record["files"] if file["name"] == name)
    size = entry["header_bytes"]
    header = json.loads(data[8:size])
    text = edit(header)
    text = (json.dumps(header).encode() if text is None else text).ljust(size - 8)
    new = struct.pack("<Q", len(text)) + text
    path.write_bytes(new[:size] + data[size:])
    entry["header_xxh3_128"] = xxhash.xxh3_128_hexdigest(new[:size])
    write_manifest(bundle, record)


def header_bytes(bundle):
    return (bundle / "manifest.json").stat().st_size + 3 * (2 << 20)


MANIFEST_CASES = {
    "file_named_as_a_path": (lambda m: m["files"][0].update(name="../../cpu-000.safetensors"), FormatError, ["not a plain name"]),
    "file_named_absolutely": (lambda m: m["files"][0].update(name="/etc/passwd"), FormatError, ["not a plain name"]),
    "file_named_as_the_manifest": (lambda m: m["files"][0].update(name="manifest.json"), FormatError, ["not the name of a shard"]),
    "asset_named_as_a_path": (lambda m: m["assets"][0].update(name="../x", file="../x.zst"), FormatError, ["not a plain name"]),
    "asset_that_is_a_shard": (lambda m: m["assets"][0].update(file=CPU), FormatError, ["unexpected file name"]),
    "file_of_negative_size": (lambda m: m["files"][0].update(num_bytes=-1), FormatError, ["negative"]),
    "file_of_exabytes": (lambda m: m["files"][0].update(num_bytes=1 << 62), FormatError, ["another size than the manifest says"]),
    "header_larger_than_its_file": (lambda m: m["files"][0].update(header_bytes=1 << 40), FormatError, ["impossible size of a header"]),
    "blob_of_overflowing_shape": (lambda m: m["blobs"][0].update(shape=[1 << 33, 1 << 33]), FormatError, ["overflows"]),
    "blob_beyond_its_file": (lambda m: m["blobs"][0].update(offset_bytes=1 << 50), FormatError, ["exceeds its file"]),
    "blob_inside_the_header": (lambda m: m["blobs"][0].update(offset_bytes=0), FormatError, ["overlap"]),
    "blobs_that_overlap": (lambda m: m["blobs"][1].update(offset_bytes=m["blobs"][0]["offset_bytes"]), FormatError, ["overlap"]),
    "blob_in_no_file": (lambda m: m["blobs"][0].update(file="dense-777.safetensors"), FormatError, ["does not list"]),
    "blob_of_another_dtype": (lambda m: m["blobs"][0].update(dtype="F16"), FormatError, ["disagree", "'embedding'"]),
    "blob_of_another_shape": (lambda m: m["blobs"][0].update(shape=[64, 100]), FormatError, ["disagree", "'embedding'"]),
    "blob_left_out": (lambda m: m["blobs"].pop(0), FormatError, ["the manifest does not list", "'embedding'"]),
    "blob_invented": (
        lambda m: m["blobs"].append(m["blobs"][0] | {"name": "ghost", "offset_bytes": 24576, "shape": [1], "num_bytes": 2}),
        FormatError,
        ["lacks a blob", "'ghost'"],
    ),
    "blob_twice": (lambda m: m["blobs"].append(m["blobs"][0]), FormatError, ["occurs twice"]),
    "format_of_the_future": (lambda m: m.update(format_major=2), VersionError, ["newer format", "upgrade"]),
    "unknown_field": (lambda m: m.update(hooks=["evil"]), FormatError, ["unknown field", "'hooks'"]),
    "asset_bomb_declared": (lambda m: m["assets"][0].update(decompressed_bytes=1 << 50), FormatError, ["would be too large"]),
    "architecture_of_absurd_size": (lambda m: m["architecture"].update(num_layers=1 << 40), FormatError, ["num_layers"]),
    "architecture_unknown": (lambda m: m["architecture"].update(model_type="evil"), UnsupportedModelError, ["'evil'", "qwen3_moe"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MANIFEST_CASES)
def test_lying_manifests(case, bundle, refuses):
    edit, error, parts = MANIFEST_CASES[case]
    edit_manifest(bundle, edit)
    refuses(lambda: Bundle.open(bundle), *parts, header_bytes=header_bytes(bundle), error=error)


MANIFEST_BYTES = {
    "manifest_empty": (b"", FormatError, ["not valid JSON"]),
    "manifest_is_a_list": (b"[]\n", FormatError, ["must be an object"]),
    "manifest_nested_deeply": (b'{"recipe":' * 100_000, FormatError, ["nested too deeply"]),
    "manifest_wide": (b"[" + b"{}," * 1_000_000, FormatError, ["too many objects"]),
    "manifest_of_another_program": (b'{"format": "other"}\n', FormatError, ["not the manifest of a bundle"]),
    "manifest_with_infinite_version": (b'{"format": "krasis-bundle", "format_major": Infinity}', FormatError, ["Infinity"]),
    "manifest_checksum_not_text": (None, ChecksumError, ["altered"]),
}


@pytest.mark.parametrize("case", MANIFEST_BYTES)
def test_malformed_manifests(case, bundle, refuses):
    data, error, parts = MANIFEST_BYTES[case]
    if data is None:
        data = json.dumps(read_manifest(bundle) | {"checksum": [1]}, sort_keys=True, indent=1).encode() + b"\n"
    (bundle / "manifest.json").write_bytes(data)
    refuses(lambda: Bundle.open(bundle), *parts, header_bytes=len(data), error=error)


def rename_entry(header, old, new):
    header[new] = header.pop(old)


SHARD_CASES = {
    "shard_header_is_not_json": (CPU, lambda h: b"{" + b"x" * 1000, ["not valid JSON"]),
    "shard_renames_a_blob": (CPU, lambda h: rename_entry(h, "layers.0.experts.cpu", "other"), ["'other'", "manifest does not list"]),
    "shard_hides_a_blob_as_padding": (CPU, lambda h: rename_entry(h, "layers.0.experts.cpu", "_padding.7"), ["lacks a blob"]),
    "shard_swaps_two_blobs": (
        CPU,
        lambda h: (h.update({"layers.0.experts.cpu": h["layers.1.experts.cpu"], "layers.1.experts.cpu": h["layers.0.experts.cpu"]}), None)[1],
        ["disagree"],
    ),
    "shard_changes_a_dtype": (DENSE, lambda h: h["embedding"].update(dtype="F16"), ["disagree", "'embedding'"]),
    "shard_with_overlapping_tensors": (
        DENSE,
        lambda h: h.update({"_padding.9": tensor_entry("U8", [16], 0, 16)}),
        ["overlap"],
    ),
    "shard_padding_of_another_dtype": (
        DENSE,
        lambda h: h["_padding.0"].update(dtype="I8"),
        ["'_padding.0'", "manifest does not list"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SHARD_CASES)
def test_lying_shards(case, bundle, refuses):
    name, edit, parts = SHARD_CASES[case]
    edit_shard_header(bundle, name, edit)
    refuses(lambda: Bundle.open(bundle), *parts, header_bytes=header_bytes(bundle))


def test_shard_header_length_disagrees_with_the_manifest(bundle, refuses):
    path = bundle / DENSE
    data = bytearray(path.read_bytes())
    data[:8] = struct.pack("<Q", 16)
    path.write_bytes(data)
    record = read_manifest(bundle)
    entry = next(file for file in record["files"] if file["name"] == DENSE)
    entry["header_xxh3_128"] = xxhash.xxh3_128_hexdigest(data[: entry["header_bytes"]])
    write_manifest(bundle, record)
    refuses(lambda: Bundle.open(bundle), "header has another size", "got 24", header_bytes=header_bytes(bundle))


def test_shard_header_altered(bundle, refuses):
    path = bundle / CPU
    data = bytearray(path.read_bytes())
    data[1_000_000] ^= 1  # in the spaces behind the JSON
    path.write_bytes(data)
    refuses(lambda: Bundle.open(bundle), "header was altered", header_bytes=header_bytes(bundle), error=ChecksumError)


def test_shard_truncated(bundle, refuses):
    os.truncate(bundle / CPU, 3 << 20)
    refuses(lambda: Bundle.open(bundle), "got 3145728 bytes", "incomplete", header_bytes=header_bytes(bundle))


def test_shard_missing(bundle, refuses):
    (bundle / CPU).unlink()
    refuses(lambda: Bundle.open(bundle), CPU, "missing", header_bytes=header_bytes(bundle))


# ---- tricks of the file system -----------------------------------------------------------------------------


def replace_by_link(path, target):
    path.unlink()
    path.symlink_to(target)


def replace_by_fifo(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_directory(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ["manifest.json", CPU])
def test_link_in_place_of_a_file(bundle, refuses, tmp_path, name):
    copy = shutil.copy(bundle / name, tmp_path / "elsewhere")  # even a link to the very same bytes
    replace_by_link(bundle / name, copy)
    refuses(lambda: Bundle.open(bundle), name, "not a regular file", "link", header_bytes=header_bytes(bundle))


@pytest.mark.parametrize("name", ["manifest.json", CPU])
def test_fifo_in_place_of_a_file_does_not_block(bundle, refuses, name):
    replace_by_fifo(bundle / name)
    refuses(lambda: Bundle.open(bundle), name, "not a regular file", "FIFO", header_bytes=header_bytes(bundle))


@pytest.mark.parametrize("name", ["manifest.json", CPU])
def test_directory_in_place_of_a_file(bundle, refuses, name):
    replace_by_directory(bundle / name)
    refuses(lambda: Bundle.open(bundle), name, "not a regular file", "directory", header_bytes=header_bytes(bundle))


def test_link_in_place_of_an_asset(bundle, refuses):
    replace_by_link(bundle / "tokenizer.json.zst", "/etc/passwd")
    with Bundle.open(bundle) as opened:
        refuses(lambda: opened.asset("tokenizer.json"), "not a regular file", "link", header_bytes=0)


def test_fifo_in_place_of_an_asset_is_a_problem_for_verify(bundle):
    replace_by_fifo(bundle / "tokenizer.json.zst")
    (problem,) = verify_bundle(bundle)
    assert "FIFO" in problem.what


def test_manifest_of_a_terabyte(bundle, refuses):
    os.truncate(bundle / "manifest.json", 1 << 40)
    refuses(lambda: Bundle.open(bundle), "manifest.json", "too large", header_bytes=0)


# ---- assets ------------------------------------------------------------------------------------------------


def put_asset(bundle, packed, decompressed_bytes):
    """Replaces tokenizer.json by any bytes, the manifest's record true to them."""
    (bundle / "tokenizer.json.zst").write_bytes(packed)

    def edit(manifest):
        entry = next(item for item in manifest["assets"] if item["name"] == "tokenizer.json")
        digest = xxhash.xxh3_128_hexdigest(packed)
        entry.update(num_bytes=len(packed), decompressed_bytes=decompressed_bytes, xxh3_128=digest)

    edit_manifest(bundle, edit)


def zeros(num_bytes, **options):
    return zstandard.ZstdCompressor(**options).compress(bytes(num_bytes))


ASSETS = {
    "bomb_that_declares_its_size": (zeros(500 << 20), 1000, ["another size", f"got {500 << 20}"]),
    "bomb_that_hides_its_size": (zeros(500 << 20, write_content_size=False), 1000, ["another size", "got -1"]),
    "bomb_that_lies_about_its_size": ((lambda b: b[:6] + struct.pack("<I", 1000) + b[10:])(zeros(500 << 20)), 1000, ["cannot be decompressed"]),
    "asset_that_is_not_zstandard": (b"plain text", 10, ["cannot be decompressed"]),
    "asset_cut_short": (zstandard.compress(os.urandom(5000))[:-500], 5000, ["asset"]),
    "asset_empty": (b"", 0, ["cannot be decompressed"]),
    "asset_that_needs_a_gigabyte_window": (b"\x28\xb5\x2f\xfd" + b"\x80" + b"\xa0" + struct.pack("<I", 64) + b"\x01\x00\x00", 64, ["cannot be decompressed"]),
}  # fmt: skip


@pytest.mark.parametrize("case", ASSETS)
def test_hostile_assets(case, bundle, refuses):
    packed, size, parts = ASSETS[case]
    put_asset(bundle, packed, size)
    with Bundle.open(bundle) as opened:
        refuses(lambda: opened.asset("tokenizer.json"), *parts, header_bytes=len(packed))


def test_asset_altered(bundle, refuses):
    path = bundle / "tokenizer.json.zst"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with Bundle.open(bundle) as opened:
        refuses(lambda: opened.asset("tokenizer.json"), "altered", header_bytes=len(data), error=ChecksumError)


def test_asset_replaced_by_a_huge_file(bundle, refuses):
    os.truncate(bundle / "tokenizer.json.zst", 1 << 40)
    with Bundle.open(bundle) as opened:
        refuses(lambda: opened.asset("tokenizer.json"), "too large", header_bytes=0)
