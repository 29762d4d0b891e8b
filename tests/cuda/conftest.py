"""The GPU kernels compiled for the host: the same sources and ABI as libkrasis_cuda, on NumPy's memory.

Taken from $KRASIS_CUDA_DOUBLE (CMake target krasis_cuda_double), else compiled here.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")


def _compile(folder: Path) -> Path:
    def build(source: Path) -> str:
        built = folder / f"{source.name}.o"
        command = ["g++", *FLAGS, f"-I{SOURCES}", f"-I{SOURCES.parent}", "-x", "c++"]
        subprocess.run([*command, "-c", str(source), "-o", str(built)], check=True)
        return str(built)

    sources = sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("simt_host*.cpp")])
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        built = list(threads.map(build, sources))
    library = folder / "libkrasis_cuda_double.so"
    subprocess.run(["g++", "-shared", *built, "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    named = os.environ.get("KRASIS_CUDA_DOUBLE")
    library = ctypes.CDLL(str(Path(named) if named else _compile(tmp_path_factory.mktemp("cuda_double"))))
    library.krasis_cuda_last_error.restype = ctypes.c_char_p
    library.krasis_cuda_align_max_blocks.restype = ctypes.c_int64
    library.krasis_cuda_align_max_blocks.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int32]
    return library


@pytest.fixture(scope="session")
def device_array():
    """device_array(shape, dtype): memory at a multiple of 256 bytes, all bits set: NaN until written."""

    def make(shape: tuple[int, ...] | int, dtype: object) -> np.ndarray:
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = np.full(num_bytes + 256, 0xFF, np.uint8)
        begin = -raw.ctypes.data % 256
        return raw[begin : begin + num_bytes].view(dtype).reshape(shape)

    return make
