"""The choice between streaming all experts, streaming those that were chosen, and the CPU."""

from __future__ import annotations

import pytest

from krasis.runtime.gpu.experts.paths import PATHS, PathModel
from krasis.runtime.planning import Figure, Workload, describe_gpu, describe_host, make_plan, sizes_of_shape
from krasis.runtime.planning.presets import shape

GIB = 2**30


def model(*, link: float = 13.0, cores: int = 64, gmacs: float = 3200.0, ram: float = 140.0) -> PathModel:
    """Qwen3-235B on an RTX 2000 Ada and an EPYC 7742, or what the arguments say."""
    gpu = describe_gpu(16 * GIB, link_gbps=link, memory_gbps=224.0, bf16_tflops=34.0)
    host = describe_host(
        [gpu],
        ram_bytes=Figure(2**40, "given"),
        num_cores=Figure(cores, "given"),
        ram_gbps=Figure(ram, "given"),
        cpu_gmacs=Figure(gmacs, "given"),
    )
    return PathModel(sizes_of_shape(shape("qwen3-235b-a22b")), host, 1, 128)


def test_one_token_goes_to_the_cpu_and_a_long_prompt_is_streamed() -> None:
    paths = model()
    assert paths.choose(1, 0, 0, PATHS).path == "cpu"
    assert paths.choose(10_000, 0, 0, PATHS).path == "streamed"


def test_without_a_cpu_tier_few_tokens_stream_what_they_chose() -> None:
    paths = model()
    few = paths.choose(2, 0, 0, ("streamed", "routed"))
    assert few.path == "routed"
    # 94 layers: 15.5 distinct experts x 9.73 MB over 13 GB/s, then read at 224 GB/s, the host, little else
    layer_s = 15.5 * 9.732e6 * (1 / 13e9 + 1 / 224e9) + 1.5e-3
    assert few.expected_s["routed"] == pytest.approx(94 * layer_s, rel=0.06)
    assert few.expected_s["streamed"] == pytest.approx(94 * 128 * 9.732e6 / 13e9, rel=0.01)
    # All 128 by chance, which prompts do not choose: either way costs the same but for what is not chosen.
    middle = paths.choose(500, 0, 0, ("streamed", "routed"))
    assert middle.path == "routed"
    assert middle.expected_s["routed"] == pytest.approx(middle.expected_s["streamed"], rel=0.05)


def test_a_slow_cpu_loses_to_the_link() -> None:
    assert model(cores=2, gmacs=100.0, ram=20.0).choose(64, 0, 0, PATHS).path != "cpu"
    assert model().choose(64, 0, 0, PATHS).path == "cpu"


def test_a_prompt_does_not_wait_for_experts_that_the_cpu_has() -> None:
    paths = model(cores=2, gmacs=100.0, ram=20.0)
    loaded = paths.choose(64, 0, 0, PATHS)
    on_cpu_s = loaded.expected_s["cpu"]
    assert loaded.path == "routed"
    assert paths.choose(64, 0, 0, PATHS, loading_s=0.99 * on_cpu_s).path == "routed"
    assert paths.choose(64, 0, 0, PATHS, loading_s=1.01 * on_cpu_s).path == "cpu"
    # Waiting makes the two ways of the GPU equally late, and neither the better one.
    for loading_s in (0.0, 30.0):
        assert paths.choose(10_000, 0, 0, ("streamed", "routed"), loading_s=loading_s).path == "streamed"


def test_experts_that_are_resident_cost_no_copy() -> None:
    paths = model()
    cold, warm = (paths.seconds("streamed", 1000, 0, count) for count in (0, 94 * 64))
    assert warm == pytest.approx(cold / 2, rel=0.05)
    assert paths.choose(1, 0, 94 * 128, PATHS).path == "streamed"  # nothing is copied, and the host not asked


def test_more_tokens_never_cost_less() -> None:
    paths = model()
    for path in PATHS:
        seconds = [paths.seconds(path, tokens, 100, 10) for tokens in (1, 2, 5, 17, 100, 1000, 10_000)]
        assert seconds == sorted(seconds)


def test_the_choice_is_told_with_its_seconds() -> None:
    text = str(model().choose(1, 0, 0, PATHS))
    assert text.startswith("cpu (streamed ")
    assert all(path in text for path in PATHS)


def test_a_long_prompt_takes_as_long_as_the_planner_says() -> None:
    paths = model()
    plan = make_plan(paths.sizes, paths.hardware, Workload(10_240, 10_000))
    assert (plan.prefill.path, plan.prefill.num_passes) == ("streamed", 1)
    resident = plan.gpus[0].resident_experts
    # The planner also sees the copies that have nothing to run under.
    assert paths.seconds("streamed", 10_000, 0, resident) == pytest.approx(plan.prefill.total_s, rel=0.02)
    parts = plan.prefill.expert_s + plan.prefill.dense_s + plan.prefill.attention_s
    assert paths.seconds("streamed", 10_000, 0, 94 * 128) == pytest.approx(parts, rel=1e-9)


def test_prompts_that_choose_few_experts_stream_what_they_chose() -> None:
    """By what was seen before, and where nearly all are expected: those of a prompt may be fewer."""
    paths, ways = model(), ("streamed", "routed")
    assert paths.choose(500, 0, 0, ways, 128.0).path == "routed"
    seen = paths.choose(500, 0, 0, ways, 96.0)
    assert seen.path == "routed"
    assert seen.expected_s["routed"] == pytest.approx(0.75 * seen.expected_s["streamed"], rel=0.08)
    # A layer's own time is longer than what few copies save.
    assert paths.choose(10_000, 0, 0, ways, 120.0).path == "streamed"


def test_a_few_experts_are_copied_while_the_link_has_nothing_else_to_do() -> None:
    """As many as cross it in a layer's own time."""
    fast, slow = model(link=55.0), model(link=1.0)
    assert slow.num_ahead(64, 0) < fast.num_ahead(64, 0) <= fast.num_ahead(500, 0) < 128
    idle_s = fast.seconds("routed", 64, 0, 94 * 128) / 94
    assert fast.num_ahead(64, 0) == int(idle_s / (9.732e6 / 55e9))
