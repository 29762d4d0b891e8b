"""For any model and machine: nothing exceeds the hardware, and more hardware never makes it worse."""

from __future__ import annotations

import dataclasses

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from krasis.formats.errors import ResourceError
from krasis.formats.models.mixers import Attention
from krasis.formats.models.mlps import Experts, GatedMlp, Router
from krasis.formats.models.rope import Rope
from krasis.formats.models.spec import Layer, ModelSpec, Norm
from krasis.runtime.planning import (
    Figure,
    HardwareSpec,
    ModelSizes,
    Plan,
    Workload,
    describe_gpu,
    describe_host,
    make_plan,
)
from krasis.runtime.planning.planner import least_vram_bytes
from krasis.runtime.planning.sizes import LayerSizes
from tests.support.planning import uniform_sizes

EXAMPLES = settings(max_examples=80, deadline=None, derandomize=True)


@st.composite
def models(draw: st.DrawFn) -> ModelSizes:
    hidden, intermediate = 64 * draw(st.integers(1, 64)), 64 * draw(st.integers(1, 24))
    num_experts = draw(st.integers(1, 160))
    spec = model(
        num_layers=draw(st.integers(1, 96)),
        hidden=hidden,
        heads=4 * draw(st.integers(1, 16)),
        num_experts=num_experts,
        top_k=draw(st.integers(1, min(16, num_experts))),
        intermediate=intermediate,
    )
    weights = 3 * hidden * intermediate
    return uniform_sizes(
        spec,
        dense_bytes=draw(st.integers(10**6, 10**9)),
        embedding_bytes=2 * 4096 * hidden,
        gpu_expert_bytes=-(-weights * 33 // 64 // 4096) * 4096,
        cpu_expert_bytes=-(-weights * 17 // 16 // 4096) * 4096,
    )


def model(
    *, num_layers: int, hidden: int, heads: int, num_experts: int, top_k: int, intermediate: int
) -> ModelSpec:
    """Equal layers with experts, like Qwen3's."""
    mixer = Attention(heads, 4, 64, Rope(64, 1e6), 0.125, qk_norm="head")
    layer = Layer(mixer, Experts(num_experts, intermediate, Router(top_k)))
    return ModelSpec("qwen3_moe", hidden, 4096, 65536, Norm(1e-6), (layer,) * num_layers)


@st.composite
def mixed_models(draw: st.DrawFn) -> ModelSizes:
    """The same with dense layers, and layers of fewer and smaller experts beside a shared one."""
    base = draw(models())
    (kind,) = base.layers
    experts = kind.experts
    assert experts is not None
    fewer = draw(st.integers(1, experts.count))
    small = dataclasses.replace(
        experts,
        count=fewer,
        top_k=min(experts.top_k, fewer),
        gpu_bytes=4096 * draw(st.integers(1, experts.gpu_bytes // 4096)),
    )
    mlp = Experts(fewer, 64, Router(small.top_k), shared=GatedMlp(64 * draw(st.integers(1, 64))))
    dense = GatedMlp(64 * draw(st.integers(1, 256)))
    numbers = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    others = [
        LayerSizes(Layer(kind.layer.mixer, kind_mlp), count, kind.dense_bytes, kind.dense_macs, sizes)
        for count, kind_mlp, sizes in zip(numbers, (dense, mlp), (None, small), strict=True)
        if count
    ]
    layers = (kind, *others)
    spec = dataclasses.replace(base.spec, layers=tuple(one.layer for one in layers for _ in range(one.count)))
    return dataclasses.replace(base, spec=spec, layers=layers)


any_models = st.one_of(models(), mixed_models())
workloads = st.builds(
    lambda prompt, more: Workload(prompt + more, prompt), st.integers(1, 20_000), st.integers(0, 4096)
)
rates = st.floats(0.1, 1000)


def hardware(num_gpus: int, vram: int, link: float, ram: int = 2**42, tflops: float = 40.0) -> HardwareSpec:
    gpu = describe_gpu(vram, link_gbps=link, memory_gbps=300.0, bf16_tflops=tflops)
    return describe_host([gpu] * num_gpus, ram_bytes=Figure(ram, "given"), num_cores=Figure(8, "given"))


def fewest_experts(sizes: ModelSizes) -> int:
    return min(experts.count for _, experts in sizes.expert_layers)


def plan_or_none(sizes: ModelSizes, machine: HardwareSpec, work: Workload) -> Plan | None:
    try:
        return make_plan(sizes, machine, work)
    except ResourceError:
        return None


@EXAMPLES
@given(any_models, workloads, st.integers(1, 4), st.integers(2**20, 2**36), st.integers(0, 2**34))
def test_more_vram_never_gives_more_groups_or_a_refusal(sizes, work, num_gpus, beyond, more):
    assume(num_gpus <= fewest_experts(sizes))
    vram = least_vram_bytes(sizes, work) - 2**20 + beyond
    small = plan_or_none(sizes, hardware(num_gpus, vram, 13.0), work)
    large = plan_or_none(sizes, hardware(num_gpus, vram + more, 13.0), work)
    assume(small is not None)
    assert large is not None
    for before, after in zip(small.gpus, large.gpus, strict=True):
        # Experts leave VRAM again where that makes room for a larger batch, and the prefill sooner.
        assert after.num_groups <= before.num_groups or large.batch_tokens > small.batch_tokens
    if large.gpus[0].num_groups:  # with every expert in VRAM, smaller passes cost nothing
        assert large.batch_tokens >= small.batch_tokens


@EXAMPLES
@given(any_models, workloads, st.integers(1, 4), st.integers(2**20, 2**36), rates, rates, rates)
def test_more_link_speed_never_gives_a_longer_prefill(sizes, work, num_gpus, beyond, link, more, tflops):
    assume(num_gpus <= fewest_experts(sizes))
    vram = least_vram_bytes(sizes, work, num_gpus) + beyond
    slow = make_plan(sizes, hardware(num_gpus, vram, link, tflops=tflops), work)
    fast = make_plan(sizes, hardware(num_gpus, vram, link + more, tflops=tflops), work)
    assert fast.prefill.total_s <= slow.prefill.total_s
    assert fast.start_up.warm_s <= slow.start_up.warm_s
    # A faster link may bring experts in time for a larger batch; it never makes it smaller.
    assert fast.batch_tokens >= slow.batch_tokens


@EXAMPLES
@given(
    any_models, workloads, st.integers(0, 4), st.integers(2**20, 2**36), st.integers(2**20, 2**40), st.data()
)
def test_the_plan_never_exceeds_the_hardware(sizes, work, num_gpus, beyond, ram, data):
    assume(num_gpus <= fewest_experts(sizes))
    vram = least_vram_bytes(sizes, work, max(1, num_gpus)) + beyond
    if data.draw(st.booleans()):
        ram += sizes.cpu_experts_bytes
    plan = plan_or_none(sizes, hardware(num_gpus, vram, 13.0, ram), work)
    assume(plan is not None)
    for gpu in plan.gpus:
        parts = [
            gpu.reserve_bytes,
            gpu.dense_bytes,
            gpu.kv_bytes,
            gpu.workspace_bytes,
            gpu.buffer_bytes,
            gpu.resident_bytes,
            gpu.spare_bytes,
        ]
        assert min(parts) >= 0
        assert sum(parts) == gpu.vram_bytes
        assert gpu.num_groups * gpu.group_experts >= gpu.num_experts or gpu.num_groups == 0
        assert gpu.buffer_bytes == 2 * gpu.group_experts * sizes.gpu_expert_bytes
    host = dataclasses.asdict(plan.host)
    parts = [
        value
        for name, value in host.items()
        if name.endswith("_bytes") and name not in ("ram_bytes", "from_disk_bytes")
    ]
    assert min(parts) >= 0
    assert sum(parts) == plan.host.ram_bytes
    if plan.host.expert_store == "ring":
        assert plan.host.page_cache_bytes + plan.host.from_disk_bytes <= sizes.gpu_experts_bytes
    assert 1 <= plan.batch_tokens <= work.prompt_tokens
    assert plan.prefill.total_s > 0
    assert plan.decode.total_s > 0


@EXAMPLES
@given(any_models, workloads, st.integers(1, 4), st.integers(2**20, 2**36))
def test_every_expert_belongs_to_one_rank(sizes, work, num_gpus, beyond):
    assume(num_gpus <= fewest_experts(sizes))
    plan = make_plan(sizes, hardware(num_gpus, least_vram_bytes(sizes, work, num_gpus) + beyond, 13.0), work)
    owned = [
        expert for gpu in plan.gpus for expert in range(gpu.first_expert, gpu.first_expert + gpu.num_experts)
    ]
    assert owned == list(range(sizes.most_experts))


def test_groups_do_not_jump_with_the_batch():
    """Experts smaller than a token's activations: what one more token leaves must not change groups."""
    spec = model(num_layers=2, hidden=64, heads=64, num_experts=160, top_k=1, intermediate=64)
    sizes = uniform_sizes(
        spec,
        dense_bytes=10**6,
        embedding_bytes=2 * 4096 * 64,
        gpu_expert_bytes=4096,
        cpu_expert_bytes=16384,
    )
    work = Workload(20_000, 20_000)
    least = least_vram_bytes(sizes, work)
    groups = [
        make_plan(sizes, hardware(1, least + extra, 13.0), work).gpus[0].num_groups
        for extra in range(0, 400_000, 1000)
    ]
    assert groups == sorted(groups, reverse=True)
    assert set(groups) >= {20}  # of 8 experts
