"""Shapes of models whose layers differ, by hand: dense layers, shared experts, biases."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from krasis.formats.errors import UnsupportedModelError
from krasis.formats.models.registry import spec_from_hf
from krasis.formats.models.spec import ModelSpec
from krasis.runtime.planning import Figure, Workload, describe_gpu, describe_host, make_plan, sizes_of_shape
from krasis.runtime.planning.presets import shape
from krasis.runtime.planning.shape import shape_of
from krasis.runtime.planning.workspace import workspace_layout
from tests.support.tiny_families import CONFIGS

CONFIG_FILES = Path(__file__).parents[2] / "formats" / "models" / "configs"
GIB = 2**30


def spec_of_file(name: str) -> ModelSpec:
    return spec_from_hf(json.loads((CONFIG_FILES / f"{name}.json").read_text()), name)


def test_a_model_with_dense_layers_and_a_shared_expert() -> None:
    spec = spec_of_file("glm-4.5-air")
    found = shape_of(spec)
    assert (found.num_layers, found.num_expert_layers, found.num_experts) == (46, 45, 128)
    assert (found.mlp_intermediate, found.mlp_columns) == (10944, 2 * 10944)
    assert found.expert_layers == tuple(range(1, 46))
    sizes = sizes_of_shape(spec)
    attention = (96 + 2 * 8 + 96) * 128
    macs = sum(kind.count * kind.dense_macs for kind in sizes.layers)
    assert macs == 4096 * (46 * attention + 45 * (128 + 3 * 1408) + 3 * 10944)
    assert sizes.num_experts == 45 * 128
    assert sizes.kv_bytes(1, "f16") == 188_416


def test_layouts_are_those_that_a_model_is_converted_to() -> None:
    sizes = sizes_of_shape(shape("gpt-oss-20b"))
    assert (sizes.gpu_layout, sizes.cpu_layout) == ("marlin-e2m1-g32-e8m0", "cpu-mxfp4-r32-b32")
    sizes = sizes_of_shape(shape("qwen3-30b-a3b"))
    assert (sizes.gpu_layout, sizes.cpu_layout) == ("marlin-u4b8-g128-bf16", "cpu-q8-r32-b32")


@pytest.mark.parametrize(("name", "layers", "experts"), [("gpt-oss-20b", 24, 32), ("gpt-oss-120b", 36, 128)])
def test_gpt_oss(name: str, layers: int, experts: int) -> None:
    sizes = sizes_of_shape(shape(name))
    assert shape(name) == spec_of_file(name)
    record = 3 * 2880 * 2880 // 1024 * 544  # 4.25 bits a weight
    assert sizes.cpu_experts_bytes == layers * experts * -(-record // 4096) * 4096
    # Biases are a token's own experts' and no products: they cost no time.
    macs = sum(kind.count * kind.dense_macs for kind in sizes.layers)
    assert macs == layers * (2880 * 2 * 64 * 64 + 2880 * 2 * 8 * 64 + 2880 * experts)


def test_a_uniform_model_needs_nothing_more() -> None:
    found = shape_of(shape("qwen3-30b-a3b"))
    assert (found.num_expert_layers, found.mlp_columns) == (48, 0)
    assert "mlp" not in workspace_layout(found, 100, 1).regions


def test_layers_without_experts_cost_none_of_their_time() -> None:
    sizes = sizes_of_shape(spec_of_file("glm-4.5-air"))
    host = describe_host(
        (describe_gpu(24 * GIB),),
        ram_bytes=Figure(256 * GIB, "given", ""),
        num_cores=Figure(16, "given", ""),
    )
    plan = make_plan(sizes, host, Workload(8192, 4096, "bf16"))
    gpu = plan.gpus[0]
    assert gpu.num_groups > 0
    link = host.gpus[0].link_gbps.value * 1e9
    assert gpu.resident_experts < 45 * 128 / 2  # so that a first prompt copies all
    streamed = 45 * 128 * sizes.gpu_expert_bytes
    assert plan.prefill.dma_s == pytest.approx(plan.prefill.num_passes * streamed / link, rel=0.01)


def test_regions_of_mlps_lie_apart_from_what_lives_with_them() -> None:
    layout = workspace_layout(spec_from_hf(CONFIGS["qwen2_moe"], "qwen2_moe"), 50, 1)
    together = ("hidden", "x", "ids", "weights", "normed", "router_logits", "mlp", "mlp_gated", "shared")
    regions = [layout.regions[name] for name in (*together, "shared_gate")]
    spans = sorted((region.offset_bytes, region.offset_bytes + region.num_bytes) for region in regions)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert layout.total_bytes >= spans[-1][1]


def test_the_runtime_has_no_buffers_for_blocks_it_does_not_know() -> None:
    spec = spec_of_file("deepseek-v4-flash")
    with pytest.raises(UnsupportedModelError, match="does not know all of the model's blocks"):
        shape_of(spec)
