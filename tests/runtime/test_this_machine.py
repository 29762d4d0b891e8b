"""What a plan takes from this machine, from flags, and from nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from krasis.formats import native
from krasis.formats.errors import NativeError, ResourceError, UsageError
from krasis.runtime.host import environment, measure_gpu
from krasis.runtime.host.read_bandwidth import measure_read_bandwidth
from krasis.runtime.planning.probes import HardwareFlags, hardware_from_flags
from krasis.runtime.this_machine import ThisMachine

MIB = 2**20


def test_another_host_is_not_measured(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("krasis.runtime.this_machine.measure_read_bandwidth", refuse)
    for flags in (HardwareFlags(num_cpus=64), HardwareFlags(ram_bytes=2**40), HardwareFlags(ram_gbps=100.0)):
        hardware, _ = hardware_from_flags(flags, ThisMachine())
        assert hardware.ram_gbps.source in ("assumed", "given")
    hardware, _ = hardware_from_flags(HardwareFlags(num_cpus=64), ThisMachine())
    assert hardware.ram_gbps.value == 140  # 64 x 12 is beyond eight channels of DDR4
    assert hardware.cpu_gmacs.value == 64 * 50


def test_a_library_that_cannot_measure_is_a_note(monkeypatch):
    def missing() -> None:
        raise NativeError("the native library is not installed")

    monkeypatch.setattr(native, "library", missing)
    notes: list[str] = []
    assert measure_read_bandwidth(0, 2**34, notes) is None
    assert notes == ["RAM bandwidth is not measured: the native library is not installed"]


def test_the_measurement_reads_no_more_than_an_eighth_of_free_memory():
    notes: list[str] = []
    figure = measure_read_bandwidth(2**40, 512 * MIB, notes)
    assert figure is not None
    assert figure.source == "measured"
    assert int(figure.note.split(" of reads of ")[1].split(" MiB")[0]) <= 64
    assert "L3" in notes[0]


def test_gpus_without_a_cuda_build_are_planned_with_a_note(monkeypatch):
    problem = environment.NativeLibraries("", None, "", "", "built without CUDA")
    monkeypatch.setattr(environment, "probe_libraries", lambda: problem)
    hardware, notes = hardware_from_flags(
        HardwareFlags(gpu_vram_bytes=(2**34, 2**34), num_cpus=8), ThisMachine()
    )
    assert len(hardware.gpus) == 2
    assert any("built without CUDA" in note for note in notes)


def test_a_driver_without_a_cuda_build_plans_no_gpu(monkeypatch):
    problem = environment.NativeLibraries("", None, "", "", "built without CUDA")
    monkeypatch.setattr(environment, "probe_libraries", lambda: problem)
    monkeypatch.setattr(environment, "nvidia_driver_loaded", lambda: True)
    hardware, notes = hardware_from_flags(HardwareFlags(num_cpus=8), ThisMachine())
    assert hardware.gpus == ()
    assert notes == ("no GPU is used: built without CUDA",)


def test_this_machines_gpus_are_used_when_they_can_be(monkeypatch):
    monkeypatch.setattr(
        environment, "probe_libraries", lambda: environment.NativeLibraries("", 1, "", "x.so", "")
    )
    monkeypatch.setattr(environment, "nvidia_driver_loaded", lambda: True)
    device = environment.GpuInfo(0, "RTX", 16 * 2**30, "8.9")
    monkeypatch.setattr(
        environment, "probe_torch", lambda: environment.Torch("2", "13", (device, device), "")
    )

    def no_room(index: int) -> None:
        raise ResourceError("GPU cannot be measured", where=f"GPU {index}")

    monkeypatch.setattr(measure_gpu, "measure_gpu", no_room)
    hardware, notes = hardware_from_flags(HardwareFlags(num_cpus=8, pcie_gbps=12.0), ThisMachine())
    assert [gpu.vram_bytes for gpu in hardware.gpus] == [16 * 2**30] * 2
    assert hardware.gpus[0].link_gbps.value == 12
    assert hardware.gpus[0].memory_gbps.source == "assumed"
    assert any("GPU 0 is not measured" in note for note in notes)


def test_a_gpu_at_hand_is_measured_where_no_flag_says_otherwise(monkeypatch):
    monkeypatch.setattr(
        environment, "probe_libraries", lambda: environment.NativeLibraries("", 1, "", "x.so", "")
    )
    monkeypatch.setattr(environment, "nvidia_driver_loaded", lambda: True)
    device = environment.GpuInfo(0, "RTX", 16 * 2**30, "8.9")
    monkeypatch.setattr(environment, "probe_torch", lambda: environment.Torch("2", "13", (device,), ""))
    monkeypatch.setattr(
        measure_gpu, "measure_gpu", lambda index: measure_gpu.GpuRates(25.5, 24.0, 900.0, 70.0)
    )
    hardware, notes = hardware_from_flags(HardwareFlags(num_cpus=8, gpu_gbps=800.0), ThisMachine())
    (gpu,) = hardware.gpus
    assert (gpu.link_gbps.value, gpu.link_gbps.source) == (25.5, "measured")
    assert (gpu.memory_gbps.value, gpu.memory_gbps.source) == (800.0, "given")
    assert (gpu.bf16_tflops.value, gpu.bf16_tflops.source) == (70.0, "measured")
    assert "24.0" in gpu.link_gbps.note
    assert notes == ()
    # another card is not this one, whatever was measured
    hardware, _ = hardware_from_flags(HardwareFlags(gpu_vram_bytes=(16 * 2**30,), num_cpus=8), ThisMachine())
    assert hardware.gpus[0].link_gbps.source == "assumed"


@pytest.mark.parametrize(("problem", "pins"), [("", True), ("operation not supported", False)])
def test_pinning_the_bundles_pages_is_tried_where_the_gpus_are(monkeypatch, problem: str, pins: bool):
    monkeypatch.setattr(
        environment, "probe_libraries", lambda: environment.NativeLibraries("", 1, "", "x.so", "")
    )
    monkeypatch.setattr(environment, "nvidia_driver_loaded", lambda: True)
    device = environment.GpuInfo(0, "RTX", 16 * 2**30, "8.9")
    monkeypatch.setattr(environment, "probe_torch", lambda: environment.Torch("2", "13", (device,), ""))
    monkeypatch.setattr("krasis.runtime.host_memory.this_driver.why_not_in_place", lambda shard: problem)
    hardware, notes = hardware_from_flags(HardwareFlags(num_cpus=8), ThisMachine(Path("gpu-000.safetensors")))
    assert hardware.pins_files == pins
    assert any("operation not supported" in note for note in notes) != pins
    hardware, _ = hardware_from_flags(
        HardwareFlags(gpu_vram_bytes=(2**34,), num_cpus=8), ThisMachine(Path("gpu-000"))
    )
    assert not hardware.pins_files


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_rates_are_refused(rate: float):
    with pytest.raises(UsageError):
        hardware_from_flags(HardwareFlags(num_cpus=8, ram_gbps=rate), ThisMachine())
