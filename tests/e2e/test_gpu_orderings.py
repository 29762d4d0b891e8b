"""Each ordering that prefill relies on, taken away: the double must find it. And experts left out: the
counters must.

A check that finds nothing when the schedule is broken would not show that the schedule is right.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.formats.errors import NativeError
from krasis.runtime.device.double import DeviceDouble, OrderingError
from krasis.runtime.gpu import parts
from krasis.runtime.gpu.experts import copies_ahead, streamed_experts
from krasis.runtime.gpu.experts.copies_ahead import CopiesAhead
from krasis.runtime.gpu.experts.copy_pipeline import CopyPipeline
from krasis.runtime.gpu.experts.paths import PathModel
from krasis.runtime.gpu.experts.schedule import Group, layer_groups
from krasis.runtime.gpu.experts.streamed_experts import StreamedExperts
from krasis.runtime.host_memory import open_store

SEEDS = (0, 1, 2)  # run late, at once, at random
TOKENS = [5, 80, 17, 200, 3, 4, 111]

pytestmark = pytest.mark.usefixtures("only_double")


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path], make_config: Callable[..., Any]) -> Path:
    return make_bundle(make_config(num_hidden_layers=3), tiers=("gpu",))


@pytest.fixture(params=["streamed", "routed"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(PathModel, "seconds", lambda self, name, *_: 0.0 if name == request.param else 1.0)
    return request.param


@pytest.fixture
def run(
    bundle: Path, open_gpu: Callable[..., Any], vram_for: Callable[..., int]
) -> Callable[[int], np.ndarray]:
    """(seed) -> logits of a prefill of groups of 2 experts, 9 of them."""

    def prefill(seed: int) -> np.ndarray:
        vram_bytes = vram_for(bundle, 16, group_experts=2)
        return open_gpu(bundle, seed=seed, context=16, vram_bytes=vram_bytes).prefill(TOKENS)

    return prefill


@pytest.mark.parametrize("seed", SEEDS)
def test_as_it_is_nothing_is_found(run: Callable[[int], np.ndarray], path: str, seed: int) -> None:
    np.testing.assert_array_equal(run(seed), run(seed + 4))


def test_every_launch_names_all_it_touches(
    bundle: Path, open_gpu: Callable[..., Any], vram_for: Callable[..., int], path: str
) -> None:
    """While a launch runs, the double hides all memory that the launch did not name."""
    vram_bytes = vram_for(bundle, 16, group_experts=2)
    usual = open_gpu(bundle, context=16, vram_bytes=vram_bytes).prefill(TOKENS)
    paranoid = DeviceDouble(seed=1, total_bytes=vram_bytes, paranoid=True)
    engine = open_gpu(bundle, device=paranoid, context=16, vram_bytes=vram_bytes)
    np.testing.assert_array_equal(engine.prefill(TOKENS), usual)


@pytest.mark.parametrize("seed", SEEDS)
def test_products_that_do_not_wait_for_their_copy(
    run: Callable[[int], np.ndarray], path: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        CopyPipeline, "wait_for", lambda self, group, compute: self._copied.pop(group.sequence)
    )
    with pytest.raises(OrderingError):
        run(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_that_do_not_wait_for_their_buffer(
    run: Callable[[int], np.ndarray], path: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    issue = CopyPipeline._issue

    def at_once(self: CopyPipeline, group: Group) -> None:
        self._free = [None, None]
        issue(self, group)

    monkeypatch.setattr(CopyPipeline, "_issue", at_once)
    with pytest.raises(OrderingError):
        run(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_buffer_released_before_its_last_product(
    run: Callable[[int], np.ndarray], path: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for, release = CopyPipeline.wait_for, CopyPipeline.release
    events: dict[int, Any] = {}

    def early(self: CopyPipeline, group: Group, compute: Any) -> None:
        wait_for(self, group, compute)
        events[group.sequence] = compute.record()

    class Recorded:
        def __init__(self, event: Any) -> None:
            self.record = lambda: event

    monkeypatch.setattr(CopyPipeline, "wait_for", early)
    monkeypatch.setattr(
        CopyPipeline,
        "release",
        lambda self, group, compute: release(self, group, Recorded(events[group.sequence])),
    )
    with pytest.raises(OrderingError):
        run(seed)


@pytest.mark.parametrize("is_broken", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_host_memory_released_before_it_was_copied(
    run: Callable[[int], np.ndarray], seed: int, is_broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a ring the host overwrites what was released."""

    def open_ring(*args: Any, **options: Any) -> Any:
        store = open_store(*args, **options, method="ring", ring_bytes=ring_bytes)
        if is_broken:
            release = store.release
            done = args[1].stream("other").record()
            monkeypatch.setattr(store, "release", lambda piece, event: release(piece, done))
        return store

    ring_bytes = 4 * 28_672
    monkeypatch.setattr(parts, "open_store", open_ring)
    if is_broken:
        with pytest.raises(OrderingError):
            run(seed)
    else:
        run(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_tables_that_the_host_overwrites_too_early(
    run: Callable[[int], np.ndarray], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host must have seen the choice of experts before it copies them."""
    monkeypatch.setattr(PathModel, "seconds", lambda self, name, *_: 0.0 if name == "routed" else 1.0)
    chosen = StreamedExperts._chosen

    class Unsynchronised:
        def record(self) -> Unsynchronised:
            return self

        def synchronize(self) -> None:
            pass

    monkeypatch.setattr(
        StreamedExperts, "_chosen", lambda self, stream, layer: chosen(self, Unsynchronised(), layer)
    )
    with pytest.raises(OrderingError):
        run(seed)


@pytest.fixture
def run_ahead(
    bundle: Path, open_gpu: Callable[..., Any], vram_for: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[np.ndarray]]:
    """(seed, *paths, ahead=) -> logits of a prefill each way, one after another; so many experts of each
    layer are ahead."""
    monkeypatch.setattr(parts, "_open_residency", lambda *_, **__: None)

    def prefills(seed: int, *paths: str, ahead: int = 2) -> list[np.ndarray]:
        vram_bytes = vram_for(bundle, 16, group_experts=6)
        engine = open_gpu(bundle, seed=seed, context=16, vram_bytes=vram_bytes)
        streamed = engine._backend._parts.streamed
        # A buffer of six places keeps one of them.
        streamed._room, streamed.ahead._places = 6 - ahead, streamed._streaming.staging[:, 6 - ahead :]
        found = []
        for path in paths:
            monkeypatch.setattr(
                PathModel, "seconds", lambda self, name, *_, path=path: 0.0 if name == path else 1.0
            )
            engine.reset()
            found.append(engine.prefill(TOKENS).copy())
        assert streamed.ahead.num_copied == ahead * 3 * paths.count("routed")
        assert streamed.ahead.num_used
        return found

    return prefills


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_ahead_change_no_bit(run_ahead: Callable[..., list[np.ndarray]], seed: int) -> None:
    found = run_ahead(seed, "streamed", "routed", "routed", "streamed", "routed")
    found += run_ahead(seed, "routed", ahead=6)
    for logits in found[1:]:
        np.testing.assert_array_equal(logits, found[0])


@pytest.mark.parametrize("seed", SEEDS)
def test_products_that_do_not_wait_for_copies_ahead(
    run_ahead: Callable[..., list[np.ndarray]], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of what was chosen come later, so that who waits for these has waited for all: here is none."""
    take = CopiesAhead.take

    class Hasty:
        def wait(self, event: Any) -> None:
            pass

    monkeypatch.setattr(
        CopiesAhead,
        "take",
        lambda self, layer, addresses, chosen, _: take(self, layer, addresses, chosen, Hasty()),
    )
    with pytest.raises(OrderingError):
        run_ahead(seed, "routed", ahead=6)


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_ahead_over_those_that_the_layer_reads(
    run_ahead: Callable[..., list[np.ndarray]], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies_ahead, "NUM_SETS", 1)
    with pytest.raises(OrderingError):
        run_ahead(seed, "routed")


def test_an_expert_that_no_group_covers_is_missed(
    run: Callable[[int], np.ndarray], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_the_last(layer: int, first: int, count: int, *rest: Any) -> tuple[Group, ...]:
        return layer_groups(layer, first, count - 3, *rest)

    monkeypatch.setattr("krasis.runtime.gpu.experts.schedule.layer_groups", without_the_last)
    monkeypatch.setattr(streamed_experts, "layer_groups", without_the_last)
    with pytest.raises(NativeError, match="executed exactly once"):
        run(0)


def test_an_expert_that_two_groups_cover_is_noticed(
    run: Callable[[int], np.ndarray], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_group = StreamedExperts._run_group

    def twice(self: StreamedExperts, stream: Any, layer: int, step: Any, group: Group, known: Any) -> None:
        if layer == 2 and not group.begin:
            table = self._tables[layer]
            self.pipeline.wait_for(group, stream)
            self.pipeline._copied[group.sequence] = stream.record()
            memory = [self.pipeline.memory_of(group)]
            self._product.run(stream, step, table, memory, group.begin, group.end, self._counters[:1], layer)
        run_group(self, stream, layer, step, group, known)

    monkeypatch.setattr(StreamedExperts, "_run_group", twice)
    with pytest.raises(NativeError, match="executed exactly once"):
        run(0)


@pytest.mark.parametrize("wrong", [-1, 6, 2**30])
def test_a_choice_that_is_no_expert_is_noticed(
    run: Callable[[int], np.ndarray], path: str, wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage = StreamedExperts.run

    def corrupt(self: StreamedExperts, stream: Any, layer: int, step: Any) -> None:
        ids = step.ids

        def write(_: int) -> None:
            ids[3, 1] = wrong

        stream.launch("corrupt", write, reads=(ids,), writes=(ids,))
        run_stage(self, stream, layer, step)

    monkeypatch.setattr(StreamedExperts, "run", corrupt)
    with pytest.raises(NativeError, match="executed exactly once"):
        run(0)
