"""Where the RAM goes, when it is short, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from krasis.formats.errors import ResourceError
from krasis.runtime.planning import make_plan, make_workload

GB = 10**9
ARENA = 117_096_579_072
CPU_TIER = 241_289_920_512


def test_an_arena_that_does_not_fit_becomes_a_ring(qwen_235b, machine):
    work = make_workload(qwen_235b.architecture)
    plan = make_plan(qwen_235b, machine(1, ram_bytes=300 * GB), work)
    host = plan.host
    assert host.expert_store == "mapped-with-ring"
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
    work = make_workload(qwen_235b.architecture)
    roomy = make_plan(qwen_235b, machine(1), work).host
    exact = roomy.ram_bytes - roomy.spare_bytes
    assert make_plan(qwen_235b, machine(1, ram_bytes=exact), work).host.expert_store == "pinned-arena"
    assert make_plan(qwen_235b, machine(1, ram_bytes=exact - 1), work).host.expert_store == "mapped-with-ring"


def test_cpu_experts_beyond_the_ram_are_refused_with_the_numbers(qwen_235b, machine):
    with pytest.raises(ResourceError) as caught:
        make_plan(qwen_235b, machine(0, ram_bytes=128 * GB), make_workload(qwen_235b.architecture))
    message = str(caught.value)
    # 241.3 experts + 8.68 dense and embedding + 2.32 KV + 0.18 workspace + 2 reserve
    assert "needs 254.5 GB" in message
    assert "has 128.0 GB" in message
    assert "INT4 CPU experts" in message


def test_the_hint_does_not_advise_what_was_done_already(qwen_235b, machine):
    int4 = dataclasses.replace(qwen_235b, cpu_layout="cpu-i4-r32-b32", cpu_expert_bytes=10_616_832)
    with pytest.raises(ResourceError) as caught:
        make_plan(int4, machine(0, ram_bytes=64 * GB), make_workload(int4.architecture))
    assert "INT4" not in str(caught.value)


def test_without_gpu_the_dense_weights_and_the_kv_cache_are_in_ram(qwen_235b, machine):
    host = make_plan(qwen_235b, machine(0), make_workload(qwen_235b.architecture)).host
    assert host.expert_store == "none"
    assert host.dense_bytes == 7_430_603_264 + 1_244_659_712
    assert host.kv_bytes == 192_512 * 12_048


@pytest.mark.parametrize(("tier", "num_gpus"), [("gpu_expert_bytes", 1), ("cpu_expert_bytes", 0)])
def test_a_missing_tier_is_refused(qwen_235b, machine, tier: str, num_gpus: int):
    half = dataclasses.replace(qwen_235b, **{tier: 0})
    with pytest.raises(ResourceError, match="this bundle has no"):
        make_plan(half, machine(num_gpus), make_workload(half.architecture))
