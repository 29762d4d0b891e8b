"""Formats by memory, and ranges where assumptions decide."""

from __future__ import annotations

from dataclasses import replace

import pytest

from krasis.formats.errors import UsageError
from krasis.runtime.planning import Figure, describe_host, make_plan
from krasis.runtime.planning.formats import choose_formats
from krasis.runtime.planning.named_parts import named_gpus
from krasis.runtime.planning.planner import make_workload
from krasis.runtime.planning.presets import shape
from krasis.runtime.planning.ranges import HIGHER, LOWER, ranges_of

GIB = 2**30
SPEC = shape("qwen3-235b-a22b")
WORK = make_workload(SPEC)


def host(ram_gib, gpus="rtx4090", **figures):
    return describe_host(
        named_gpus(gpus) if gpus else (),
        ram_bytes=Figure(ram_gib * GIB, "given"),
        num_cores=Figure(32, "given"),
        **figures,
    )


@pytest.mark.parametrize(
    ("ram_gib", "gpus", "cpu_format", "reason"),
    [
        (512, "rtx4090", "q8", "beside the GPU's experts"),
        (280, "rtx4090", "int4", "read from the disk"),  # q8 alone would fit
        (192, "rtx4090", "int4", "does not fit in RAM"),
        (280, "", "q8", "whole"),
        (192, "", "int4", "does not fit in RAM"),
    ],
)
def test_the_best_that_fits(ram_gib, gpus, cpu_format, reason):
    chosen = choose_formats(SPEC, host(ram_gib, gpus), WORK)
    assert chosen.cpu_format == cpu_format
    assert reason in chosen.reason
    assert (chosen.sizes.cpu_layout == "cpu-q8-r32-b32") == (cpu_format == "q8")


def test_as_asked_for():
    chosen = choose_formats(SPEC, host(512), WORK, cpu_format="int4", gpu_group="32")
    assert (chosen.cpu_format, chosen.reason) == ("int4", "as asked for")
    assert chosen.sizes.gpu_layout == "marlin-u4b8-g32-bf16"
    larger = choose_formats(SPEC, host(512), WORK, cpu_format="int4")
    assert chosen.bundle_bytes > larger.bundle_bytes


def test_a_group_that_does_not_divide():
    spec = shape("qwen1.5-moe-a2.7b")
    layers = []
    for layer in spec.layers:
        experts = replace(layer.experts, intermediate=1472)  # 23 * 64
        mlp = experts if layer.mlp is layer.experts else replace(layer.mlp, experts=experts)
        layers.append(replace(layer, mlp=mlp))
    odd = replace(spec, layers=tuple(layers))
    with pytest.raises(UsageError, match="--gpu-group 128 does not divide"):
        choose_formats(odd, host(64), make_workload(odd), gpu_group="128")
    assert "-g64-" in choose_formats(odd, host(64), make_workload(odd)).sizes.gpu_layout


def test_ranges_are_of_what_is_assumed():
    sizes = choose_formats(SPEC, host(512, ""), WORK).sizes
    plan = make_plan(sizes, host(512, ""), WORK)
    ranges = ranges_of(plan)
    # Without a GPU decode is reading RAM, and that is assumed.
    low, high = ranges.decode_tokens_per_s
    assert low == pytest.approx(LOWER * plan.decode.tokens_per_s, rel=0.02)
    assert high == pytest.approx(HIGHER * plan.decode.tokens_per_s, rel=0.02)
    given = host(512, "", ram_gbps=Figure(140, "given"), cpu_gmacs=Figure(1600, "measured"))
    assert ranges_of(make_plan(sizes, given, WORK)) is None
