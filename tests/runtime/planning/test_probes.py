"""What is asked of the machine, and when: probes are handed in."""

from __future__ import annotations

from dataclasses import dataclass, field

from krasis.formats.errors import ResourceError
from krasis.runtime.planning.hardware import Figure, GpuSpec, describe_gpu
from krasis.runtime.planning.probes import GpuFound, HardwareFlags, HostFacts, hardware_from_flags

GIB = 2**30


@dataclass
class Answers:
    """A machine with two GPUs, of which the second cannot be measured. asked: the costly questions."""

    pins: str | None = ""
    asked: list[str] = field(default_factory=list)

    def host(self) -> HostFacts:
        return HostFacts(12, "avx512_vnni", 64 * GIB, "MemTotal")

    def why_no_gpu(self) -> str:
        return "built without CUDA"

    def gpus(self) -> tuple[tuple[GpuFound, ...], str]:
        self.asked.append("gpus")
        return (GpuFound(0, 16 * GIB), GpuFound(1, 16 * GIB)), ""

    def measure_gpu(self, gpu: GpuFound) -> GpuSpec:
        self.asked.append("gpu")
        if gpu.index == 1:
            raise ResourceError("too little VRAM is free")
        return describe_gpu(gpu.vram_bytes, link_gbps=21.0, memory_gbps=500.0, bf16_tflops=60.0)

    def measure_ram(self) -> tuple[Figure | None, tuple[str, ...]]:
        self.asked.append("ram")
        return Figure(99.0, "measured"), ("it was hot",)

    def why_not_in_place(self) -> str | None:
        self.asked.append("pins")
        return self.pins


def test_without_flags_everything_is_asked() -> None:
    answers = Answers()
    hardware, notes = hardware_from_flags(HardwareFlags(), answers)
    assert sorted(answers.asked) == ["gpu", "gpu", "gpus", "pins", "ram"]
    assert [gpu.link_gbps.value for gpu in hardware.gpus] == [21.0, 13.0]
    assert (hardware.ram_bytes.value, hardware.num_cores.value) == (64 * GIB, 12)
    assert hardware.ram_gbps.value == 99.0
    assert hardware.pins_files
    assert "GPU 1 is not measured" in notes[0]
    assert notes[1:] == ("it was hot",)


def test_what_flags_say_is_not_asked() -> None:
    answers = Answers()
    flags = HardwareFlags((24 * GIB,), ram_bytes=128 * GIB, num_cpus=32)
    hardware, notes = hardware_from_flags(flags, answers)
    assert answers.asked == []
    assert (hardware.ram_bytes.value, hardware.num_cores.value) == (128 * GIB, 32)
    assert not hardware.pins_files
    assert notes == ("this installation cannot use a GPU yet: built without CUDA",)
    rates = HardwareFlags(pcie_gbps=10, gpu_gbps=100, gpu_tflops=10, ram_gbps=50)
    assert hardware_from_flags(rates, answers)[0].gpus[0].link_gbps.source == "given"
    assert answers.asked == ["gpus", "pins"]


def test_where_pages_cannot_be_pinned_or_there_is_no_file() -> None:
    hardware, notes = hardware_from_flags(HardwareFlags(num_cpus=4), Answers(pins="not supported"))
    assert not hardware.pins_files
    assert notes[-1].endswith("cannot be pinned: not supported")
    hardware, notes = hardware_from_flags(HardwareFlags(num_cpus=4), Answers(pins=None))
    assert not hardware.pins_files
    assert len(notes) == 1
