"""Where the RAM goes, when it is short, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from krasis.formats.errors import ResourceError
from krasis.runtime.planning import make_plan, make_workload
from krasis.runtime.planning.report import plan_to_text
from tests.support.planning import with_experts

GB = 10**9
ARENA = 117_096_579_072
CPU_TIER = 241_289_920_512


def test_an_arena_that_does_not_fit_becomes_a_ring(qwen_235b, machine):
    work = make_workload(qwen_235b.spec)
    plan = make_plan(qwen_235b, machine(1, ram_bytes=300 * GB), work)
    host = plan.host
    assert host.expert_store == "ring"
    assert host.pinned_bytes == 2 * 128 * 9_732_096
    assert "117.1 GB" in host.reason
    # what CPU experts, 1.24 GB of embedding, reserve and ring leave caches a part of the 117 GB
    left = 300 * GB - CPU_TIER - 151_936 * 4096 * 2 - 2 * GB - host.workspace_bytes - host.pinned_bytes
    assert host.page_cache_bytes == left
    assert host.from_disk_bytes == ARENA - left
    assert plan.prefill.dma_s == pytest.approx(
        (ARENA - left) / 3e9, rel=1e-6
    )  # the disk is slower than the link


def test_an_arena_that_just_fits_is_pinned(qwen_235b, machine):
    work = make_workload(qwen_235b.spec)
    roomy = make_plan(qwen_235b, machine(1), work).host
    exact = roomy.ram_bytes - roomy.spare_bytes
    assert make_plan(qwen_235b, machine(1, ram_bytes=exact), work).host.expert_store == "arena"
    assert make_plan(qwen_235b, machine(1, ram_bytes=exact - 1), work).host.expert_store == "ring"


def test_cpu_experts_beyond_the_ram_are_refused_with_the_numbers(qwen_235b, machine):
    with pytest.raises(ResourceError) as caught:
        make_plan(qwen_235b, machine(0, ram_bytes=128 * GB), make_workload(qwen_235b.spec))
    message = str(caught.value)
    # 241.3 experts + 8.68 dense and embedding + 2.32 KV + 0.18 workspace + 2 reserve
    assert "needs 254.5 GB" in message
    assert "has 128.0 GB" in message
    assert "INT4 CPU experts" in message


def test_the_hint_does_not_advise_what_was_done_already(qwen_235b, machine):
    int4 = dataclasses.replace(with_experts(qwen_235b, cpu_bytes=10_616_832), cpu_layout="cpu-i4-r32-b32")
    with pytest.raises(ResourceError) as caught:
        make_plan(int4, machine(0, ram_bytes=64 * GB), make_workload(int4.spec))
    assert "INT4" not in str(caught.value)


def test_without_gpu_the_dense_weights_and_the_kv_cache_are_in_ram(qwen_235b, machine):
    host = make_plan(qwen_235b, machine(0), make_workload(qwen_235b.spec)).host
    assert host.expert_store == "none"
    assert host.dense_bytes == 7_430_603_264 + 1_244_659_712
    assert host.kv_bytes == 192_512 * 12_048


def test_where_mapped_files_can_be_pinned_nothing_is_copied(qwen_235b, machine):
    here = dataclasses.replace(machine(1), pins_files=True)
    work = make_workload(qwen_235b.spec)
    plan, copied = make_plan(qwen_235b, here, work), make_plan(qwen_235b, machine(1), work)
    assert plan.host.expert_store == "in-place"
    assert plan.host.pinned_bytes == ARENA
    assert plan.host.spare_bytes == copied.host.spare_bytes
    # the copy reads and writes every byte of RAM at 140 GB/s
    assert copied.start_up.warm_s - plan.start_up.warm_s == pytest.approx(2 * ARENA / 140e9, rel=1e-6)
    assert "page cache pinned in place" in plan_to_text(plan)
    short = dataclasses.replace(machine(1, ram_bytes=300 * GB), pins_files=True)
    assert make_plan(qwen_235b, short, work).host.expert_store == "ring"


def test_without_cpu_experts_decode_streams_what_it_needs(qwen_235b, machine):
    """8 of 128 experts a layer over each of two links of 13 GB/s, less what lies in VRAM."""
    half = with_experts(qwen_235b, cpu_bytes=0)
    plan = make_plan(half, machine(2), make_workload(half.spec))
    assert plan.host.cpu_experts_bytes == 0
    resident = plan.gpus[0].resident_experts / (94 * 64)
    expected = 94 * 4 * (1 - resident) * 9_732_096 / 13e9
    assert plan.decode.stream_s == pytest.approx(expected, rel=1e-6)
    assert plan.decode.total_s > plan.decode.stream_s
    assert "expert DMA" in plan_to_text(plan).split("decode")[1]


@pytest.mark.parametrize(("tier", "num_gpus"), [("gpu_bytes", 1), ("cpu_bytes", 0)])
def test_a_missing_tier_is_refused(qwen_235b, machine, tier: str, num_gpus: int):
    half = with_experts(qwen_235b, **{tier: 0})
    with pytest.raises(ResourceError, match="this bundle has no"):
        make_plan(half, machine(num_gpus), make_workload(half.spec))
