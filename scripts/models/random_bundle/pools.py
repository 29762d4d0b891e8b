"""Random bytes of every kind of section, drawn once: a blob's are runs of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from krasis.formats.layouts import CpuTileLayout, mxfp4
from krasis.formats.layouts.cpu_tiles import TILE_BYTES, TILE_ROWS
from scripts.models.model_files import to_bf16
from scripts.models.random_bundle.request import BundleRequest

Bytes = npt.NDArray[np.uint8]

SCALE_NOISE = 0.2
# Root mean squares of uniform codes -7..7 and -127..127.
RMS_4, RMS_8 = float(np.sqrt(280 / 15)), float(np.sqrt(127 * 128 / 3))
RMS_FP4 = float(np.sqrt(np.square(mxfp4.VALUES[1:]).mean()))  # of the codes 1..15 alike


class Pool:
    """Random bytes of one kind, of which runs are taken. unit_bytes: what runs are made of."""

    def __init__(self, data: Bytes, unit_bytes: int, seed: int, kind: str) -> None:
        self._data, self._unit, self._key = data.reshape(-1).data, unit_bytes, f"{seed}\0{kind}\0"
        self._num_units = data.nbytes // unit_bytes

    def run(self, name: str, num_bytes: int) -> Iterator[memoryview]:
        """num_bytes (a multiple of the unit) from places that depend on the name alone, in pieces."""
        count = num_bytes // self._unit
        for piece in range(1 << 62):
            if count <= 0:
                return
            digest = hashlib.blake2b(f"{self._key}{name}\0{piece}".encode(), digest_size=8).digest()
            begin = int.from_bytes(digest, "little") % self._num_units
            taken = min(count, self._num_units - begin)
            yield self._data[begin * self._unit : (begin + taken) * self._unit]
            count -= taken


class Pools:
    """Every kind of section that a bundle of one shape needs, drawn at the first use."""

    def __init__(self, request: BundleRequest) -> None:
        self._request = request
        self._made: dict[str, Pool] = {}

    def get(self, kind: str, unit_bytes: int, draw: Callable[[np.random.Generator, int], Bytes]) -> Pool:
        """The pool of a kind. draw(random, count): uint8 [count * unit_bytes]."""
        if kind not in self._made:
            key = hashlib.blake2b(f"{self._request.seed}\0{kind}".encode(), digest_size=16).digest()
            random = np.random.Generator(np.random.SFC64(int.from_bytes(key, "little")))
            count = max(1, self._request.pool_bytes // unit_bytes)
            self._made[kind] = Pool(draw(random, count), unit_bytes, self._request.seed, kind)
        return self._made[kind]

    def codes4(self) -> Pool:
        """Two 4-bit codes a byte, 1..15: -7..7 with the layout's offset of 8."""

        def draw(random: np.random.Generator, count: int) -> Bytes:
            low, high = (random.integers(1, 16, count, dtype=np.uint8) for _ in range(2))
            return low | high << 4

        return self.get("codes4", 1, draw)

    def codes8(self) -> Pool:
        """int8 codes -127..127."""
        return self.get(
            "codes8", 1, lambda random, count: random.integers(-127, 128, count, dtype=np.int8).view(np.uint8)
        )

    def scales(self, dtype: str, rms: float, std: float) -> Pool:
        """Scales that give codes of a root mean square weights of a standard deviation."""

        def draw(random: np.random.Generator, count: int) -> Bytes:
            return as_bytes(scale_values(random, count, rms, std), dtype)

        return self.get(f"scales-{dtype}-{rms}-{std}", 4 if dtype == "F32" else 2, draw)

    def exponents(self, std: float) -> Pool:
        """Scales of MXFP4 for weights of a standard deviation."""

        def draw(random: np.random.Generator, count: int) -> Bytes:
            return exponents_of(scale_values(random, count, RMS_FP4, std))

        return self.get(f"exponents-{std}", 1, draw)

    def tiles(self, layout: CpuTileLayout, std: float) -> Pool:
        """Whole tiles of CPU experts: 32 x 32 codes, then 32 scales."""
        is_q8, is_fp4 = layout.tiles == "q8", layout.tiles == "mxfp4"
        tile_bytes = TILE_BYTES[layout.tiles]
        code_bytes = tile_bytes - (1 if is_fp4 else 2) * TILE_ROWS

        def draw(random: np.random.Generator, count: int) -> Bytes:
            tiles = np.empty((count, tile_bytes), np.uint8)
            codes = self.codes8() if is_q8 else self.codes4()
            filled = b"".join(codes.run(f"tiles-{std}", count * code_bytes))
            tiles[:, :code_bytes] = np.frombuffer(filled, np.uint8).reshape(count, code_bytes)
            if is_fp4:
                scales = scale_values(random, count * TILE_ROWS, RMS_FP4, std)
                tiles[:, code_bytes:] = exponents_of(scales).reshape(count, -1)
                return tiles
            scales = scale_values(random, count * TILE_ROWS, RMS_8 if is_q8 else RMS_4, std)
            tiles[:, code_bytes:] = as_bytes(scales, "F16").reshape(count, -1)
            return tiles

        return self.get(f"tiles-{layout.tiles}-{std}", tile_bytes, draw)


def exponents_of(scales: npt.NDArray[np.float32]) -> Bytes:
    """The powers of two that are nearest, as MXFP4 has them."""
    return (np.rint(np.log2(scales)) + 127).astype(np.uint8)


def scale_values(random: np.random.Generator, count: int, rms: float, std: float) -> npt.NDArray[np.float32]:
    """f32 [count], log-normal around what gives weights of that standard deviation."""
    spread = np.exp(np.float32(SCALE_NOISE) * random.standard_normal(count, dtype=np.float32))
    return spread * np.float32(np.exp(-(SCALE_NOISE**2)) * std / rms)


def as_bytes(values: npt.NDArray[np.float32], dtype: str) -> Bytes:
    """Values in a bundle's dtype, as bytes."""
    if dtype == "BF16":
        return to_bf16(values).view(np.uint8)
    return values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).view(np.uint8)
