"""Planner tables for Qwen3-235B on 1, 2 and 3 GPUs of 16 GiB and on a 141 GB card; and what is refused."""

from __future__ import annotations

import pytest

from krasis.formats.errors import ResourceError, UsageError
from krasis.runtime.planning import ModelSizes, make_plan, make_workload
from krasis.runtime.planning.placement import rank_experts
from krasis.runtime.planning.planner import least_vram_bytes, whole_layer_vram_bytes

GIB = 2**30
EXPERT = 9_732_096
ALL_EXPERTS = 94 * 128


def workload_of(sizes: ModelSizes, **options: object):
    return make_workload(sizes.spec, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_ranks", "expected"),
    [
        (1, [(0, 128)]),
        (2, [(0, 64), (64, 64)]),
        (3, [(0, 43), (43, 43), (86, 42)]),
        (4, [(0, 32), (32, 32), (64, 32), (96, 32)]),
    ],
)
def test_128_experts_over_ranks(num_ranks: int, expected: list[tuple[int, int]]):
    assert rank_experts(128, num_ranks) == expected


@pytest.mark.parametrize(("num_gpus", "experts"), [(1, [128]), (2, [64, 64]), (3, [43, 43, 42])])
def test_16_gib_cards_take_a_layer_in_one_group_and_the_prompt_in_one_pass(
    qwen_235b, machine, num_gpus: int, experts: list[int]
):
    plan = make_plan(qwen_235b, machine(num_gpus), workload_of(qwen_235b))
    assert plan.batch_tokens == 10_000
    assert [gpu.num_experts for gpu in plan.gpus] == experts
    assert [gpu.num_groups for gpu in plan.gpus] == [1] * num_gpus
    assert [gpu.buffer_bytes for gpu in plan.gpus] == [2 * count * EXPERT for count in experts]
    for gpu in plan.gpus:
        assert gpu.dense_bytes == 7_430_603_264
        assert gpu.kv_bytes == 192_512 * 12_048
        # 17.18 GB - 7.43 - 2.32 - 0.8 reserve - workspace - buffers is filled with whole experts
        assert gpu.spare_bytes < EXPERT
        assert gpu.resident_experts > 0
    assert plan.host.expert_store == "arena"
    assert plan.host.pinned_bytes == ALL_EXPERTS * EXPERT
    assert plan.host.cpu_experts_bytes == ALL_EXPERTS * 20_054_016


def test_workspace_of_one_gpu_by_hand(qwen_235b, machine):
    plan = make_plan(qwen_235b, machine(1), workload_of(qwen_235b))
    token = 4096 * 4 + 4096 * 2 + 8 * (4 + 4)  # f32 residual, 16-bit norm, ids and weights
    slots = 8 * 2 * (1536 + 4096)  # the gated product and the output of 8 experts; attention takes less
    # 80,000 slots sorted, 128 experts padded to blocks of 128, 16 rows a block, three words an expert
    tables = 4 * (80_000 + 128 * 127 + 80_000 // 16 + 128 + 1 + 2 * 128 + 2) + 8 * 256
    assert plan.gpus[0].workspace_bytes == 10_000 * (token + slots) + tables + 64 * 2**20


def test_workspace_of_one_of_three_gpus_by_hand(qwen_235b, machine):
    plan = make_plan(qwen_235b, machine(3), workload_of(qwen_235b, prompt_tokens=9_999))
    own = 4096 * 4 + 4096 * 2 + 8 * (4 + 4)
    gathered = 4096 * 2 + 8 * (4 + 4) + 8 * 2 * (1536 + 4096) + 4096 * 2  # and the rank's partial sums
    tables = 4 * (79_992 + 128 * 127 + 79_992 // 16 + 128 + 1 + 2 * 128 + 2) + 8 * 256
    for gpu in plan.gpus:
        alignment = gpu.workspace_bytes - 3333 * own - 9_999 * gathered - tables - 64 * 2**20
        assert 0 <= alignment < 10 * 256


def test_a_141_gb_card_holds_every_expert(qwen_235b, machine):
    plan = make_plan(qwen_235b, machine(1, 141 * 10**9, link=55.0), workload_of(qwen_235b))
    (gpu,) = plan.gpus
    assert (gpu.num_groups, gpu.group_experts, gpu.buffer_bytes) == (0, 0, 0)
    assert gpu.resident_experts == ALL_EXPERTS
    assert plan.prefill.path == "resident"
    assert plan.prefill.dma_s == 0
    assert (plan.host.expert_store, plan.host.pinned_bytes, plan.host.cpu_experts_bytes) == ("none", 0, 0)


def test_a_12_gib_card_needs_more_groups_but_keeps_one_pass(qwen_235b, machine):
    plan = make_plan(
        qwen_235b, machine(1, 12 * GIB), workload_of(qwen_235b, context=4096, prompt_tokens=4096)
    )
    (gpu,) = plan.gpus
    # 12.88 - 0.8 - 7.43 - 0.79 (KV of 4096) - 0.88 (workspace) leave 2.98 GB; two buffers of 128 take 2.49
    assert gpu.num_groups == 1
    plan = make_plan(
        qwen_235b, machine(1, 11 * GIB), workload_of(qwen_235b, context=4096, prompt_tokens=4096)
    )
    # 1.90 GB: 97 experts a buffer, so two groups of 64
    assert (plan.gpus[0].num_groups, plan.gpus[0].group_experts) == (2, 64)
    assert plan.prefill.num_passes == 1


def test_a_card_too_small_for_the_prompt_takes_several_passes(qwen_235b, machine):
    plan = make_plan(qwen_235b, machine(1, 21 * GIB // 2), workload_of(qwen_235b, context=10_000))
    assert 256 <= plan.batch_tokens < 10_000
    assert plan.prefill.num_passes == -(-10_000 // plan.batch_tokens)
    assert plan.gpus[0].num_groups == 16  # of 8 experts: the batch matters more


def test_dense_weights_that_do_not_fit_are_refused_with_the_numbers(qwen_235b, machine):
    with pytest.raises(ResourceError) as caught:
        make_plan(qwen_235b, machine(2, 8 * GIB), workload_of(qwen_235b))
    message = str(caught.value)
    # 0.8 + 7.43 + 2.32 GB against 8 GiB
    assert "needs 10.5 GB" in message
    assert "has 8.59 GB" in message
    assert "GPU 0" in message
    assert "krasis-run --ctx" in message


def test_no_room_for_buffers_is_refused_with_the_numbers(qwen_235b, machine):
    work = workload_of(qwen_235b)  # of two GPUs: one would give keys and values to the RAM
    least = least_vram_bytes(qwen_235b, work, 2)
    make_plan(qwen_235b, machine(2, least), work)
    with pytest.raises(ResourceError, match="no room for two expert buffers") as caught:
        make_plan(qwen_235b, machine(2, least - 1), work)
    # 2 x 9.73 MB, 64 MiB of scratch, 64 rows of logits; of 128 tokens the residual stream and its 16 bits,
    # of 256 what two ranks exchange, and that in its order
    assert "needs 132.9 MB" in str(caught.value)
    alone = least_vram_bytes(qwen_235b, work)
    assert make_plan(qwen_235b, machine(1, alone), work).workload.host_kv_layers == 0
    assert make_plan(qwen_235b, machine(1, alone - 1), work).workload.host_kv_layers > 0


def test_whole_layer_vram_is_exactly_enough_for_one_group(qwen_235b, machine):
    work = workload_of(qwen_235b)
    enough = whole_layer_vram_bytes(qwen_235b, work)
    plan = make_plan(qwen_235b, machine(1, enough), work)
    assert (plan.gpus[0].num_groups, plan.prefill.num_passes) == (1, 1)
    assert make_plan(qwen_235b, machine(1, enough - 1), work).gpus[0].num_groups == 2


def test_more_gpus_than_experts_are_refused(qwen_235b, machine):
    with pytest.raises(UsageError, match="got 129; limit 128"):
        make_plan(qwen_235b, machine(129), workload_of(qwen_235b))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (12_048, 10_000)),
        ({"context": 4096}, (4096, 4096)),
        ({"prompt_tokens": 40_000}, (40_960, 40_000)),
        ({"prompt_tokens": 5, "context": 100}, (100, 5)),
    ],
)
def test_workload_defaults(qwen_235b, options: dict[str, int], expected: tuple[int, int]):
    work = workload_of(qwen_235b, **options)
    assert (work.context, work.prompt_tokens) == expected


@pytest.mark.parametrize(
    "options",
    [{"context": 40_961}, {"prompt_tokens": 40_961}, {"prompt_tokens": 9, "context": 8}, {"context": 0}],
)
def test_impossible_workloads_are_refused(qwen_235b, options: dict[str, int]):
    with pytest.raises(UsageError):
        workload_of(qwen_235b, **options)
