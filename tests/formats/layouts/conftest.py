"""Pools of every instruction set this machine has, weights with a seed, and packing into fresh arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.formats.errors import NativeError
from krasis.formats.layouts import MatrixView, PackStats, float32_to_bf16, native_pack
from krasis.formats.layouts.cpu_tiles import TILE_BYTES
from krasis.formats.native import Pool

GOLDEN = Path(__file__).parents[2] / "assets" / "golden" / "golden_marlin.npz"


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN, allow_pickle=False) as arrays:
        return dict(arrays)


def _pool(isa: str, num_threads: int = 1) -> Pool:
    try:
        return Pool(num_threads, isa)
    except NativeError as error:
        pytest.skip(f"{isa}: {error}")


@pytest.fixture(scope="session", params=["avx2", "avx512_vnni"])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    with _pool(request.param) as found:
        yield found


@pytest.fixture(scope="session")
def both_pools() -> Iterator[tuple[Pool, Pool]]:
    with _pool("avx2") as first, _pool("avx512_vnni", 2) as second:
        yield first, second


@pytest.fixture(scope="session")
def view() -> Callable[..., MatrixView]:
    """view(float array [n, k], dtype): the array rounded to that dtype."""

    def build(values: Any, dtype: str = "BF16") -> MatrixView:
        floats = np.ascontiguousarray(values, np.float32)
        if dtype == "BF16":
            return MatrixView(float32_to_bf16(floats), dtype)
        return MatrixView(floats.astype(np.float16) if dtype == "F16" else floats, dtype)

    return build


@pytest.fixture(scope="session")
def weights() -> Callable[..., np.ndarray]:
    """weights(n, k, kind, seed): float32 weights of sigma 0.02, ``gauss``, ``laplace`` or ``t3``."""

    def draw(n: int, k: int, kind: str = "gauss", seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        samples = {
            "gauss": lambda: rng.standard_normal((n, k)),
            "laplace": lambda: rng.laplace(size=(n, k)),
            "t3": lambda: rng.standard_t(3, (n, k)),
        }[kind]()
        return (samples * 0.02).astype(np.float32)

    return draw


@pytest.fixture(scope="session")
def marlin() -> Callable[..., tuple[np.ndarray, np.ndarray, PackStats]]:
    """marlin(pool, matrix, bits, group, scale_dtype): words, permuted scale bits, statistics."""

    def pack(
        pool: Pool,
        matrix: MatrixView,
        bits: int = 4,
        group: int = 128,
        scale_dtype: str = "BF16",
        **more: Any,
    ) -> tuple[np.ndarray, np.ndarray, PackStats]:
        words = np.full((matrix.k // 16, matrix.n * bits // 2), 0xA5A5A5A5, np.uint32)
        scales = np.full((matrix.k // group, matrix.n), 0xA5A5, np.uint16)
        stats = native_pack.pack_marlin(
            pool, matrix, words, scales, bits=bits, group=group, scale_dtype=scale_dtype, **more
        )
        return words, scales, stats

    return pack


@pytest.fixture(scope="session")
def tiled() -> Callable[..., tuple[np.ndarray, PackStats]]:
    """tiled(pool, matrix, tiles): tiles uint8 [n/32, k/32, tile bytes] and statistics."""

    def pack(pool: Pool, matrix: MatrixView, tiles: str, **more: Any) -> tuple[np.ndarray, PackStats]:
        tile_bytes = TILE_BYTES[tiles]
        out = np.full(matrix.n // 32 * (matrix.k // 32) * tile_bytes, 0xA5, np.uint8)
        stats = native_pack.pack_cpu_tiles(pool, matrix, out, tiles=tiles, **more)
        return out.reshape(matrix.n // 32, matrix.k // 32, tile_bytes), stats

    return pack
