"""Slots of the GPU: opened, filled, cut and closed; batches cut where a workspace ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from krasis.formats.errors import NativeError, ResourceError
from krasis.formats.models.registry import spec_from_hf
from krasis.runtime.batch import batch_of
from krasis.runtime.gpu.chunk import part_of
from krasis.runtime.gpu.kv_cache import GpuKvCache
from krasis.runtime.gpu.state import GpuState
from tests.support.tiny_families import CONFIGS


@pytest.fixture
def state(kernel_device: Any) -> GpuState:
    stream = kernel_device.stream("compute")
    spec = spec_from_hf(CONFIGS["glm4_moe"], "glm4_moe")
    return GpuState(GpuKvCache(kernel_device, stream, spec, 16, torch.float16, 2), stream, "f16")


def test_slots_are_opened_and_closed(state: GpuState) -> None:
    assert (state.open(), state.open()) == (0, 1)
    with pytest.raises(ResourceError, match="every slot is taken"):
        state.open()
    state.close(0)
    for act in (state.length, state.close, state.checkpoint):
        with pytest.raises(NativeError, match="not open"):
            act(0)
    assert state.open() == 0


def test_a_batch_goes_on_where_its_slots_end(state: GpuState) -> None:
    one, other = state.open(), state.open()
    batch = batch_of([(one, 0, [1, 2, 3], "last"), (other, 0, [4], "none")])
    state.begin(batch)
    state.advance(batch.spans)
    assert (state.length(one), state.length(other)) == (3, 1)
    with pytest.raises(NativeError, match=r"2\.\.3 of slot 1"):
        state.begin(batch_of([(one, 1, [7], "last"), (other, 2, [7], "last")]))
    assert (state.length(one), state.length(other)) == (3, 1)  # nothing was forgotten
    with pytest.raises(NativeError, match=r"3\.\.17"):
        state.begin(batch_of([(one, 3, [7] * 14, "last")]))
    assert state.restorable(one, 9) == 3
    state.rewind(one, 2)
    assert state.length(one) == 2
    with pytest.raises(NativeError, match="no such position"):
        state.rewind(one, 3)


def test_what_is_imported_is_exported(state: GpuState) -> None:
    slots = [state.open(), state.open()]
    rng = np.random.default_rng(2)
    rows = {slot: rng.normal(size=(3, 2, 2, 5, 32)).astype(np.float16) for slot in slots}
    for layer in range(3):
        for slot in slots:
            state.import_(slot, layer, *rows[slot][layer])
    for slot in slots:
        assert state.length(slot) == 5
        for layer in range(3):
            for found, expected in zip(state.export(slot, layer, 4), rows[slot][layer], strict=True):
                np.testing.assert_array_equal(found, expected[:, :4])
    with pytest.raises(NativeError, match="no such position"):
        state.export(0, 0, 6)


def test_parts_of_a_batch_want_what_the_whole_wants() -> None:
    batch = batch_of([(3, 10, range(4), "last"), (1, 0, range(3), "all"), (2, 5, range(2), "none")])
    for step in range(1, 10):
        parts = [part_of(batch, begin, begin + step) for begin in range(0, 9, step)]
        assert np.concatenate([part.tokens for part in parts]).tolist() == batch.tokens.tolist()
        wanted, begin, cells = [], 0, []
        for part in parts:
            wanted += [begin + row for row in part.wanted_rows()]
            for span in part.spans:
                cells += [(span.slot, span.start + row) for row in range(span.rows)]
            begin += len(part.tokens)
        assert wanted == batch.wanted_rows()
        assert cells == [(s.slot, s.start + row) for s in batch.spans for row in range(s.rows)]
