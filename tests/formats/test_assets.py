import os

import pytest
import zstandard

from krasis.formats.bundle.assets import compress_asset, decompress_asset
from krasis.formats.errors import FormatError


@pytest.mark.parametrize(
    "data", [b"", b"x", b"tokens " * 100_000, os.urandom(3_000_000)], ids=["empty", "one", "text", "random"]
)
def test_round_trip(data):
    packed = compress_asset(data, "x")
    assert decompress_asset(packed, len(data), "x") == data
    assert zstandard.decompress(packed) == data
    assert compress_asset(data, "x") == packed


def test_a_wrong_size_is_refused():
    packed = compress_asset(b"hello", "x")
    for size in (4, 6):
        with pytest.raises(FormatError, match=f"got 5; limit {size}"):
            decompress_asset(packed, size, "x")


def test_what_shrinks_like_a_bomb_is_not_written_either():
    with pytest.raises(FormatError, match="too much to be text"):
        compress_asset(bytes(50_000_000), "zeros.txt")
