"""GPUs and memory by their names."""

from __future__ import annotations

import pytest

from krasis.formats.errors import UsageError
from krasis.runtime.planning.hardware import GIB, describe_gpu
from krasis.runtime.planning.named_parts import GPUS, memory_gbps, named_gpus


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("rtx4090", [24]),
        ("RTX4090x2", [24, 24]),
        ("2xrtx4090", [24, 24]),
        ("2 x RTX 4090", [24, 24]),
        ("rtx3090,a100", [24, 80]),
        ("nvidia-l4*3", [23, 23, 23]),
        ("h100-pcie", [80]),
    ],
)
def test_names_and_numbers(text, sizes):
    assert [gpu.vram_bytes / GIB for gpu in named_gpus(text)] == sizes


@pytest.mark.parametrize("text", ["rtx4090x0", "rtx4090x1025", "2xrtx4090x2", "gtx1080", "", "rtx4090,,"])
def test_what_is_no_name(text):
    with pytest.raises(UsageError, match=r"--gpu: .*(rtx4090|1 to 1024)"):
        named_gpus(text)


@pytest.mark.parametrize("name", GPUS)
def test_every_entry_is_plausible(name):
    """Against the classes by VRAM, which were there before: nothing is off by a digit."""
    spec, guess = GPUS[name].spec(name), describe_gpu(GPUS[name].spec(name).vram_bytes)
    for ours, other in (
        (spec.memory_gbps, guess.memory_gbps),
        (spec.bf16_tflops, guess.bf16_tflops),
        (spec.link_gbps, guess.link_gbps),
    ):
        assert 0.2 < ours.value / other.value < 5
        assert ours.note
    assert spec.bf16_tflops.value == pytest.approx(0.7 * GPUS[name].peak_tflops)


@pytest.mark.parametrize(
    ("text", "peak"),
    [("8xDDR4-2666", 170.6), ("2xddr5-6000", 96.0), ("12 x DDR5-4800", 460.8), ("1xDDR3-1600", 12.8)],
)
def test_memory(text, peak):
    figure = memory_gbps(text)
    assert figure.value == pytest.approx(0.82 * peak, rel=1e-3)
    assert figure.source == "assumed"


@pytest.mark.parametrize(
    "text", ["DDR4-2666", "8xDDR4", "0xDDR4-2666", "8xDDR9-2666", "8xDDR4-99", "65xDDR4-2666"]
)
def test_what_is_no_memory(text):
    with pytest.raises(UsageError, match="8xDDR4-2666"):
        memory_gbps(text)
