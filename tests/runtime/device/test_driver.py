"""A context made by the driver alone: the calls, and that nothing is raised where it cannot be made."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from krasis.formats.errors import NativeError
from krasis.runtime.cli import run
from krasis.runtime.device import driver
from krasis.runtime.gpu import opening
from krasis.runtime.settings import EngineSettings
from tests.support.patience import PATIENCE_S


class Driver:
    """Stands for libcuda; fails: the function that gives 100."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.calls = fails, []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name, *(one.value for one in arguments if isinstance(one, ctypes.c_int))))
            return 100 if name == self.fails else 0

        return call


@pytest.mark.parametrize("fails", ["", "cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"])
def test_the_context_of_the_right_gpu_is_made(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    library = Driver(fails)
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: library)
    assert driver.make_context(3) == (not fails)
    names = [name for name, *_ in library.calls]
    wanted = ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]
    assert names == (wanted[: wanted.index(fails) + 1] if fails else wanted)
    assert fails == "cuInit" or library.calls[1] == ("cuDeviceGet", 3)


def test_the_driver_alone_is_waked(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Driver()
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: library)
    driver.wake().join(PATIENCE_S)
    assert library.calls == [("cuInit",)]


@pytest.mark.parametrize(
    ("device", "is_there", "waked"),
    [("auto", True, 1), ("cuda", True, 1), ("cpu", True, 0), ("double", True, 0), ("auto", False, 0)],
)
def test_krasis_run_wakes_a_gpu_that_it_may_use(
    monkeypatch: pytest.MonkeyPatch, device: str, is_there: bool, waked: int
) -> None:
    calls: list[int] = []
    monkeypatch.setattr("krasis.runtime.host.visible_gpus.has_gpu", lambda: is_there)
    monkeypatch.setattr(driver, "wake", lambda: calls.append(1))
    run._wake_gpu(device)
    assert len(calls) == waked


def test_a_machine_without_the_driver_is_told_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "DRIVER", "libno-such-driver.so.1")
    assert not driver.make_context(0)


def test_a_gpu_is_waked_while_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(opening, "find_cuda_library", lambda: None)
    monkeypatch.setattr(opening, "make_context", lambda index: asked.append(index) or True)
    assert opening.begin_context(EngineSettings(device="cuda"), 2).result()
    assert not opening.begin_context(EngineSettings(device="double")).result()
    assert asked == [2]

    def missing() -> None:
        raise NativeError("the native GPU library is not there")

    monkeypatch.setattr(opening, "find_cuda_library", missing)
    assert not opening.begin_context(EngineSettings(device="auto")).result()
    assert asked == [2]
