"""Text files inside a bundle: zstandard, one frame, with a bound on what comes out."""

from __future__ import annotations

import zstandard

from krasis.formats.bundle.manifest_records import max_asset_bytes
from krasis.formats.errors import FormatError
from krasis.formats.limits import MAX_ASSET_BYTES

_LEVEL = 19
_MAX_WINDOW_BYTES = 128 << 20
_CHUNK_BYTES = 1 << 16


def compress_asset(data: bytes, where: str) -> bytes:
    """One frame, with the content's size and a checksum. FormatError if the text could not be read back."""
    if len(data) > MAX_ASSET_BYTES:
        raise FormatError(
            "text file is too large", where=where, got=f"{len(data)} bytes", limit=MAX_ASSET_BYTES
        )
    packed = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True, write_content_size=True).compress(
        data
    )
    if len(data) > max_asset_bytes(len(packed)):
        raise FormatError(
            "text file shrinks too much to be text",
            where=where,
            got=f"{len(data)} bytes to {len(packed)}",
            limit=f"{max_asset_bytes(len(packed))} bytes",
        )
    return packed


def decompress_asset(packed: bytes, num_bytes: int, where: str) -> bytes:
    """Exactly ``num_bytes`` from one frame. FormatError otherwise; never makes more than that and a chunk."""
    parts: list[bytes] = []
    total = 0
    try:
        declared = zstandard.frame_content_size(packed)
        if declared != num_bytes:
            raise FormatError(
                "asset has another size than the manifest says", where=where, got=declared, limit=num_bytes
            )
        reader = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).stream_reader(packed)
        while total <= num_bytes and (part := reader.read(_CHUNK_BYTES)):
            parts.append(part)
            total += len(part)
    except zstandard.ZstdError as error:
        raise FormatError("asset cannot be decompressed", where=where, got=error) from error
    if total != num_bytes:
        raise FormatError("asset has another size than it says", where=where, got=total, limit=num_bytes)
    return b"".join(parts)
