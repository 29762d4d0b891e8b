"""A thread pool's end: from several threads, and in a child of fork, where its threads are not."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from krasis.formats.errors import NativeError
from krasis.formats.native import Pool
from tests.support.patience import PATIENCE_S


def test_closed_by_several_threads() -> None:
    for _ in range(20):
        pool = Pool(2)
        with ThreadPoolExecutor(4) as callers:
            list(callers.map(lambda _, pool=pool: pool.close(), range(8)))
        with pytest.raises(NativeError, match="closed"):
            _ = pool.handle


def test_a_child_does_not_wait_for_its_parents_threads() -> None:
    with Pool(3) as pool:
        child = os.fork()
        if child == 0:
            pool.close()
            os._exit(0)
        end = time.monotonic() + PATIENCE_S
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
            time.sleep(0.005)
        if ended == (0, 0):
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert ended == (child, 0)
        assert pool.num_threads == 3
        _ = pool.handle
