"""Shards that lie, and tricks of the file system."""

import os
import shutil
import struct

import pytest
import xxhash
from bundle_edits import edit_shard_header, header_bytes, read_manifest, write_manifest
from format_builders import tensor_entry

from krasis.formats.bundle.reader import Bundle
from krasis.formats.bundle.verify import verify_bundle
from krasis.formats.errors import ChecksumError, FormatError

CPU = "cpu-000.safetensors"
DENSE = "dense-000.safetensors"


def rename_entry(header, old, new):
    header[new] = header.pop(old)


SHARD_CASES = {
    "shard_header_is_not_json": (CPU, lambda h: b"{" + b"x" * 1000, ["not valid JSON"]),
    "shard_renames_a_blob": (
        CPU,
        lambda h: rename_entry(h, "layers.0.experts.cpu", "other"),
        ["'other'", "manifest does not list"],
    ),
    "shard_hides_a_blob_as_padding": (
        CPU,
        lambda h: rename_entry(h, "layers.0.experts.cpu", "_padding.7"),
        ["lacks a blob"],
    ),
    "shard_swaps_two_blobs": (
        CPU,
        lambda h: (
            h.update(
                {
                    "layers.0.experts.cpu": h["layers.1.experts.cpu"],
                    "layers.1.experts.cpu": h["layers.0.experts.cpu"],
                }
            ),
            None,
        )[1],
        ["disagree"],
    ),
    "shard_changes_a_dtype": (
        DENSE,
        lambda h: h["embedding"].update(dtype="F16"),
        ["disagree", "'embedding'"],
    ),
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
}


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
    refuses(
        lambda: Bundle.open(bundle), "header has another size", "got 24", header_bytes=header_bytes(bundle)
    )


def test_shard_header_altered(bundle, refuses):
    path = bundle / CPU
    data = bytearray(path.read_bytes())
    data[1_000_000] ^= 1  # in the spaces behind the JSON
    path.write_bytes(data)
    refuses(
        lambda: Bundle.open(bundle),
        "header was altered",
        header_bytes=header_bytes(bundle),
        error=ChecksumError,
    )


@pytest.mark.parametrize("more", [-1, -(10**9), 1], ids=["a byte less", "nothing left", "a byte more"])
def test_shard_that_changes_its_size_after_opening(bundle, more):
    name = CPU
    size = (bundle / name).stat().st_size
    with Bundle.open(bundle) as opened:
        blob = next(blob for blob in opened.manifest.blobs if blob.file == name)
        os.truncate(bundle / name, max(0, size + more))
        with pytest.raises(FormatError, match="another size than the manifest says") as caught:
            opened.map(blob.name)
        with pytest.raises(FormatError):
            opened.mapping_of(name)
        assert caught.value.where == str(bundle / name)
        assert (caught.value.got, caught.value.limit) == (f"{max(0, size + more)} bytes", f"{size} bytes")
        assert "changed while the bundle was open" in caught.value.hint
        whole = next(blob for blob in opened.manifest.blobs if blob.file != name)
        assert opened.map(whole.name).nbytes == whole.num_bytes  # other shards are as they were


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
    refuses(
        lambda: Bundle.open(bundle), name, "not a regular file", "link", header_bytes=header_bytes(bundle)
    )


@pytest.mark.parametrize("name", ["manifest.json", CPU])
def test_fifo_in_place_of_a_file_does_not_block(bundle, refuses, name):
    replace_by_fifo(bundle / name)
    refuses(
        lambda: Bundle.open(bundle), name, "not a regular file", "FIFO", header_bytes=header_bytes(bundle)
    )


@pytest.mark.parametrize("name", ["manifest.json", CPU])
def test_directory_in_place_of_a_file(bundle, refuses, name):
    replace_by_directory(bundle / name)
    refuses(
        lambda: Bundle.open(bundle),
        name,
        "not a regular file",
        "directory",
        header_bytes=header_bytes(bundle),
    )


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
