"""The CUDA driver itself, without torch: a GPU's context can be made while torch is still being imported."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from threading import Thread
from typing import Any

from krasis.formats.process.stages import stage

DRIVER = "libcuda.so.1"

Call = tuple[str, tuple[Any, ...]]  # a function and its arguments

logger = logging.getLogger(__name__)


def wake() -> Thread:
    """Begins to initialise the driver, in the background; every later call of CUDA waits for it."""

    def initialise() -> None:
        with stage("(behind) CUDA driver"):
            _carry_out((("cuInit", (ctypes.c_uint(0),)),))

    thread = Thread(target=initialise, name="krasis-wake", daemon=True)
    thread.start()
    return thread


def make_context(index: int) -> bool:
    """Makes the primary context of GPU ``index``, which torch and libkrasis_cuda take over; it lives as long
    as the process. Returns whether there is one now: if not, whoever needs it will hear why from torch.
    """
    device, context = ctypes.c_int(), ctypes.c_void_p()
    calls: tuple[Call, ...] = (
        ("cuInit", (ctypes.c_uint(0),)),
        ("cuDeviceGet", (ctypes.byref(device), ctypes.c_int(index))),
        ("cuDevicePrimaryCtxRetain", (ctypes.byref(context), device)),
    )
    with stage("(behind) CUDA context"):
        return _carry_out(calls)


def _carry_out(calls: Sequence[Call]) -> bool:
    """Whether the driver is there and all its functions, called one after the other, gave 0."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError as error:
        logger.debug("nothing is done ahead of torch: %s", error)
        return False
    for name, arguments in calls:
        status = getattr(driver, name)(*arguments)
        if status:
            logger.debug("nothing is done ahead of torch: %s gives %d", name, status)
            return False
    return True
