"""Linear attention (Gated DeltaNet) on the device's double: sequences of one batch, going back to a copy of
the state, passes that break off, saved prefixes, and the memory of all that.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.convert.conversion import convert, prepare
from krasis.convert.progress import Reporter
from krasis.convert.settings import ConvertSettings
from krasis.formats.errors import NativeError, OutOfDeviceMemoryError, ResourceError
from krasis.runtime import Engine, EngineSettings
from krasis.runtime.batch import batch_of, one_sequence
from krasis.runtime.device.double import DeviceDouble
from krasis.runtime.exclusive import CallCancelledError
from krasis.runtime.gpu.hybrid_state import GpuHybridState
from krasis.runtime.serving.api import Delta, Finished, Request
from krasis.runtime.serving.model_side import CoreSettings
from krasis.runtime.serving.opening import open_core
from krasis.runtime.state.borders import TAIL_TOKENS
from tests.support.tiny_checkpoints import tiny

RelativeError = Callable[[np.ndarray, np.ndarray], float]
OpenGpu = Callable[..., Any]
TOKENS = np.random.default_rng(12).integers(0, 320, 60).tolist()
LIMIT = 1.5e-3  # of f16: other numbers of rows are added up in another order


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("delta")
    layers = {"num_hidden_layers": 3, "full_attention_interval": 3, "linear_conv_kernel_dim": 4}
    source = tiny("qwen3_5_moe", folder / "hf", **layers)
    reporter, settings = Reporter(0), ConvertSettings(num_threads=1, gpu_group=64)
    convert(prepare([source], folder / "b.krasis", settings, reporter), reporter)
    return folder / "b.krasis"


@pytest.fixture
def open_delta(bundle: Path, open_gpu: OpenGpu) -> OpenGpu:
    """open_delta(**settings): an engine whose experts are all in VRAM."""
    return lambda **settings: open_gpu(bundle, **{"context": 128, "gpu_dtype": "f16"} | settings)


@pytest.fixture
def expected(open_delta: OpenGpu) -> Callable[[list[int]], np.ndarray]:
    """Logits after some tokens, computed at once."""
    backend = open_delta(seed=1)._backend
    return lambda tokens: backend.run(one_sequence(np.array(tokens), 0))[0].copy()


def test_goes_back_to_the_nearest_copy_and_computes_the_rest(
    open_delta: OpenGpu, expected: Callable[[list[int]], np.ndarray], relative_error: RelativeError
) -> None:
    engine = open_delta(seed=2)
    engine.prefill(TOKENS[:50])
    for count in range(51, 54):  # the first is captured
        found = engine.decode(TOKENS[count - 1])
        assert relative_error(found, expected(TOKENS[:count])) <= LIMIT
    border = 50 - TAIL_TOKENS
    other = [*TOKENS[:48], 3, 4, 5]
    assert engine.keep_prefix(other) == border
    assert relative_error(engine.prefill(other[border:]), expected(other)) <= LIMIT
    assert engine.keep_prefix([*TOKENS[: border - 1], 9]) == 0
    assert relative_error(engine.prefill(TOKENS[:5]), expected(TOKENS[:5])) <= LIMIT


def test_sequences_of_one_batch_go_on_by_themselves(
    open_delta: OpenGpu, expected: Callable[[list[int]], np.ndarray], relative_error: RelativeError
) -> None:
    """Prompts in one pass, tokens together, a token beside a prompt in a slot that another had."""
    backend = open_delta(seed=3, slots=3)._backend
    held = {0: TOKENS[:20], backend.state.open(): TOKENS[20:22], backend.state.open(): TOKENS[30:39]}

    def run(more: dict[int, list[int]]) -> None:
        starts = {slot: len(held[slot]) - len(tokens) for slot, tokens in more.items()}
        found = backend.run(batch_of([(slot, starts[slot], tokens, "last") for slot, tokens in more.items()]))
        for row, slot in zip(found.copy(), more, strict=True):
            assert relative_error(row, expected(held[slot])) <= LIMIT

    def add(more: dict[int, list[int]]) -> None:
        for slot, tokens in more.items():
            held[slot] = held[slot] + tokens
        run(more)

    run(dict(held))
    add({2: [1], 0: [2], 1: [3]})
    add({1: [4], 2: [5]})
    backend.state.close(2)
    held[backend.state.open()] = []
    add({0: [7], 2: TOKENS[40:47], 1: [8]})

    def decode(done: int, _of: int) -> None:  # between the layers of a pass
        if done < 3:
            add({0: [10 + done], 1: [20 + done]})

    backend.layer_done = decode
    add({2: TOKENS[47:55]})


def test_what_broke_off_is_computed_again(
    open_delta: OpenGpu, expected: Callable[[list[int]], np.ndarray], relative_error: RelativeError
) -> None:
    engine = open_delta(seed=4)
    engine.prefill(TOKENS[:10])

    def cancel(_done: int, _of: int) -> None:
        engine.cancel()

    with pytest.raises(CallCancelledError):
        engine.prefill(TOKENS[10:26], progress=cancel)
    assert relative_error(engine.prefill(TOKENS[10:40]), expected(TOKENS[:40])) <= LIMIT


def test_a_pass_that_runs_out_of_memory_begins_where_the_states_are(
    open_delta: OpenGpu,
    expected: Callable[[list[int]], np.ndarray],
    relative_error: RelativeError,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second pass of a batch breaks off behind its first layers: both are computed again."""
    backend = open_delta(seed=5, prefill_chunk=16, slots=2)._backend
    kernels, calls, last = backend._parts.model.kernels, [], 6
    truly = type(kernels).gated_delta

    def short(self: Any, *arguments: Any) -> None:
        truly(self, *arguments)
        calls.append(len(arguments[1]))
        if len(calls) == last:
            raise OutOfDeviceMemoryError("for this test")

    monkeypatch.setattr(type(kernels), "gated_delta", short)
    found = backend.run(one_sequence(np.array(TOKENS[:30]), 0)).copy()[0]
    assert calls[:8] == [14, 2] * 2 + [14, 14] + [8, 8]  # cut where the state is copied
    assert relative_error(found, expected(TOKENS[:30])) <= LIMIT
    calls.clear()
    found = backend.run(one_sequence(np.array(TOKENS[30:60]), 30)).copy()[0]
    assert relative_error(found, expected(TOKENS)) <= LIMIT
    calls.clear()
    last = 4
    other = backend.state.open()
    parts = [(other, 0, TOKENS[:9], "none"), (0, 60, TOKENS[:1], "last")]  # the latter's state is not copied
    with pytest.raises(ResourceError, match="cannot be gone back to"):
        backend.run(batch_of(parts))


def test_a_long_prompt_is_one_pass_that_copies_the_state(
    open_delta: OpenGpu,
    expected: Callable[[list[int]], np.ndarray],
    relative_error: RelativeError,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first copy, that of its beginning, and the newest ones stay."""
    monkeypatch.setattr("krasis.runtime.state.borders.STEP_TOKENS", 9)
    engine = open_delta(seed=9)
    state = engine._backend.state
    for count, copies in ((50, [9, 18, 27, 34]), (53, [9, 27, 34, 50]), (103, [9, 53, 80, 87])):
        tokens = [*TOKENS[:50], *TOKENS[:3], *TOKENS[:50]][:count]
        engine.prefill(tokens[len(engine.tokens) :])
        assert engine._backend.last_prefill.num_passes == 1
        assert [at for at in range(1, count) if state.restorable(0, at) == at] == copies
    for border in (87, 53, 9):
        other = [*tokens[:border], 5, 6]
        assert engine.keep_prefix(other) == border
        assert relative_error(engine.prefill(other[border:]), expected(other)) <= LIMIT


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_a_saved_prefix_carries_the_state(
    bundle: Path,
    open_delta: OpenGpu,
    expected: Callable[[list[int]], np.ndarray],
    relative_error: RelativeError,
    tmp_path: Path,
    device: str,
) -> None:
    """Also that of the CPU, whose layout is the same; its experts see 8-bit activations."""
    if device == "gpu":
        saving = open_delta(seed=6)
    else:
        settings = EngineSettings(context=128, threads=1, prefault=False, device="cpu", kv_dtype="f16")
        saving = Engine.open(bundle, settings)
    saving.prefill(TOKENS[:30])
    saving.save_prefix(tmp_path / "a.kv")
    saving.close()
    engine = open_delta(seed=7)
    engine.prefill(TOKENS[40:50])
    engine.load_prefix(tmp_path / "a.kv")
    assert list(engine.tokens) == TOKENS[:30]
    found = engine.prefill(TOKENS[30:33])
    assert relative_error(found, expected(TOKENS[:33])) <= (LIMIT if device == "gpu" else 5e-2)
    assert engine.keep_prefix([*TOKENS[:29], 1]) == 0


def test_the_first_copy_and_the_newest_ones_are_kept(open_delta: OpenGpu) -> None:
    backend = open_delta(seed=8)._backend
    state = backend.state
    assert isinstance(state, GpuHybridState)
    for position in range(7):
        backend.run(one_sequence(np.array([TOKENS[position]]), position))
        state.checkpoint(0)
    assert [at for at in range(9) if state.restorable(0, at) == at] == [0, 1, 5, 6, 7]
    matrices, columns = (one.copy() for one in state.export(0, 0, 6))
    with pytest.raises(NativeError, match="not kept"):
        state.export(0, 0, 4)
    with pytest.raises(NativeError, match="gone back to"):
        state.rewind(0, 4)
    with pytest.raises(NativeError, match=r"gone back to.*4 of slot 0"):
        backend.run(one_sequence(np.array([1]), 4))
    state.rewind(0, 6)
    for found, copied in zip(state.export(0, 0, 6), (matrices, columns), strict=True):
        np.testing.assert_array_equal(found, copied)
    assert state.restorable(0, 7) == 6


def test_a_server_computes_a_prompt_in_one_pass(bundle: Path, open_delta: OpenGpu, gpu_kind: str) -> None:
    """Its end, which the next turn writes in another way, is no pass of its own; each reads all experts."""
    settings = EngineSettings(
        device=gpu_kind, context=128, threads=1, prefault=False, slots=1, gpu_dtype="f16"
    )
    alone = open_delta(seed=10)
    with open_core(bundle, settings, CoreSettings(num_slots=1)) as opened:
        opened.core.start()

        def ask(prompt: list[int]) -> tuple[list[int], int]:
            request = Request(id="a", prompt=tuple(prompt), max_tokens=2, ignore_ends=True, conversation="a")
            events = list(opened.core.submit(request).events(60))
            assert isinstance(events[-1], Finished), events[-1]
            ids = [token for event in events if isinstance(event, Delta) for token in event.tokens]
            return ids, events[-1].usage.num_cached

        for prompt, cached in ((TOKENS[:50], 0), ([*TOKENS[:48], 3, 4, 5], 50 - TAIL_TOKENS)):
            ids, num_cached = ask(prompt)
            assert num_cached == cached
            alone.reset()
            first = int(np.argmax(alone.prefill(prompt)))
            assert ids == [first, int(np.argmax(alone.decode(first)))]
        assert opened.core.status().counters.num_passes == 2


def test_every_launch_names_all_it_touches(bundle: Path, open_gpu: OpenGpu, only_double: None) -> None:
    """While a launch runs, the double hides all memory that the launch did not name."""
    found = []
    for paranoid in (False, True):
        device = DeviceDouble(seed=1, total_bytes=2**30, paranoid=paranoid)
        engine = open_gpu(bundle, device=device, context=64, gpu_dtype="f16")
        engine.prefill(TOKENS[:20])
        found.append(engine.prefill(TOKENS[20:23]))
    np.testing.assert_array_equal(*found)


def test_what_is_planned_is_what_is_allocated(bundle: Path, open_gpu: OpenGpu, only_double: None) -> None:
    plans, taken = [], []
    for slots in (1, 3):
        device = DeviceDouble(total_bytes=2**30)
        backend = open_gpu(bundle, device=device, context=64, slots=slots)._backend
        plans.append(backend._parts.plan.placement)
        taken.append(backend._parts.model.cache.memory.nbytes + backend._parts.model.cache.copies.nbytes)
    assert abs(taken[0] - plans[0].kv_bytes) < 1024
    assert taken[1] == 3 * taken[0]
    assert plans[1].kv_bytes == 3 * plans[0].kv_bytes
    assert plans[0].spare_bytes - plans[1].spare_bytes == 2 * plans[0].kv_bytes
