"""Checked sizes and the bounds that every parser of this package obeys.

Python integers do not overflow, but the numbers end up in file offsets, in NumPy and in C: every product or
sum of sizes that come from a file goes through here, so that an absurd number is refused where it is read.
"""

from __future__ import annotations

from collections.abc import Iterable

from krasis.formats.errors import FormatError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

MAX_SIZE = (1 << 63) - 1  # file offsets are signed 64-bit
MAX_HEADER_BYTES = (
    100_000_000  # of a safetensors or GGUF header; the reference safetensors reader has the same bound
)
MAX_MANIFEST_BYTES = 8 * MIB  # some 25,000 blobs; the largest models have a few thousand
# Of the parts of a manifest that any program may write what it likes into: recipe and quality, each.
MAX_REMARK_VALUES = 20_000
MAX_REMARK_CHARACTERS = MIB
MAX_CONFIG_BYTES = 4 * MIB
MAX_INDEX_BYTES = 64 * MIB
MAX_ASSET_BYTES = 256 * MIB  # decompressed
MAX_ASSET_EXPANSION = 1024  # decompressed bytes per stored byte, beyond the first MiB
MAX_JSON_DEPTH = 32
MAX_TENSORS = 2_000_000
MAX_RANK = 8
MAX_NAME_BYTES = 512  # of a tensor or blob
MAX_FILE_NAME_BYTES = 255
MAX_FILES = 100_000

HUGE_PAGE_BYTES = 2 * MIB
PAGE_BYTES = 4 * KIB


def checked_mul(factors: Iterable[int], where: str, limit: int = MAX_SIZE) -> int:
    """The product of non-negative sizes. FormatError if a factor is negative or the product exceeds
    ``limit``.
    """
    product = 1
    for factor in factors:
        if factor < 0:
            raise FormatError("size is negative", where=where, got=factor)
        product *= factor
        if product > limit:
            # A later factor of 0 does not make this sound: the dimensions themselves are absurd.
            raise FormatError("size overflows", where=where, got=_short(product), limit=limit)
    return product


def checked_add(terms: Iterable[int], where: str, limit: int = MAX_SIZE) -> int:
    """The sum of non-negative sizes. FormatError if a term is negative or the sum exceeds ``limit``."""
    total = 0
    for term in terms:
        if term < 0:
            raise FormatError("size is negative", where=where, got=term)
        total += term
        if total > limit:
            raise FormatError("size overflows", where=where, got=_short(total), limit=limit)
    return total


def align_up(size: int, alignment: int) -> int:
    """The smallest multiple of ``alignment`` (any positive integer) that is not below ``size``."""
    return -(-size // alignment) * alignment


def _short(number: int) -> str:
    """A number for a message; huge ones by their length: printing them may be slow or refused."""
    return str(number) if number.bit_length() <= 256 else f"a number of {number.bit_length()} bits"
