"""A bundle of a few kilobytes and a cache without a model behind it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "formats" / "support"))

import format_builders

from krasis.formats.bundle.reader import Bundle

NUMPY = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32}


class StubCache:
    """What saving and restoring use of a backend. keys, values: [num_layers, num_kv_heads, capacity,
    head_dim].
    """

    description = "a stub"

    def __init__(self, architecture: Any, capacity: int, kv_dtype: str, seed: int | None = None) -> None:
        shape = (architecture.num_layers, architecture.num_kv_heads, capacity, architecture.head_dim)
        self.capacity, self.kv_dtype = capacity, kv_dtype
        random = np.random.default_rng(seed)
        parts = [random.standard_normal(shape) if seed is not None else np.zeros(shape) for _ in range(2)]
        self.keys, self.values = (self.encode(part, NUMPY[kv_dtype]) for part in parts)
        self.largest_bytes = 0

    @staticmethod
    def encode(part: np.ndarray, dtype: type) -> np.ndarray:
        if dtype is np.uint16:
            return (part.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return part.astype(dtype)

    @property
    def state(self) -> StubCache:
        return self

    def export(self, slot: int, layer: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        assert slot == 0
        pair = tuple(np.ascontiguousarray(one[layer, :, :num_tokens]) for one in (self.keys, self.values))
        self.largest_bytes = max(self.largest_bytes, sum(one.nbytes for one in pair))
        return pair

    def import_(self, slot: int, layer: int, keys: np.ndarray, values: np.ndarray) -> None:
        assert slot == 0
        self.keys[layer, :, : keys.shape[1]] = keys
        self.values[layer, :, : keys.shape[1]] = values


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(format_builders.write_bundle(tmp_path_factory.mktemp("small") / "model.krasis"))


@pytest.fixture
def stub_cache(small_bundle: Bundle) -> Callable[..., StubCache]:
    """(capacity, kv_dtype, seed) -> a cache of the small bundle's shape; seed None: zeros."""

    def make(capacity: int = 20, kv_dtype: str = "f16", seed: int | None = None) -> StubCache:
        return StubCache(small_bundle.architecture, capacity, kv_dtype, seed)

    return make
