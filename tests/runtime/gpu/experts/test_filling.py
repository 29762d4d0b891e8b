"""Experts that come to VRAM while a pass already runs: what is there in time, and what goes wrong."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from krasis.formats.errors import NativeError, ResourceError
from krasis.runtime.device.ordering import OrderingError
from krasis.runtime.gpu.experts.filling import Move, moves_of
from tests.support.patience import PATIENCE_S


def test_runs_of_experts_and_slots_are_one_move() -> None:
    assert moves_of([0, 1, 2, 5, 6, 7], [0, 1, 2, 3, 4, 9], 6) == [
        Move(0, 0, 3, 0),
        Move(0, 5, 1, 3),
        Move(1, 0, 1, 4),
        Move(1, 1, 1, 9),
    ]
    assert moves_of([], [], 6) == []


class Gate:
    """Lets a store give experts of a layer and those behind it out when it is opened, or refuse them."""

    def __init__(self, store: Any, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.error = threading.Event(), ""
        real = store.acquire

        def acquire(number: int, first: int, count: int) -> Any:
            if number >= layer:
                self.opened.wait(PATIENCE_S)
                if self.error:
                    raise ResourceError(self.error)
            return real(number, first, count)

        monkeypatch.setattr(store, "acquire", acquire)


def read_layer(rig: Any, residency: Any, layer: int) -> None:
    per_layer = residency.host_addresses.shape[1]
    slots = residency.memory[layer * per_layer : (layer + 1) * per_layer]
    rig.model.stream.launch(f"read layer {layer}", lambda _: None, reads=(slots,), writes=())


def test_a_layer_waits_for_its_own_experts_only(open_rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = open_rig(seed=4, policy="late")
    residency, stream = rig.residency(18), rig.model.stream
    gate = Gate(rig.store, 2, monkeypatch)
    residency.fill(stream)
    assert residency.is_complete
    for layer in (0, 1):
        residency.arrive(stream, layer)
        read_layer(rig, residency, layer)
    rig.device.synchronize()
    came = threading.Event()

    def wait() -> None:
        residency.arrive(stream, 2)
        came.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not came.wait(0.05)
    gate.opened.set()
    waiting.join(PATIENCE_S)
    assert came.is_set()
    read_layer(rig, residency, 2)
    rig.device.synchronize()
    residency.close()


def test_who_does_not_wait_is_noticed(open_rig: Any) -> None:
    rig = open_rig(seed=4, policy="late")
    residency = rig.residency(18)
    residency.fill(rig.model.stream)
    residency._filling._thread.join(PATIENCE_S)
    with pytest.raises(OrderingError, match="read layer 1"):
        read_layer(rig, residency, 1)


def test_nobody_is_driven_out_by_who_is_on_the_way(open_rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = open_rig(seed=0)
    residency = rig.residency(4)
    gate = Gate(rig.store, 0, monkeypatch)
    residency.fill(rig.model.stream)
    before = residency.host_addresses.copy()
    for _ in range(3):
        residency.note_tokens(rig.model.stream, 0)
        residency.update(rig.model.stream)
    assert (residency.host_addresses == before).all()
    assert residency.num_swaps == 0
    gate.opened.set()
    residency.finish()
    residency.close()


def test_an_error_reaches_who_needs_the_experts(open_rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = open_rig(seed=1)
    residency, stream = rig.residency(18), rig.model.stream
    gate = Gate(rig.store, 1, monkeypatch)
    gate.error = "the disk is gone"
    residency.fill(stream)
    residency.arrive(stream, 0)
    gate.opened.set()
    for call in (lambda: residency.arrive(stream, 1), residency.finish, lambda: residency.arrive(stream, 2)):
        with pytest.raises(ResourceError, match="the disk is gone"):
            call()
    residency.arrive(stream, 0)
    residency.close()


def test_closing_meanwhile_ends_it(open_rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = open_rig(seed=2)
    residency = rig.residency(18)
    gate = Gate(rig.store, 1, monkeypatch)
    residency.fill(rig.model.stream)
    closing = threading.Thread(target=residency.close)
    closing.start()
    with pytest.raises(NativeError, match="the engine is closed"):
        residency.arrive(rig.model.stream, 1)
    gate.opened.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert len(rig.store.held) <= 2
    residency.close()
