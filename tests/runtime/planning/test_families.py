"""Models whose layers differ, by figures of their configurations written out by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from krasis.formats.errors import ResourceError, UnsupportedModelError, UsageError
from krasis.formats.models.mlps import Experts, GatedMlp
from krasis.formats.models.registry import spec_from_hf
from krasis.formats.models.spec import Layer, ModelSpec
from krasis.formats.models.tensors import blobs
from krasis.runtime.planning import (
    ModelSizes,
    Plan,
    Workload,
    count_parameters,
    make_plan,
    make_workload,
    sizes_of_bundle,
    sizes_of_shape,
)
from krasis.runtime.planning.host import cpu_workspace_bytes
from krasis.runtime.planning.placement import gpu_workspace_bytes
from krasis.runtime.planning.presets import SHAPES, shape
from krasis.runtime.planning.report import plan_to_json, plan_to_text
from krasis.runtime.planning.shape import shape_of
from krasis.runtime.state.kv_store import KvStore
from tests.support.planning import MIXER, mixed_spec

CONFIGS = Path(__file__).parents[2] / "formats" / "models" / "configs"
GIB = 2**30

# GLM-4.5-Air: 46 layers of 4096, 96 heads of 128 and 8 for keys; the first MLP is dense, 10,944 wide, the
# others are 128 experts, 1,408 wide, top 8, and a shared one of the same width.
GLM_QKV, GLM_OUTPUT = (96 + 2 * 8) * 128 * 4096, 4096 * 96 * 128
GLM_EXPERT = 3 * 4096 * 1408
GLM_DENSE, GLM_ROUTER = 3 * 4096 * 10_944, 128 * 4096
GLM_GPU_RECORD = -(-(GLM_EXPERT // 2 + GLM_EXPERT // 128 * 2) // 4096) * 4096
GLM_CPU_RECORD = -(-GLM_EXPERT // 32 * 34 // 4096) * 4096
# Mixtral-8x7B: 32 layers of 4096, 32 heads of 128 and 8 for keys, 8 experts, 14,336 wide, top 2.
MIX_ATTENTION = 4096 * (32 + 2 * 8) * 128 + 4096 * 4096
MIX_EXPERT = 3 * 4096 * 14_336


@pytest.fixture(scope="module")
def glm() -> ModelSizes:
    return sizes_of_shape(shape("glm-4.5-air"))


@pytest.fixture(scope="module")
def mixtral() -> ModelSizes:
    return sizes_of_shape(shape("mixtral-8x7b"))


@pytest.mark.parametrize("name", SHAPES)
def test_presets_are_the_published_models(name: str) -> None:
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    spec = shape(name)
    assert dataclasses.replace(spec_from_hf(config, name), max_positions=spec.max_positions) == spec
    sizes = sizes_of_shape(spec)
    assert make_workload(spec).context <= spec.max_positions
    assert sizes.num_layers == len(spec.layers)


def test_parameters_of_glm_by_hand(glm: ModelSizes) -> None:
    attention = GLM_QKV + GLM_OUTPUT + (96 + 2 * 8) * 128  # biases of q, k and v
    norms = 2 * 4096
    with_experts = GLM_ROUTER + 128 + (128 + 1) * GLM_EXPERT  # the router's bias; the shared expert
    total = 46 * (attention + norms) + GLM_DENSE + 45 * with_experts + 2 * 151_552 * 4096 + 4096
    counted = count_parameters(glm.spec)
    assert counted.total == total
    assert counted.experts == 45 * 128 * GLM_EXPERT
    assert counted.active == total - 45 * 120 * GLM_EXPERT


def test_bytes_of_glm_by_hand(glm: ModelSizes) -> None:
    def int8(rows: int, columns: int) -> int:
        return rows * columns + 4 * rows

    rows = (96 + 2 * 8) * 128
    attention = int8(rows, 4096) + 4 * rows + int8(4096, 96 * 128) + 2 * 4096
    dense = int8(2 * 10_944, 4096) + int8(4096, 10_944) + 2 * 4096
    shared = int8(2 * 1408, 4096) + int8(4096, 1408)
    routed = 2 * GLM_ROUTER + 4 * 128 + shared + 2 * 4096
    first, others = glm.layers
    assert (first.count, first.dense_bytes, first.experts) == (1, attention + dense, None)
    assert (others.count, others.dense_bytes) == (45, attention + routed)
    assert glm.end_bytes == int8(151_552, 4096) + 2 * 4096
    assert glm.dense_bytes == 46 * attention + dense + 45 * routed + glm.end_bytes
    assert glm.embedding_bytes == 2 * 151_552 * 4096
    assert (glm.gpu_expert_bytes, glm.cpu_expert_bytes) == (GLM_GPU_RECORD, GLM_CPU_RECORD)
    assert glm.num_experts == 45 * 128
    assert glm.gpu_experts_bytes == 45 * 128 * GLM_GPU_RECORD
    assert glm.kv_bytes(1, "bf16") == 46 * 2 * 8 * 128 * 2
    assert glm.routed_cpu_bytes == 45 * 8 * GLM_CPU_RECORD


def test_work_of_glm_by_hand(glm: ModelSizes) -> None:
    first, others = glm.layers
    assert first.dense_macs == GLM_QKV + GLM_OUTPUT + GLM_DENSE
    assert others.dense_macs == GLM_QKV + GLM_OUTPUT + GLM_ROUTER + GLM_EXPERT
    assert others.experts is not None
    assert others.experts.weights == GLM_EXPERT


def test_prefill_of_glm_on_one_gpu(glm: ModelSizes, machine) -> None:
    """Experts of 45 layers are streamed; the first layer's MLP is dense work."""
    plan = make_plan(glm, machine(1), make_workload(glm.spec))
    macs = 46 * (GLM_QKV + GLM_OUTPUT) + GLM_DENSE + 45 * (GLM_ROUTER + GLM_EXPERT)
    assert plan.prefill.dense_s == pytest.approx(2 * 10_000 * macs / 34e12, rel=1e-9)
    pairs = 10_000 * 10_001 // 2
    attention = 46 * 2 * 2 * 96 * 128 * pairs / 34e12
    assert plan.prefill.attention_s == pytest.approx(attention / 0.8, rel=1e-9)
    rows = 10_000 * 8 + 20 * 128
    assert plan.prefill.expert_s == pytest.approx(2 * 45 * rows * GLM_EXPERT / 17e12, rel=1e-6)
    assert plan.prefill.dma_s == pytest.approx(45 * 128 * GLM_GPU_RECORD / 13e9, rel=1e-6)
    assert plan.gpus[0].num_experts == 128
    assert plan.gpus[0].dense_bytes == glm.dense_bytes


def test_decode_of_glm(glm: ModelSizes, machine) -> None:
    """Shared expert and first MLP are read with the dense weights, on the GPU where there is one; 45 layers
    hand over.
    """
    work = make_workload(glm.spec)
    kv = 46 * 4096 * 10_000
    on_cpu = make_plan(glm, machine(0), work).decode
    assert on_cpu.cpu_experts_bytes == 45 * 8 * GLM_CPU_RECORD
    reads = glm.dense_bytes + kv + 45 * 8 * GLM_CPU_RECORD
    threads_s = 46 * 120e-6 + 45 * 70e-6
    assert on_cpu.total_s == pytest.approx(reads / (0.8 * 140e9) + threads_s, rel=1e-9)
    plan = make_plan(glm, machine(1), work)
    cold = 1 - plan.gpus[0].resident_experts / (45 * 128)
    assert plan.decode.handover_s == pytest.approx(45 * 85e-6)
    assert plan.decode.dense_s == pytest.approx(glm.dense_bytes / (0.8 * 224e9))
    assert plan.decode.cpu_experts_s == pytest.approx(
        45 * 8 * cold * GLM_CPU_RECORD / (0.8 * 140e9) + 45 * 70e-6, rel=1e-6
    )


def test_layers_without_experts_exchange_nothing(glm: ModelSizes, machine) -> None:
    plan = make_plan(glm, machine(2), make_workload(glm.spec))
    assert plan.prefill.exchange_s == pytest.approx(45 * 2 * 2 * 10_000 * 4096 / 2 / 13e9, rel=1e-9)


def test_all_experts_of_glm_in_vram(glm: ModelSizes, machine) -> None:
    plan = make_plan(glm, machine(1, 80 * GIB), make_workload(glm.spec))
    (gpu,) = plan.gpus
    assert (plan.prefill.path, gpu.num_groups, gpu.resident_experts) == ("resident", 0, 45 * 128)
    assert gpu.resident_bytes == 45 * 128 * GLM_GPU_RECORD
    assert "all 5,760 experts live in VRAM" in plan_to_text(plan)


def test_workspace_has_room_for_the_widest_mlp(glm: ModelSizes) -> None:
    """With few choices a token, what counts is the dense layer's product beside router logits."""
    narrow = _with_top_k(glm.spec, 1)
    token = 4096 * 4 + 4096 * 2 + 8
    routing = 4096 * 4 + 128 * 4 + 2 * (2 * 10_944 + 10_944)
    tables = 4 * (1000 + 128 * 127 + 1000 // 16 + 128 + 1 + 2 * 128 + 2) + 8 * 256
    found = gpu_workspace_bytes(narrow, 1000, 1) - 1000 * (token + routing) - tables - 64 * 2**20
    assert 0 <= found < 10 * 256
    wide = dataclasses.replace(glm.spec, layers=glm.spec.layers[1:])
    assert cpu_workspace_bytes(glm.spec, 10) > cpu_workspace_bytes(wide, 10)


def _with_top_k(spec: ModelSpec, top_k: int) -> ModelSpec:
    def changed(layer: Layer) -> Layer:
        if not isinstance(layer.mlp, Experts):
            return layer
        router = dataclasses.replace(layer.mlp.router, top_k=top_k)
        return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, router=router))

    return dataclasses.replace(spec, layers=tuple(changed(layer) for layer in spec.layers))


def test_mixtral_by_hand(mixtral: ModelSizes, machine) -> None:
    counted = count_parameters(mixtral.spec)
    assert (
        counted.total
        == 32 * (MIX_ATTENTION + 8 * MIX_EXPERT + 8 * 4096 + 2 * 4096) + 2 * 32_000 * 4096 + 4096
    )
    assert counted.total == 46_702_792_704  # the checkpoint's safetensors index
    (kind,) = mixtral.layers
    int8_rows = (32 + 2 * 8) * 128 + 4096
    assert kind.dense_bytes == MIX_ATTENTION + 4 * int8_rows + 2 * (8 * 4096 + 2 * 4096)
    assert mixtral.gpu_expert_bytes == MIX_EXPERT // 2 + MIX_EXPERT // 128 * 2
    assert mixtral.cpu_expert_bytes == MIX_EXPERT // 32 * 34
    plan = make_plan(mixtral, machine(0), make_workload(mixtral.spec))
    assert plan.decode.cpu_experts_bytes == 32 * 2 * MIX_EXPERT // 32 * 34
    plan = make_plan(mixtral, machine(1), make_workload(mixtral.spec))
    rows = 10_000 * 2 + 20 * 8
    assert plan.prefill.expert_s == pytest.approx(2 * 32 * rows * MIX_EXPERT / 17e12, rel=1e-6)
    assert plan.prefill.dense_s == pytest.approx(
        2 * 10_000 * 32 * (MIX_ATTENTION + 8 * 4096) / 34e12, rel=1e-9
    )


def test_more_gpus_than_a_layer_has_experts_are_refused(mixtral: ModelSizes, machine) -> None:
    with pytest.raises(UsageError, match="got 9; limit 8"):
        make_plan(mixtral, machine(9), make_workload(mixtral.spec))


# ---- a bundle ----------------------------------------------------------------------------------------------


def manifest_of(spec: ModelSpec, gpu_bytes: int, cpu_bytes: int, float_layer: int) -> SimpleNamespace:
    """What the planner reads of a manifest. float_layer: its plain tensors have 4 bytes a number."""
    item_bytes = {"I8": 1, "F32": 4, "I32": 4}
    found = []
    for blob in blobs(spec):
        plain = 4 if blob.name.startswith(f"layers.{float_layer}.") else 2
        num_bytes = math.prod(blob.shape) * item_bytes.get(blob.dtype or "", plain)
        found.append(SimpleNamespace(name=blob.name, tier="dense", num_bytes=num_bytes))
    for index, layer in enumerate(spec.layers):
        if layer.experts is not None:
            for tier, one in (("gpu", gpu_bytes), ("cpu", cpu_bytes)):
                name = f"layers.{index}.experts.{tier}"
                found.append(SimpleNamespace(name=name, tier=tier, num_bytes=layer.experts.count * one))
    return SimpleNamespace(spec=spec, blobs=found, layouts={"gpu": "g", "cpu": "c"})


def test_a_bundle_is_summed_by_layer(glm: ModelSizes) -> None:
    """Bytes over layers times experts would give 45/46 of an expert."""
    sizes = sizes_of_bundle(manifest_of(glm.spec, GLM_GPU_RECORD, GLM_CPU_RECORD, float_layer=-1))
    assert sizes == dataclasses.replace(glm, source="bundle", gpu_layout="g", cpu_layout="c")


def test_layers_of_a_bundle_that_weigh_more_are_another_kind(glm: ModelSizes) -> None:
    sizes = sizes_of_bundle(manifest_of(glm.spec, GLM_GPU_RECORD, 0, float_layer=7))
    assert [kind.count for kind in sizes.layers] == [1, 44, 1]
    plain = GLM_ROUTER + 2 * 4096
    assert sizes.layers[2].dense_bytes - sizes.layers[1].dense_bytes == 2 * plain
    assert sizes.dense_bytes == glm.dense_bytes + 2 * plain
    assert sizes.cpu_expert_bytes == sizes.cpu_experts_bytes == 0


# ---- layers that no model of today mixes -------------------------------------------------------------------


def test_experts_that_differ_from_layer_to_layer(machine) -> None:
    sizes = sizes_of_shape(mixed_spec())
    wide, narrow, dense = sizes.layers
    assert wide.experts is not None
    assert narrow.experts is not None
    assert dense.experts is None
    assert (wide.experts.weights, narrow.experts.weights) == (3 * 512 * 512, 3 * 512 * 256)
    assert sizes.num_experts == 2 * 32 + 3 * 12
    assert sizes.gpu_expert_bytes == wide.experts.gpu_bytes > narrow.experts.gpu_bytes
    assert sizes.gpu_experts_bytes == 64 * wide.experts.gpu_bytes + 36 * narrow.experts.gpu_bytes
    plan = make_plan(sizes, machine(0), make_workload(sizes.spec))
    assert plan.decode.cpu_experts_bytes == 8 * wide.experts.cpu_bytes + 6 * narrow.experts.cpu_bytes
    three = make_plan(sizes, machine(3), make_workload(sizes.spec))
    assert [gpu.resident_experts for gpu in three.gpus] == [2 * 11 + 3 * 4, 2 * 11 + 3 * 4, 2 * 10 + 3 * 4]
    assert sum(gpu.resident_bytes for gpu in three.gpus) == sizes.gpu_experts_bytes
    with pytest.raises(UsageError, match="got 13; limit 12"):
        make_plan(sizes, machine(13), make_workload(sizes.spec))
    with pytest.raises(UnsupportedModelError, match="not all alike"):
        shape_of(sizes.spec)  # the GPU runtime's tables


@pytest.mark.parametrize("vram_bytes", [920_000_000, 925_000_000, 930_000_000, 940_000_000, 2 * GIB])
@pytest.mark.parametrize("num_gpus", [1, 2, 3])
def test_mixed_layers_never_exceed_the_hardware(machine, num_gpus: int, vram_bytes: int) -> None:
    sizes = sizes_of_shape(mixed_spec())
    plan = make_plan(sizes, machine(num_gpus, vram_bytes), Workload(3000, 2000))
    for gpu in plan.gpus:
        parts = [
            value
            for name, value in dataclasses.asdict(gpu).items()
            if name.endswith("_bytes") and name != "vram_bytes"
        ]
        assert min(parts) >= 0
        assert sum(parts) == vram_bytes
    host = plan.host
    assert host.pinned_bytes + host.page_cache_bytes in (0, sizes.gpu_experts_bytes)
    assert plan.prefill.dma_s <= sizes.gpu_experts_bytes * plan.prefill.num_passes / 13e9
    assert plan.decode.tokens_per_s > 0


def test_a_plan_is_json_and_text_for_every_preset(machine) -> None:
    for name in SHAPES:
        plan = plan_of(name, machine)
        record = json.loads(json.dumps(plan_to_json(plan)))
        assert ModelSpec.from_json(record["sizes"]["model"]) == shape(name)
        assert sum(kind["count"] for kind in record["sizes"]["layers"]) == len(shape(name).layers)
        assert shape(name).family in plan_to_text(plan)


@pytest.mark.parametrize(
    ("name", "layers", "channels"),
    [
        ("deepseek-v3", 61, 512 + 64),
        ("kimi-k2.5", 61, 512 + 64),
        ("glm-4.7-flash", 47, 512 + 64),
        ("deepseek-v2-lite", 27, 512 + 64),
    ],
)
def test_a_latent_is_all_that_a_token_keeps(name: str, layers: int, channels: int) -> None:
    """In the plan and in the cache."""
    spec = shape(name)
    assert sizes_of_shape(spec).kv_bytes(1000, "f16") == 1000 * layers * channels * 2
    store = KvStore(spec, 128, "f16")
    assert (store.keys_bytes, store.values_bytes) == (128 * layers * channels * 2, 0)
    assert store.export(store.open(), 3, 7)[1].shape == (1, 7, 0)


def test_deepseek_v3_has_the_published_parameters() -> None:
    counted = count_parameters(shape("deepseek-v3"))
    assert counted.total == 671_026_419_200  # the checkpoint's 61 layers
    assert counted.active == pytest.approx(37e9, rel=0.02)


def plan_of(name: str, machine) -> Plan:
    sizes = sizes_of_shape(shape(name))
    return make_plan(sizes, machine(2, 48 * GIB, ram_bytes=2**41), make_workload(sizes.spec, context=4096))


def test_a_model_without_experts_is_refused() -> None:
    spec = dataclasses.replace(mixed_spec(), layers=(Layer(MIXER, GatedMlp(1024)),) * 2)
    with pytest.raises(UnsupportedModelError, match="routed experts"):
        sizes_of_shape(spec)


def test_a_small_card_says_what_glm_needs(glm: ModelSizes, machine) -> None:
    with pytest.raises(ResourceError, match="dense weights and the KV cache do not fit"):
        make_plan(glm, machine(1, 6 * GIB), make_workload(glm.spec))
