"""Model sizes against figures worked out by hand and those of the published models."""

from __future__ import annotations

import dataclasses

import pytest

from krasis.formats.errors import UsageError
from krasis.runtime.context_size import tokens_in_vram
from krasis.runtime.planning import ModelSizes, Workload, count_parameters, make_plan, sizes_of_shape
from krasis.runtime.planning.kv_form import kv_scratch_bytes
from krasis.runtime.planning.presets import SHAPES, shape


def test_qwen3_235b_has_the_published_parameter_counts():
    counted = count_parameters(shape("qwen3-235b-a22b"))
    assert counted.total == 235_093_634_560  # the checkpoint's safetensors index
    assert counted.active == pytest.approx(22.2e9, rel=0.005)
    assert counted.experts == 227_096_395_776


def test_qwen3_30b_has_the_published_parameter_counts():
    counted = count_parameters(shape("qwen3-30b-a3b"))
    assert counted.total == 30_532_122_624  # the checkpoint's safetensors index
    assert counted.active == pytest.approx(3.35e9, rel=0.005)


def test_a_tied_head_is_counted_once():
    spec = shape("qwen3-30b-a3b")
    tied = count_parameters(dataclasses.replace(spec, tied=True))
    assert count_parameters(spec).total - tied.total == 151_936 * 2048
    assert count_parameters(spec).active - tied.active == 151_936 * 2048


def test_experts_of_qwen3_235b_weigh_what_the_design_says(qwen_235b: ModelSizes):
    assert qwen_235b.gpu_experts_bytes == pytest.approx(117e9, rel=0.002)
    assert qwen_235b.cpu_experts_bytes == pytest.approx(241e9, rel=0.002)


def test_sizes_of_a_shape_equal_the_hand_computed(qwen_235b: ModelSizes):
    assert sizes_of_shape(shape("qwen3-235b-a22b")) == qwen_235b


def test_dense_bytes_by_hand(qwen_235b: ModelSizes):
    qkv, output = 9216 * 4096, 4096 * 8192
    scales = 4 * (9216 + 4096)
    own = 2 * (128 * 4096 + 4096 + 4096 + 128 + 128)
    head = 151_936 * 4096 + 4 * 151_936
    assert qwen_235b.dense_bytes == 94 * (qkv + output + scales + own) + head + 2 * 4096


@pytest.mark.parametrize(("dtype", "expected"), [("f16", 192_512), ("bf16", 192_512), ("f32", 385_024)])
def test_kv_bytes_of_one_token(qwen_235b: ModelSizes, dtype: str, expected: int):
    assert qwen_235b.kv_bytes(1, dtype) == expected  # 94 layers x (k, v) x 4 heads x 128 x 2 or 4 bytes


def test_unknown_kv_dtype_is_refused(qwen_235b: ModelSizes):
    with pytest.raises(UsageError, match="f16, bf16, f32, int8"):
        qwen_235b.kv_bytes(1, "q8")


def test_8_bits_have_a_scale_a_key(qwen_235b: ModelSizes, machine):
    assert qwen_235b.kv_bytes(10, "int8") == 10 * 94 * 2 * 4 * (128 + 4)
    work = Workload(8192, 4096, "int8")
    assert make_plan(qwen_235b, machine(0), work).host.kv_bytes == 8192 * 94 * 2 * 4 * 132
    # A GPU attends to floats of them, of a layer's 4 heads at once: 16.8 MB.
    plan = make_plan(qwen_235b, machine(1), work)
    assert plan.gpus[0].kv_bytes == 8192 * (94 * 2 * 4 * 132 + 2 * 4 * 128 * 2)
    assert plan.workload.kv_dtype == "int8"


def test_twice_the_context_in_8_bits(qwen_235b: ModelSizes):
    wide, narrow = (qwen_235b.tokens_within(10e9, kind) for kind in ("bf16", "int8"))
    assert 1.9 < narrow / wide < 1.94
    vram_bytes = 80 * 2**30
    assert tokens_in_vram(qwen_235b, vram_bytes, "bf16") == 89_088  # 17.2 GB, 20 % of it
    assert tokens_in_vram(qwen_235b, vram_bytes, "int8") == 173_056


def test_latents_stay_in_16_bits_on_a_gpu(machine):
    sizes = sizes_of_shape(shape("deepseek-v2-lite"))
    work = Workload(8192, 4096, "int8")
    plan = make_plan(sizes, machine(1), work)
    assert plan.workload.kv_dtype == "bf16"
    assert plan.gpus[0].kv_bytes == sizes.kv_bytes(8192, "bf16") == 27 * 8192 * 576 * 2
    assert make_plan(sizes, machine(0), work).host.kv_bytes == 27 * 8192 * (576 + 8)


def test_floats_of_8_bits_have_a_bounded_scratch(qwen_235b: ModelSizes):
    a_head = 2 * 128 * 2  # bytes of a position
    for tokens, expected in ((1000, 4000), (100_000, 131_072), (200_000, 200_000)):
        assert kv_scratch_bytes(qwen_235b.spec, tokens) == expected * a_head


def test_an_unknown_shape_names_the_known_ones():
    with pytest.raises(UsageError) as caught:
        shape("gpt-9")
    assert all(name in str(caught.value) for name in SHAPES)
