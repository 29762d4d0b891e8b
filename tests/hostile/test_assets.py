"""Text files of a bundle that are bombs or damaged. The manifest is true to their bytes."""

import os
import struct

import pytest
import xxhash
import zstandard
from bundle_edits import edit_manifest

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import ChecksumError


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
    "bomb_that_hides_its_size": (
        zeros(500 << 20, write_content_size=False),
        1000,
        ["another size", "got -1"],
    ),
    "bomb_that_lies_about_its_size": (
        (lambda b: b[:6] + struct.pack("<I", 1000) + b[10:])(zeros(500 << 20)),
        1000,
        ["cannot be decompressed"],
    ),
    "asset_that_is_not_zstandard": (b"plain text", 10, ["cannot be decompressed"]),
    "asset_cut_short": (zstandard.compress(os.urandom(5000))[:-500], 5000, ["asset"]),
    "asset_empty": (b"", 0, ["cannot be decompressed"]),
    "asset_that_needs_a_gigabyte_window": (
        b"\x28\xb5\x2f\xfd" + b"\x80" + b"\xa0" + struct.pack("<I", 64) + b"\x01\x00\x00",
        64,
        ["cannot be decompressed"],
    ),
}


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
        refuses(
            lambda: opened.asset("tokenizer.json"), "altered", header_bytes=len(data), error=ChecksumError
        )


def test_asset_replaced_by_a_huge_file(bundle, refuses):
    os.truncate(bundle / "tokenizer.json.zst", 1 << 40)
    with Bundle.open(bundle) as opened:
        refuses(lambda: opened.asset("tokenizer.json"), "too large", header_bytes=0)
