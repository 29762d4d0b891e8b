"""What the driver of this machine pins, asked without opening a device for real work."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import torch

from krasis.formats.errors import KrasisError, NativeError, ResourceError
from krasis.formats.limits import HUGE_PAGE_BYTES, PAGE_BYTES
from krasis.runtime.device.library import cuda_library
from krasis.runtime.host_memory.in_place import try_register
from krasis.runtime.host_memory.registrar import CudaRegistrar, Registrar


def driver_registrar(index: int = 0) -> Registrar:
    """Registration by libkrasis_cuda for GPU ``index``. Raises NativeError if the library cannot be used."""
    library = cuda_library()
    if not hasattr(library, "krasis_cuda_host_register"):
        raise NativeError(
            "the CUDA library cannot register memory", got="an older build", hint="rebuild the package"
        )
    return CudaRegistrar(library, torch.device("cuda", index))


def why_not_in_place(file: Path, index: int = 0) -> str:
    """Why a mapped file's pages cannot be pinned where they are; empty if they can (2 MiB are tried)."""
    try:
        registrar = driver_registrar(index)
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except (KrasisError, OSError) as error:
        return str(error)
    try:
        num_bytes = min(os.fstat(fd).st_size, HUGE_PAGE_BYTES) // PAGE_BYTES * PAGE_BYTES
        if num_bytes == 0:
            raise ResourceError("too small to try", where=str(file))
        mapping = mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        rows = np.frombuffer(mapping, dtype=np.uint8).reshape(1, num_bytes)
        return try_register(rows, registrar, read_only=True) or ""
    except (KrasisError, OSError, ValueError) as error:
        return str(error)
    finally:
        os.close(fd)
