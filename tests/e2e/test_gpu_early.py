"""The first prompt begins while experts are still being pinned: it waits for its own layers, and says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.formats.errors import ResourceError
from krasis.runtime.host_memory import api
from krasis.runtime.host_memory.in_place import InPlaceSource
from tests.support.patience import PATIENCE_S

pytestmark = pytest.mark.usefixtures("only_double")
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path], make_config: Callable[..., Any]) -> Path:
    return make_bundle(make_config(num_hidden_layers=3), gpu_group=64)


class Gate:
    """Holds up the pinning of layers from one on. error: of them."""

    def __init__(self) -> None:
        self.first, self.opened, self.error = 0, threading.Event(), ""
        self.asked = threading.Event()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made, real = Gate(), InPlaceSource.fill

    def fill(self: InPlaceSource, layer: int, begin: int, end: int) -> None:
        if layer >= made.first:
            made.asked.set()
            made.opened.wait(PATIENCE_S)
            if made.error:
                raise ResourceError(made.error, where=f"layer {layer}")
        real(self, layer, begin, end)

    monkeypatch.setattr(InPlaceSource, "fill", fill)
    yield made
    made.opened.set()


@pytest.fixture
def streamed_bytes(bundle: Path, vram_for: Callable[..., int]) -> int:
    return vram_for(bundle, 64, group_experts=2)


@pytest.mark.parametrize("is_resident", [True, False])
def test_a_prompt_runs_as_far_as_its_experts_are_pinned(
    bundle: Path, open_gpu: Any, gate: Gate, streamed_bytes: int, is_resident: bool, only_path: Any
) -> None:
    settings = {"context": 64, "vram_bytes": None if is_resident else streamed_bytes}
    only_path("streamed")
    gate.opened.set()
    right = open_gpu(bundle, **settings).prefill(PROMPT)
    gate.opened.clear()
    gate.first = 2
    engine = open_gpu(bundle, seed=2, **settings)  # returns although nothing of the last layer is pinned
    assert engine.loading is not None
    assert engine.loading[0] == "experts pinned"
    found: list[Any] = []
    running = threading.Thread(target=lambda: found.append(engine.prefill(PROMPT)))
    running.start()
    assert gate.asked.wait(PATIENCE_S)
    running.join(0.2)
    assert running.is_alive()
    gate.opened.set()
    running.join(PATIENCE_S)
    np.testing.assert_array_equal(found[0], right)
    assert np.isfinite(engine.decode(7)).all()
    assert engine.loading is None


def test_a_short_prompt_takes_the_cpus_experts(
    bundle: Path, open_gpu: Any, gate: Gate, streamed_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "ASSUMED_GBPS", 1e-9)
    engine = open_gpu(bundle, context=64, vram_bytes=streamed_bytes)
    assert np.isfinite(engine.prefill(PROMPT)).all()
    assert np.isfinite(engine.decode(7)).all()
    assert engine.placement[0] == "GPU, experts on the CPU"
    assert engine.loading is not None
    assert engine.loading[1] == 0  # bytes


@pytest.mark.parametrize("is_resident", [True, False])
def test_what_goes_wrong_behind_is_told_at_the_next_call(
    bundle: Path, open_gpu: Any, gate: Gate, streamed_bytes: int, is_resident: bool, only_path: Any
) -> None:
    only_path("streamed")
    gate.first, gate.error = 1, "the disk is gone"
    engine = open_gpu(bundle, context=64, vram_bytes=None if is_resident else streamed_bytes)
    gate.opened.set()
    for _ in range(2):
        with pytest.raises(ResourceError, match="the disk is gone"):
            engine.prefill(PROMPT)
    engine.close()


@pytest.mark.parametrize("is_resident", [True, False])
def test_closing_before_all_is_pinned(
    bundle: Path, open_gpu: Any, gate: Gate, streamed_bytes: int, is_resident: bool
) -> None:
    engine = open_gpu(bundle, context=64, vram_bytes=None if is_resident else streamed_bytes)
    assert gate.asked.wait(PATIENCE_S)
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.opened.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("krasis-load", "krasis-fill", "krasis-upload"))]
