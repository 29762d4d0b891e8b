"""What the GPU backend takes of a device's memory: as planned, and smaller steps where that is not there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import ResourceError
from krasis.runtime.cpu.weights import load_weights
from krasis.runtime.device.double import DeviceDouble

OpenGpu = Callable[..., Any]
RelativeError = Callable[[np.ndarray, np.ndarray], float]
LIMIT = 1.5e-3  # of f16

pytestmark = pytest.mark.usefixtures("only_double")


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path], make_config: Callable[..., Any]) -> Path:
    """Without CPU experts there is no decoder, which would need memory of its own."""
    return make_bundle(make_config(num_hidden_layers=3, max_position_embeddings=1024), tiers=("gpu",))


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return np.random.default_rng(4).integers(0, 300, 40).tolist()


@pytest.fixture(scope="module")
def right(bundle: Path, tokens: list[int], reference_logits: Callable[..., np.ndarray]) -> np.ndarray:
    with Bundle.open(bundle) as opened:
        return reference_logits(load_weights(opened, "gpu"), tokens)


def say_once(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    """The first time it is asked, a double says that it has so much memory."""
    said: list[int] = []
    truly = DeviceDouble.free_bytes

    def answer(self: DeviceDouble) -> int:
        said.append(free_bytes)
        return free_bytes if len(said) == 1 else truly(self)

    monkeypatch.setattr(DeviceDouble, "free_bytes", answer)


def test_what_is_planned_is_what_is_allocated(
    bundle: Path, open_gpu: OpenGpu, vram_for: Callable[..., int]
) -> None:
    for group in (1, 2, 6):
        vram_bytes = vram_for(bundle, 64, group_experts=group, resident=3 if group == 6 else 0)
        device = DeviceDouble(total_bytes=vram_bytes)
        engine = open_gpu(bundle, device=device, context=64, vram_bytes=vram_bytes)
        plan = engine._backend._parts.plan.placement
        assert (plan.group_experts, plan.resident_experts) == (group, 3 if group == 6 else 0)
        planned = plan.vram_bytes - plan.reserve_bytes - plan.spare_bytes
        # Scratch is of a GPU's library. Beside what is planned: rotary tables, norms in f32, tables of
        # addresses.
        taken = vram_bytes - device.free_bytes() + 64 * 2**20
        assert abs(taken - planned) < 50_000


def test_where_most_experts_have_a_place_they_are_in_it_from_the_start(
    make_bundle: Callable[..., Path],
    make_config: Callable[..., Any],
    open_gpu: OpenGpu,
    vram_for: Callable[..., int],
    only_path: Callable[[str], None],
    relative_error: RelativeError,
    reference_logits: Callable[..., np.ndarray],
    tokens: list[int],
) -> None:
    only_path("streamed")
    bundle = make_bundle(make_config(num_hidden_layers=8))
    with Bundle.open(bundle) as opened:
        expected = reference_logits(load_weights(opened, "gpu"), tokens)
        record_bytes = opened.blob("layers.0.experts.gpu").shape[1]
    for num_resident, num_copied in ((30, 48 - 30), (20, 48)):  # of 8 x 6; few wait for those that are hot
        vram_bytes = vram_for(bundle, 64, group_experts=6, resident=num_resident)
        engine = open_gpu(bundle, seed=3, context=64, gpu_dtype="f16", vram_bytes=vram_bytes)
        assert relative_error(engine.prefill(tokens, all_logits=True), expected) <= LIMIT
        assert engine._backend.last_prefill.bytes_copied == num_copied * record_bytes


def test_the_settings_bound_a_pass(
    bundle: Path,
    tokens: list[int],
    right: np.ndarray,
    open_gpu: OpenGpu,
    relative_error: RelativeError,
) -> None:
    """Memory depends on it, results do not. Unless they say, a pass is as large as the plan finds best."""
    free = {}
    for chunk, expected in ((None, 600), (1000, 600), (16, 16)):
        device = DeviceDouble(total_bytes=2**30)
        engine = open_gpu(bundle, device=device, context=600, gpu_dtype="f16", prefill_chunk=chunk)
        assert engine.prefill_chunk == expected
        found = engine.prefill(tokens, all_logits=True)
        assert relative_error(found, right) <= LIMIT
        assert engine._backend.last_prefill.num_tokens == (8 if chunk == 16 else 40)  # the last of 16, 16, 8
        free[chunk] = device.free_bytes()
    assert free[16] > free[None] == free[1000]


def test_operators_run_out_of_memory_in_the_middle_of_a_pass(
    bundle: Path,
    tokens: list[int],
    right: np.ndarray,
    open_gpu: OpenGpu,
    vram_for: Callable[..., int],
    relative_error: RelativeError,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[str] = []

    def refuse(name: str) -> bool:
        seen.append(name)
        # The second layer of the first pass, then of the second: 64, 32, 16 tokens a pass.
        return name == "attention" and seen.count("attention") in (2, 4)

    vram_bytes = vram_for(bundle, 64, group_experts=2)
    device = DeviceDouble(seed=6, total_bytes=vram_bytes, refuse=refuse)
    engine = open_gpu(bundle, device=device, context=64, gpu_dtype="f16", vram_bytes=vram_bytes)
    assert engine._backend.prefill_chunk == 64
    with caplog.at_level(logging.WARNING):
        found = engine.prefill(tokens, all_logits=True)
    assert relative_error(found, right) <= LIMIT
    assert engine._backend._workspace.max_tokens == 16
    assert [record.args[1:3] for record in caplog.records] == [(64, 32), (32, 16)]
    assert engine._backend.last_prefill.num_passes == 3
    engine.reset()
    assert relative_error(engine.prefill(tokens), right[-1]) <= LIMIT


def test_a_plan_that_was_too_hopeful(
    bundle: Path,
    tokens: list[int],
    right: np.ndarray,
    open_gpu: OpenGpu,
    relative_error: RelativeError,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # The plan sees 1 GiB, but then there is less: weights and cache fit, the activations of 64 tokens do not,
    # and of two buffers of 6 experts only one expert's.
    say_once(monkeypatch, free_bytes=2**30)
    device = DeviceDouble(seed=7, total_bytes=398_000)
    with caplog.at_level(logging.WARNING):
        engine = open_gpu(bundle, device=device, context=64, gpu_dtype="f16")
    assert engine._backend.prefill_chunk == 32
    words = [record.getMessage() for record in caplog.records]
    assert [word[:20] for word in words] == [
        "out of GPU memory wi",
        "the experts do not a",
        *["no GPU memory for th"] * 2,
    ]
    assert relative_error(engine.prefill(tokens), right[-1]) <= LIMIT


def test_not_even_one_token(bundle: Path, open_gpu: OpenGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    say_once(monkeypatch, free_bytes=2**30)
    with pytest.raises(ResourceError, match="activations of one token") as caught:
        open_gpu(bundle, device=DeviceDouble(total_bytes=262_000), context=64)
    assert "kB for activations" in str(caught.value)


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(bundle: Path, open_gpu: OpenGpu) -> None:
    with pytest.raises(ResourceError, match="do not fit in VRAM") as caught:
        open_gpu(bundle, context=64, vram_bytes=800_100_000)
    assert "800.1 MB" in str(caught.value)


def test_of_an_error_in_the_middle_nothing_stays(
    bundle: Path,
    tokens: list[int],
    right: np.ndarray,
    open_gpu: OpenGpu,
    vram_for: Callable[..., int],
    relative_error: RelativeError,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vram_bytes = vram_for(bundle, 64, group_experts=2)
    engine = open_gpu(bundle, seed=11, context=64, gpu_dtype="f16", vram_bytes=vram_bytes)
    stage = engine._backend._parts.streamed
    run = stage.run

    def interrupted(stream: object, layer: int, step: object) -> None:
        if layer == 1:
            raise KeyboardInterrupt
        run(stream, layer, step)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.prefill(tokens)
    assert relative_error(engine.prefill(tokens, all_logits=True), right) <= LIMIT
