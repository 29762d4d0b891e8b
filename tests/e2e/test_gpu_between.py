"""Tokens of other sequences between the layers of a running pass, and passes that stop at a layer, on the
device's double."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.formats.errors import NativeError
from krasis.runtime.batch import Batch, batch_of, one_sequence
from krasis.runtime.device.double import DeviceDouble
from krasis.runtime.gpu import parts, prefill
from krasis.runtime.gpu.backend import GpuBackend
from krasis.runtime.gpu.experts import residency
from krasis.runtime.gpu.experts.residency import Residency
from krasis.runtime.serving.api import Finished, Request
from krasis.runtime.serving.model_side import CoreSettings
from krasis.runtime.serving.opening import open_core
from krasis.runtime.serving.steps import Limits
from krasis.runtime.settings import EngineSettings, SamplingSettings

LAYERS = 4
SHORT, LONG = ([5, 8, 17, 20], [9, 9, 31]), [(7 * n) % 60 for n in range(20)]
STEPS = 6
EAGER = Limits(pass_rows=4096, company_s=0.0, between_s=0.0, decode_share=0.0)
RelativeError = Callable[[np.ndarray, np.ndarray], float]


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path], make_config: Callable[..., Any]) -> Path:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return make_bundle(make_config(num_hidden_layers=LAYERS, **sizes, **heads), gpu_group=64)


def open_residency(
    model: Any, store: Any, copies: Any, wanted: int, least: int = 1, *, num_slots: int
) -> Residency | None:
    """In the place of what finds out how much memory there is."""
    shape = model.shape
    if num_slots < least:
        return None
    return Residency(model.device, store, copies, shape.num_expert_layers, shape.num_experts, num_slots)


@pytest.fixture
def open_backend(
    bundle: Path,
    open_gpu: Callable[..., Any],
    vram_for: Callable[..., int],
    only_path: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:
    """(path, seed=, resident=) -> a backend of three slots, two of which hold a short prompt. Experts are
    streamed in groups of two, unless they are resident: the bits depend on which of them are."""

    def opened(path: str, *, resident: int = 0, **device: Any) -> Any:
        only_path(path)
        monkeypatch.setattr(parts, "_open_residency", partial(open_residency, num_slots=resident))
        monkeypatch.setattr(parts, "_group_experts", lambda _: 2)
        vram_bytes = vram_for(bundle, 3 * 48, group_experts=2, resident=resident)
        if "device" in device:
            device["device"] = device["device"](vram_bytes)
        settings = {"context": 48, "slots": 3, "prefill_chunk": 16, "vram_bytes": vram_bytes}
        backend = open_gpu(bundle, **device, **settings)._backend
        assert [backend.state.open() for _ in range(2)] == [1, 2]
        for slot, prompt in enumerate(SHORT):
            backend.run(one_sequence(np.array(prompt), 0, "none", slot))
        return backend

    return opened


def long_prompt() -> Batch:
    return one_sequence(np.array(LONG), 0, "last", 2)


def next_tokens(step: int) -> Batch:
    """The step-th token behind each short prompt."""
    return batch_of(
        [(slot, len(prompt) + step, [40 + step + slot], "last") for slot, prompt in enumerate(SHORT)]
    )


def between(backend: Any, num_steps: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits of the long prompt and of the others' tokens, one behind each of its first layers."""
    rows: list[np.ndarray] = []

    def step(done: int, total: int) -> None:
        assert (0 < done <= total) == (total == LAYERS)
        if len(rows) < num_steps:
            outer, backend.layer_done = backend.layer_done, None
            rows.append(backend.run(next_tokens(len(rows))).copy())
            backend.layer_done = outer

    backend.layer_done = step
    logits = backend.run(long_prompt()).copy()
    backend.layer_done = None
    return logits, rows


@pytest.fixture(scope="module")
def known() -> dict[str, tuple[np.ndarray, list[np.ndarray]]]:
    """What ``alone`` has found, by path."""
    return {}


@pytest.fixture
def alone(
    open_backend: Callable[..., Any], known: dict[str, tuple[np.ndarray, list[np.ndarray]]]
) -> Callable[..., Any]:
    """(number of steps, path=) -> logits of the long prompt, then of the others' tokens, one by one."""

    def run(num_steps: int, path: str = "streamed") -> tuple[np.ndarray, list[np.ndarray]]:
        if path not in known:
            backend = open_backend(path, seed=5)
            logits = backend.run(long_prompt()).copy()
            known[path] = logits, [backend.run(next_tokens(step)).copy() for step in range(STEPS)]
        return known[path][0], known[path][1][:num_steps]

    return run


@pytest.mark.parametrize(
    ("path", "seed", "on_host"),
    [("streamed", 0, 0), ("streamed", 1, 2), ("streamed", 2, LAYERS), ("routed", 3, 0), ("cpu", 2, 1)],
)
def test_a_pass_and_tokens_between_its_layers_have_the_bits_they_have_alone(
    open_backend: Callable[..., Any], alone: Callable[..., Any], path: str, seed: int, on_host: int
) -> None:
    """Six tokens each in two passes of four layers, whatever order the device takes, and wherever so many
    layers' keys and values lie."""
    backend = open_backend(path, seed=seed, host_kv_layers=on_host)
    assert backend.decodes_between_layers
    logits, rows = between(backend, STEPS)
    assert backend.last_prefill.num_passes == 2
    assert path != "streamed" or backend.last_prefill.num_groups == 2 * LAYERS * 3
    assert [backend.state.length(slot) for slot in range(3)] == [10, 9, 20]
    expected, expected_rows = alone(STEPS, path)
    np.testing.assert_array_equal(logits, expected)
    np.testing.assert_array_equal(np.stack(rows), np.stack(expected_rows))


def test_a_token_between_layers_leaves_a_passes_staging_alone(open_backend: Callable[..., Any]) -> None:
    """One sequence's tokens are read ahead into a buffer that a pass has while it is under way."""
    found = []
    for on_host in (0, LAYERS):
        backend, rows = open_backend("streamed", seed=1, host_kv_layers=on_host), []

        def step(_done: int, _total: int, backend: Any = backend, rows: list[np.ndarray] = rows) -> None:
            outer, backend.layer_done = backend.layer_done, None
            at = backend.state.length(0)
            rows.append(backend.run(one_sequence(np.array([40 + at]), at, "last", 0)).copy())
            backend.layer_done = outer

        step(0, 0)
        backend.layer_done = step
        rows.append(backend.run(long_prompt()).copy())
        backend.layer_done = None
        step(0, 0)
        found.append(np.concatenate(rows))
    np.testing.assert_array_equal(*found)


@pytest.mark.usefixtures("only_double")
def test_every_launch_of_both_names_all_it_touches(
    open_backend: Callable[..., Any], alone: Callable[..., Any]
) -> None:
    paranoid = open_backend(
        "streamed",
        device=lambda size: DeviceDouble(seed=1, total_bytes=size, paranoid=True),
        host_kv_layers=LAYERS // 2,
    )
    logits, rows = between(paranoid, 1)
    expected, expected_rows = alone(1)
    np.testing.assert_array_equal(logits, expected)
    np.testing.assert_array_equal(rows[0], expected_rows[0])


def test_resident_experts_stay_where_they_are_during_a_pass(
    open_backend: Callable[..., Any],
    alone: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    relative_error: RelativeError,
) -> None:
    """A pass has planned with them, and decode would exchange some after each token."""
    for name in ("NOTE_TOKENS", "MIN_COPIES", "MAX_COPIES"):  # one moves in after each token
        monkeypatch.setattr(residency, name, 1)
    backend = open_backend("streamed", seed=2, resident=9)
    pool = backend._parts.residency
    backend.run(next_tokens(0))
    num_resident = pool.num_resident
    assert num_resident < 6
    seen: list[np.ndarray] = []

    def step(done: int, total: int) -> None:
        seen.append(pool.host_addresses.copy())
        if len(seen) <= 6:
            backend.run(next_tokens(len(seen)))

    backend.layer_done = step
    logits = backend.run(long_prompt()).copy()
    backend.layer_done = None
    for first in (0, LAYERS):
        assert all((one == seen[first]).all() for one in seen[first : first + LAYERS])
    for step_number in range(7, 10):
        backend.run(next_tokens(step_number))
    assert pool.num_resident > num_resident + 1  # a pass lets in one more when it ends, each token another
    expected, _ = alone(0)
    assert relative_error(logits, expected) <= 1e-3


@pytest.mark.parametrize("policy", ["late", "eager"])
def test_the_host_is_at_most_two_layers_ahead(
    open_backend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    backend = open_backend("streamed", policy=policy)
    submitted, ahead = [0], []
    original = prefill.PassProgress.submitted

    def counted(self: Any, stream: Any) -> None:
        submitted[0] += 1
        original(self, stream)

    monkeypatch.setattr(prefill.PassProgress, "submitted", counted)
    backend.layer_done = lambda done, total: ahead.append(submitted[0] - done)
    backend.run(one_sequence(np.array(LONG[:10]), 0, "last", 2))
    assert len(ahead) == LAYERS == submitted[0]
    assert max(ahead) <= 2


@pytest.mark.parametrize(("seconds", "expected"), [(0.001, 2), (0.02, 1), (0.3, 0)])
def test_of_long_layers_fewer_are_ahead(seconds: float, expected: int) -> None:
    """What comes between two layers waits for those that are submitted already."""
    now_s, in_flight, ahead = [0.0], [0], []

    class Event:
        def __init__(self) -> None:
            in_flight[0] += 1

        def is_done(self) -> bool:
            return False

        def synchronize(self) -> None:
            in_flight[0] -= 1
            now_s[0] += seconds

    class Stream:
        record = Event

    def layer_done(done: int, total: int) -> None:
        ahead.append(in_flight[0])
        now_s[0] += 0.2  # a token: no layer's time

    progress = prefill.PassProgress(layer_done, 9, lambda: now_s[0])
    for _ in range(9):
        progress.submitted(Stream())
    progress.wait()
    assert len(ahead) == 9
    assert (max(ahead), max(ahead[3:])) == (2, expected)


@pytest.mark.parametrize("at", [1, LAYERS + 1])
def test_a_pass_stops_at_a_layer(
    open_backend: Callable[..., Any], alone: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Its slot holds what earlier passes computed, and goes on from there; others' tokens are theirs."""
    backend = open_backend("streamed", seed=4, policy="late")
    rows: list[np.ndarray] = []
    calls = [0, 0]  # layers done, layers submitted
    original = prefill.PassProgress.submitted

    def counted(self: Any, stream: Any) -> None:
        calls[1] += 1
        original(self, stream)

    def stop(done: int, total: int) -> None:
        calls[0] += 1
        if calls[0] == at:
            raise InterruptedError
        rows.append(backend.run(next_tokens(len(rows))).copy())

    monkeypatch.setattr(prefill.PassProgress, "submitted", counted)
    backend.layer_done = stop
    with pytest.raises(InterruptedError):
        backend.run(long_prompt())
    backend.layer_done = None
    assert calls[1] <= at + 2
    assert backend.state.length(2) == 0
    rows.append(backend.run(next_tokens(len(rows))).copy())
    found = backend.run(long_prompt()).copy()
    expected, expected_rows = alone(len(rows))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.stack(rows), np.stack(expected_rows))


def test_only_other_sequences_tokens_can_be_computed_in_between(
    open_backend: Callable[..., Any], alone: Callable[..., Any]
) -> None:
    backend = open_backend("streamed")
    refused: list[str] = []

    def step(done: int, total: int) -> None:
        for batch in (one_sequence(np.array([1, 2]), 4), one_sequence(np.array([1]), 0, "last", 2)):
            with pytest.raises(NativeError, match="only other sequences"):
                backend.run(batch)
            refused.append("")

    backend.layer_done = step
    found = backend.run(long_prompt()).copy()
    backend.layer_done = None
    assert len(refused) == 4 * LAYERS
    expected, _ = alone(0)
    np.testing.assert_array_equal(found, expected)


def test_a_core_decodes_answers_while_a_prompt_is_computed(
    chat_bundle: Path, gpu_kind: str, only_path: Callable[[str], None]
) -> None:
    if gpu_kind == "double":
        device: Any = DeviceDouble(seed=6, total_bytes=2**30)
    else:
        from krasis.runtime.device.cuda import CudaDevice

        device = CudaDevice(0)
    only_path("streamed")
    engine = EngineSettings(device=gpu_kind, threads=1, context=256, prefault=False, gpu_dtype="f16")
    settings = CoreSettings(num_slots=2, limits=EAGER)
    sampling = SamplingSettings(temperature=0.0)
    requests = [
        Request(id="", prompt=prompt, max_tokens=9, ignore_ends=True, sampling=sampling)
        for prompt in ([40, 41, 42], [40 + n % 90 for n in range(100)])
    ]
    with open_core(
        chat_bundle, engine, settings, make_backend=lambda b, s: GpuBackend(b, s, device)
    ) as opened:
        core = opened.core
        first = core.submit(requests[0])
        for _ in range(4):
            core.turn(wait=False)
        second = core.submit(requests[1])
        before = core.status().counters
        while core.status().counters.num_pass_rows < before.num_pass_rows + 100:
            core.turn(wait=False)
        assert core.status().counters.num_decode_steps == before.num_decode_steps + 1  # of two layers, one
        while core.turn(wait=False):
            pass
        for ticket in (first, second):
            assert isinstance(list(ticket.events(60))[-1], Finished)
    device.close()
