"""Plans of contexts that VRAM has no room for: keys and values of some layers go to RAM."""

from __future__ import annotations

from dataclasses import replace

import pytest

from krasis.formats.errors import ResourceError
from krasis.runtime.planning import (
    Figure,
    HardwareSpec,
    ModelSizes,
    Workload,
    describe_gpu,
    describe_host,
    make_plan,
    sizes_of_shape,
)
from krasis.runtime.planning.host_kv import host_layers, kv_split, movable_layers
from krasis.runtime.planning.presets import shape
from krasis.runtime.planning.report import plan_to_text

GIB = 2**30


@pytest.fixture(scope="module")
def qwen_235b() -> ModelSizes:
    return sizes_of_shape(shape("qwen3-235b-a22b"))


def card(ram_bytes: int = 512 * GIB, num_gpus: int = 1) -> HardwareSpec:
    """16 GiB of VRAM behind PCIe 4.0 x16."""
    gpu = describe_gpu(16 * GIB, link_gbps=25.0, memory_gbps=700.0, bf16_tflops=80.0)
    ram, cores = Figure(ram_bytes, "given"), Figure(32, "given")
    return describe_host([gpu] * num_gpus, ram_bytes=ram, num_cores=cores, isa="avx512_vnni")


@pytest.mark.parametrize(("kv_dtype", "row_bytes"), [("int8", 2 * 4 * 132), ("bf16", 2 * 4 * 128 * 2)])
def test_128k_tokens_of_qwen_235b_beside_a_card_of_16_gib(
    qwen_235b: ModelSizes, kv_dtype: str, row_bytes: int
) -> None:
    context = 131_072
    plan = make_plan(qwen_235b, card(), Workload(context, 32_768, kv_dtype))
    [gpu] = plan.gpus
    moved = gpu.host_kv_layers
    assert 0 < moved < 94
    assert gpu.host_kv_bytes == plan.host.kv_bytes == moved * context * row_bytes
    # What stays, two staging buffers, and the floats of codes of a head.
    scratch = 2 * context * 128 * 2 if kv_dtype == "int8" else 0
    assert gpu.kv_bytes == (94 - moved + 2) * context * row_bytes + scratch
    parts = (gpu.reserve_bytes, gpu.dense_bytes, gpu.kv_bytes, gpu.workspace_bytes, gpu.buffer_bytes)
    assert sum(parts) + gpu.resident_bytes + gpu.spare_bytes == gpu.vram_bytes
    host = plan.host
    held = host.reserve_bytes + host.dense_bytes + host.cpu_experts_bytes + host.pinned_bytes + host.kv_bytes
    assert held + host.page_cache_bytes + host.workspace_bytes + host.spare_bytes == host.ram_bytes
    assert plan.decode.host_kv_s == pytest.approx(moved * 32_768 * row_bytes / 20e9)
    assert f"KV in RAM      of {moved} of 94 layers" in plan_to_text(plan)
    assert plan.batch_tokens > 8000  # rather than a few layers less in RAM, and many passes over the experts


def test_what_fits_stays_in_vram(qwen_235b: ModelSizes) -> None:
    plan = make_plan(qwen_235b, card(), Workload(32_768, 10_000, "int8"))
    assert (plan.gpus[0].host_kv_layers, plan.host.kv_bytes, plan.decode.host_kv_s) == (0, 0, 0.0)


def test_asked_for_it_is_done(qwen_235b: ModelSizes) -> None:
    work = Workload(8192, 4096, "int8", slots=3, host_kv_layers=94)
    [gpu] = make_plan(qwen_235b, card(), work).gpus
    layer = 8192 * 2 * 4 * 132
    assert gpu.host_kv_bytes == 3 * 94 * layer
    scratch = kv_split(qwen_235b, replace(work, host_kv_layers=0)).device_bytes - 3 * 94 * layer
    assert gpu.kv_bytes == 2 * layer + scratch


def test_where_nothing_helps_the_numbers_say_so(qwen_235b: ModelSizes) -> None:
    work = Workload(131_072, 32_768, "bf16")
    with pytest.raises(ResourceError, match="do not fit in VRAM"):  # each of several has the whole cache
        make_plan(qwen_235b, card(num_gpus=2), work)
    with pytest.raises(ResourceError, match="does not fit in RAM"):
        make_plan(qwen_235b, card(ram_bytes=250 * GIB * 103 // 108), work)


def test_windows_stay_and_the_rest_is_spread() -> None:
    spec = shape("qwen3-30b-a3b")
    assert movable_layers(spec)[:4] == [47, 15, 31, 39]
    assert host_layers(spec, 2) == (15, 47)
    layers = tuple(
        replace(layer, mixer=replace(layer.mixer, window=128)) if index % 2 else layer
        for index, layer in enumerate(spec.layers)
    )
    windowed = replace(spec, layers=layers)
    assert sorted(movable_layers(windowed)) == list(range(0, 48, 2))
    delta = shape("qwen3-next-80b-a3b")
    assert len(movable_layers(delta)) == 12  # states stay
