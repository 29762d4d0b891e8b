"""Expected seconds against arithmetic done by hand for Qwen3-235B, 10,000 tokens."""

from __future__ import annotations

import dataclasses

import pytest

from krasis.runtime.planning import make_plan, make_workload
from krasis.runtime.planning.cost import distinct_experts
from krasis.runtime.planning.mixing import mixer_macs

FAST = {"tflops": 1e6}  # compute is free: what is left is the link

# FLOPs of 10,000 tokens, 94 layers: projections (4096 x 9216 + 4096 x 8192) and router (4096 x 128), top-8
# experts, causal attention (64 heads of 128, scores and values, 10,000 * 10,001 / 2 pairs)
DENSE_FLOPS = 2 * 10_000 * 94 * (4096 * 9216 + 4096 * 8192 + 4096 * 128)
EXPERT_FLOPS = 2 * 10_000 * 94 * 8 * 18_874_368
ATTENTION_FLOPS = 2 * 2 * 8192 * 50_005_000 * 94
# a grouped product computes 20 rows more for each of 128 experts, at half of a matmul's rate; attention from
# position 0 reaches 0.8 of it, after a prefix 0.39
PADDING_FLOPS = 2 * 94 * 20 * 128 * 18_874_368
EXPERT_GB = 117.096579072


@pytest.mark.parametrize(("num_gpus", "share", "about_s"), [(1, 1, 9.0), (2, 1 / 2, 4.5), (3, 43 / 128, 3.0)])
def test_links_stream_all_experts_in_the_designs_seconds(qwen_235b, machine, num_gpus, share, about_s):
    plan = make_plan(qwen_235b, machine(num_gpus), make_workload(qwen_235b.spec))
    # A few are resident, which a first prompt has no use of.
    assert 0 < plan.gpus[0].resident_experts < 47 * plan.gpus[0].num_experts
    assert plan.prefill.dma_s == pytest.approx(EXPERT_GB * share / 13, rel=1e-6)
    assert plan.prefill.dma_s == pytest.approx(about_s, abs=0.05)


def test_one_slow_gpu_is_bound_by_compute(qwen_235b, machine):
    plan = make_plan(qwen_235b, machine(1), make_workload(qwen_235b.spec))
    assert plan.prefill.path == "streamed"
    assert plan.prefill.expert_s == pytest.approx((EXPERT_FLOPS + PADDING_FLOPS) / 17e12, rel=1e-4)
    assert plan.prefill.dense_s == pytest.approx(DENSE_FLOPS / 34e12, rel=1e-9)
    assert plan.prefill.attention_s == pytest.approx(ATTENTION_FLOPS / 0.8 / 34e12, rel=1e-9)
    # one group: the whole next layer arrives under this layer's work, so the sum of compute is all there is
    parts = plan.prefill.expert_s + plan.prefill.dense_s + plan.prefill.attention_s
    assert plan.prefill.total_s == pytest.approx(parts, rel=1e-9)
    assert plan.prefill.total_s == pytest.approx(26.87, abs=0.01)
    assert plan.prefill.tokens_per_s == pytest.approx(372, abs=1)


def test_one_fast_gpu_is_bound_by_its_link(qwen_235b, machine):
    plan = make_plan(qwen_235b, machine(1, **FAST), make_workload(qwen_235b.spec))
    assert plan.prefill.total_s == pytest.approx(plan.prefill.dma_s, rel=1e-9)
    assert plan.prefill.total_s == pytest.approx(9.007, rel=0.001)


def test_a_second_pass_streams_the_experts_again(qwen_235b, machine):
    work = make_workload(qwen_235b.spec, context=10_000)
    plan = make_plan(qwen_235b, machine(1, 21 * 2**29, **FAST), work)
    passes = plan.prefill.num_passes
    assert passes == 2  # 10.5 GiB leave 0.90 GB for activations, about 7,800 tokens of 114,790 bytes
    assert plan.prefill.dma_s == pytest.approx(passes * 9.007, rel=1e-3)


def test_the_card_that_holds_everything_pays_compute_only(qwen_235b, machine):
    card = machine(1, 141 * 10**9, link=55.0, memory=4800.0, tflops=600.0)
    plan = make_plan(qwen_235b, card, make_workload(qwen_235b.spec))
    compute = (EXPERT_FLOPS + PADDING_FLOPS) / 0.5 + DENSE_FLOPS + ATTENTION_FLOPS / 0.8
    assert plan.prefill.total_s == pytest.approx(compute / 600e12, rel=1e-4)
    # start-up: processes, and the experts' memory registered at 14 GB/s while they pass a 55 GB/s link
    assert plan.start_up.warm_s == pytest.approx(0.75 + 7.2 + EXPERT_GB / 14, rel=1e-3)
    assert plan.decode.cpu_experts_bytes == 0
    # a token reads dense 7.43 GB, KV 1.93 GB and 752 experts of 9.73 MB, at most 3000 GB/s; no hand-over
    read_s = (7.4306 + 1.92512 + 752 * 0.009732096) / 3000
    assert plan.decode.total_s == pytest.approx(read_s + 94 * 60e-6, rel=1e-4)


def test_exchange_between_three_gpus(qwen_235b, machine):
    plan = make_plan(qwen_235b, machine(3), make_workload(qwen_235b.spec))
    # hidden states out and in, 10,000 x 4096 x 2 bytes, two thirds from other ranks, each layer, 13 GB/s
    assert plan.prefill.exchange_s == pytest.approx(94 * 2 * 81_920_000 * (2 / 3) / 13e9, rel=1e-9)


def test_cpu_decode_reads_dense_experts_and_kv_from_ram(qwen_235b, machine):
    plan = make_plan(qwen_235b, machine(0), make_workload(qwen_235b.spec))
    assert plan.decode.cpu_experts_bytes == 752 * 20_054_016
    assert plan.decode.cpu_experts_bytes / 34 * 32 == 14_193_524_736  # the design's 14.2e9 weights
    reads = 7_430_603_264 + 752 * 20_054_016 + 192_512 * 10_000
    assert plan.decode.total_s == pytest.approx(reads / (0.8 * 140e9) + 94 * 190e-6, rel=1e-9)


def test_hybrid_decode_splits_by_memory(qwen_235b, machine):
    plan = make_plan(qwen_235b, machine(1), make_workload(qwen_235b.spec))
    gpu = (7_430_603_264 + 192_512 * 10_000) / (0.8 * 224e9)
    cold = 1 - plan.gpus[0].resident_experts / 12_032
    cpu = cold * 752 * 20_054_016 / (0.8 * 140e9)
    assert plan.decode.total_s == pytest.approx(gpu + cpu + 94 * (25e-6 + 60e-6 + 70e-6), rel=1e-6)


def test_every_gpu_decodes_with_what_it_holds(qwen_235b, machine):
    big = 40 * 10**9
    one, two = (make_plan(qwen_235b, machine(n, big), make_workload(qwen_235b.spec)) for n in (1, 2))
    assert two.gpus[0].resident_experts == two.gpus[1].resident_experts > 0
    cold = 1 - 2 * two.gpus[0].resident_experts / 12_032
    assert two.decode.cpu_experts_bytes == pytest.approx(cold * 752 * 20_054_016, rel=1e-6)
    assert two.decode.handover_s == pytest.approx(94 * (25e-6 + 60e-6 + 25e-6 + 75e-6))
    assert two.decode.tokens_per_s > one.decode.tokens_per_s


def test_experts_that_gpus_hold_together_leave_none_to_the_cpu(qwen_235b, machine):
    plan = make_plan(qwen_235b, machine(3, 80 * 10**9), make_workload(qwen_235b.spec))
    assert sum(gpu.resident_experts for gpu in plan.gpus) == 12_032
    assert plan.decode.cpu_experts_bytes == plan.decode.cpu_experts_s == 0
    assert plan.decode.handover_s == pytest.approx(94 * (60e-6 + 25e-6))


def test_cpu_prefill_is_bound_by_multiply_adds(qwen_235b, machine):
    # 20 full passes of 512: a shorter last one would be bound by reading its experts
    plan = make_plan(qwen_235b, machine(0), make_workload(qwen_235b.spec, prompt_tokens=10_240))
    assert plan.prefill.path == "cpu"
    assert plan.prefill.num_passes == 20
    pairs = 10_240 * 10_241 / 2
    seconds = 1.024 * (EXPERT_FLOPS + DENSE_FLOPS) / 2 / 3200e9 + 94 * 2 * 8192 * pairs / (0.25 * 3200e9)
    assert plan.prefill.total_s == pytest.approx(seconds, rel=1e-6)


def test_a_short_prompt_prefers_the_cpu_over_streaming(qwen_235b, machine):
    work = make_workload(qwen_235b.spec, prompt_tokens=4)
    plan = make_plan(qwen_235b, machine(1), work)
    assert plan.prefill.path == "cpu"
    # four tokens touch at most 32 of 128 experts a layer, from RAM: 60.3 GB at 140 GB/s
    assert plan.prefill.expert_s < 94 * 32 * 20_054_016 / 140e9
    assert plan.prefill.total_s < 0.5


def test_a_short_prompt_streams_only_the_experts_it_touches(qwen_235b, machine):
    slow_cpu = machine(1, ram_gbps=1.0, gmacs=1.0)
    plan = make_plan(qwen_235b, slow_cpu, make_workload(qwen_235b.spec, prompt_tokens=1, context=12_048))
    assert plan.prefill.path == "streamed"
    assert plan.prefill.dma_s == pytest.approx(9.007 * 8 / 128, rel=0.15)  # less the resident ones


def test_distinct_experts(qwen_235b):
    experts = qwen_235b.layers[0].experts
    assert distinct_experts(experts, 1) == pytest.approx(8)
    assert distinct_experts(experts, 2) == pytest.approx(8 + 8 * (120 / 128))
    assert distinct_experts(experts, 10_000) == pytest.approx(128)
    dense = dataclasses.replace(experts, count=8)
    assert distinct_experts(dense, 1) == 8


def test_attention_in_pieces_is_attention_at_once(qwen_235b):
    mixer = qwen_235b.spec.layers[0].mixer
    assert mixer_macs(mixer, 0, 1) == 2 * 8192
    assert mixer_macs(mixer, 0, 300) + mixer_macs(mixer, 300, 700) == mixer_macs(mixer, 0, 1000)


def test_small_groups_hide_little_dma_under_attention(qwen_235b, machine):
    """With 16 groups two buffers are an eighth of a layer: the rest of the DMA waits for attention."""
    slow_link = machine(1, 21 * 2**29, link=6.5)
    plan = make_plan(qwen_235b, slow_link, make_workload(qwen_235b.spec, context=10_000))
    assert plan.gpus[0].num_groups == 16
    # every pass: dense and attention exceed 24 ms a layer, an eighth of 191 ms of DMA; matmuls are shorter
    expected = plan.prefill.dense_s + plan.prefill.attention_s + plan.prefill.dma_s * 7 / 8
    assert plan.prefill.total_s == pytest.approx(expected, rel=1e-9)
