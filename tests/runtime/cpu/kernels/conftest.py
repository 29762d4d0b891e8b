"""Pools of both instruction sets, and buffers in which a write out of bounds shows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from krasis.formats.errors import NativeError
from krasis.formats.native import Pool
from krasis.runtime.cpu.kernels import Kernels

sys.path.insert(0, str(Path(__file__).parent / "support"))

ISAS = ("avx2", "avx512_vnni")
MakeKernels = Callable[..., Kernels]


@pytest.fixture(scope="session")
def make_kernels() -> Iterator[MakeKernels]:
    """make_kernels(isa, threads): kernels on a pool kept for all tests. Skips where the CPU lacks isa."""
    made: dict[tuple[str, int], Kernels] = {}

    def make(isa: str = "avx2", threads: int = 2) -> Kernels:
        if (isa, threads) not in made:
            try:
                made[isa, threads] = Kernels(Pool(threads, isa))
            except NativeError as error:
                if "instruction set" not in str(error):
                    raise
                pytest.skip(f"this CPU lacks {isa}")
        return made[isa, threads]

    yield make
    for kernels in made.values():
        kernels.pool.close()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """The name of an instruction set."""
    name = request.param
    assert isinstance(name, str)
    return name


@pytest.fixture
def kernels(make_kernels: MakeKernels, isa: str) -> Kernels:
    """Kernels of ``isa`` on two threads."""
    return make_kernels(isa)


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers for every test."""
    return np.random.default_rng(20260711)
