"""A double of a GPU with its kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def kernel_device() -> Iterator[Any]:
    """A double of 1 GiB; skips where its kernels were not built and nobody said they were."""
    from krasis.formats.errors import NativeError
    from krasis.runtime.device.double import DeviceDouble
    from krasis.runtime.device.library import double_library

    try:
        double_library()
    except NativeError as error:
        if "KRASIS_CUDA_DOUBLE" in os.environ:
            raise
        pytest.skip(str(error))
    device = DeviceDouble(seed=2)
    yield device
    device.close()
