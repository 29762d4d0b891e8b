"""Which device a bundle is opened on, and what is said about it."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.formats.errors import MismatchError, NativeError, ResourceError, UnsupportedModelError, UsageError
from krasis.runtime import Engine, EngineSettings
from krasis.runtime.batch import one_sequence
from krasis.runtime.gpu import opening
from krasis.runtime.host import environment

WHO_SAYS_WHY = ("krasis.runtime.open_backend", opening.__name__)


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path], make_config: Callable[..., Any]) -> Path:
    return make_bundle(make_config())


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine that has one."""
    monkeypatch.setattr(environment, "nvidia_driver_loaded", lambda *_: False)
    monkeypatch.setattr("krasis.runtime.open_backend.visible_gpus.driver_loaded", lambda *_: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def reason_of(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = [one for one in caplog.records if one.name in WHO_SAYS_WHY]
    return record.getMessage()


def test_auto_goes_to_the_cpu_and_says_why(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Engine.open(bundle, EngineSettings(prefault=False)) as engine:
        assert engine.description.startswith("CPU, ")
    assert reason_of(caplog) == "running on the CPU: there is no GPU: no NVIDIA driver is loaded"


def test_auto_without_the_library_goes_to_the_cpu(
    bundle: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> Any:
        raise NativeError("the native GPU library is not there", where="libkrasis_cuda.so")

    monkeypatch.setattr(environment, "nvidia_driver_loaded", lambda *_: True)
    monkeypatch.setattr("krasis.runtime.open_backend.visible_gpus.driver_loaded", lambda *_: True)
    monkeypatch.setattr(opening, "open_device", missing)
    with caplog.at_level(logging.INFO), Engine.open(bundle, EngineSettings(prefault=False)) as engine:
        assert engine.description.startswith("CPU, ")
    assert "the native GPU library is not there" in reason_of(caplog)
    with pytest.raises(NativeError, match="library is not there"):
        Engine.open(bundle, EngineSettings(device="cuda"))


@pytest.mark.parametrize("seen", [True, False])
def test_a_gpu_without_the_library_is_worth_a_line(
    bundle: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, seen: bool
) -> None:
    monkeypatch.setattr(environment, "nvidia_driver_loaded", lambda *_: True)
    monkeypatch.setattr("krasis.runtime.open_backend.visible_gpus.driver_loaded", lambda *_: True)
    monkeypatch.setattr(opening, "has_gpu", lambda: seen)
    monkeypatch.setenv("KRASIS_CUDA_LIB", "/nowhere/libkrasis_cuda.so")
    with caplog.at_level(logging.WARNING), Engine.open(bundle, EngineSettings(prefault=False)) as engine:
        assert engine.description.startswith("CPU, ")
    if not seen:  # a container without devices on a machine that has some
        assert not caplog.records
        return
    line = reason_of(caplog)
    assert line.startswith("this machine's GPU is not used, everything runs on the CPU")
    assert "KRASIS_CUDA=on pip install ." in line
    assert "\n" not in line


def test_hidden_gpus_are_told_apart_from_none(
    bundle: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "nvidia_driver_loaded", lambda *_: True)
    monkeypatch.setattr("krasis.runtime.open_backend.visible_gpus.driver_loaded", lambda *_: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ResourceError, match=r"CUDA_VISIBLE_DEVICES='' hides every GPU.*unset"):
        Engine.open(bundle, EngineSettings(device="cuda"))
    with caplog.at_level(logging.INFO), Engine.open(bundle, EngineSettings(prefault=False)):
        pass
    assert [record.levelname for record in caplog.records if record.name == opening.__name__] == ["INFO"]


def test_cuda_without_a_gpu_is_an_error(bundle: Path) -> None:
    with pytest.raises(ResourceError, match="no NVIDIA driver"):
        Engine.open(bundle, EngineSettings(device="cuda"))


@pytest.mark.parametrize("device", ["auto", "cuda", "double"])
def test_a_bundle_without_gpu_experts(
    make_bundle: Callable[..., Path],
    make_config: Callable[..., Any],
    device: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = make_bundle(make_config(num_hidden_layers=1), tiers=("cpu",))
    settings = EngineSettings(device=device, prefault=False)
    if device != "auto":
        with pytest.raises(MismatchError, match="no gpu experts"):
            Engine.open(bundle, settings)
        return
    with caplog.at_level(logging.INFO), Engine.open(bundle, settings) as engine:
        assert engine.description.startswith("CPU, ")
    assert "no gpu experts" in reason_of(caplog)


def test_experts_of_8_bits_are_not_for_the_kernels(
    make_bundle: Callable[..., Path], make_config: Callable[..., Any]
) -> None:
    bundle = make_bundle(make_config(num_hidden_layers=1), gpu_bits=8)
    with pytest.raises(UnsupportedModelError, match="4-bit Marlin"):
        Engine.open(bundle, EngineSettings(device="double"))


def test_the_float_reference_stays_on_the_cpu(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"activations": "float32", "prefault": False}
    with pytest.raises(UsageError, match="reference"):
        Engine.open(bundle, EngineSettings(device="cuda", **settings))
    with caplog.at_level(logging.INFO), Engine.open(bundle, EngineSettings(**settings)) as engine:
        assert engine.description.startswith("NumPy")
    assert "reference" in reason_of(caplog)


def test_a_gpu_too_small_leaves_it_to_the_cpu(
    gpu_kind: str, bundle: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from krasis.runtime.device.double import DeviceDouble

    monkeypatch.setattr(environment, "nvidia_driver_loaded", lambda *_: True)
    monkeypatch.setattr("krasis.runtime.open_backend.visible_gpus.driver_loaded", lambda *_: True)
    monkeypatch.setattr(opening, "open_device", lambda *_: DeviceDouble(total_bytes=800_100_000))
    with caplog.at_level(logging.INFO), Engine.open(bundle, EngineSettings(prefault=False)) as engine:
        assert engine.description.startswith("CPU, ")
    assert "do not fit in VRAM" in reason_of(caplog)


def test_a_double_through_the_registry(gpu_kind: str, bundle: Path) -> None:
    settings = EngineSettings(device="double", context=32, prefault=False)
    with Engine.open(bundle, settings) as engine:
        assert engine.description.startswith("double of a GPU")
        assert "marlin-u4b8-g128-bf16" in engine.description
        first = engine.prefill([1, 2, 3]).copy()
        second = engine.decode(int(np.argmax(first))).copy()
        assert first.shape == second.shape == (300,)
        assert np.isfinite(second).all()
    with pytest.raises(NativeError, match="closed"):
        engine._backend.run(one_sequence(np.array([1]), 3))


def test_the_cpu_does_not_import_torch(bundle: Path) -> None:
    code = (
        "import sys; from krasis.runtime import Engine\n"
        f"with Engine.open({str(bundle)!r}) as engine: engine.prefill([1, 2, 3])\n"
        "print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine may run the bundle on its GPU")
    assert found.stdout.strip() == "False"
