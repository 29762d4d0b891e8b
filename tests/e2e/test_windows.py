"""Models with windows, on prompts that are longer than their rings: both CPU backends against transformers,
in any chunks, after going back, several sequences in one batch, on a server, and in files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open

from krasis.convert.cli import main as convert
from krasis.formats.bundle.reader import Bundle
from krasis.runtime import Engine
from krasis.runtime.backend import Backend
from krasis.runtime.batch import Span, batch_of, one_sequence
from krasis.runtime.cpu.backend import CpuBackend
from krasis.runtime.cpu.float_backend import FloatBackend
from krasis.runtime.cpu.spans import cut_spans
from krasis.runtime.cpu.weights import ModelWeights, load_weights
from krasis.runtime.serving.api import Delta, Finished, Request
from krasis.runtime.serving.core import EngineCore
from krasis.runtime.serving.model_side import CoreSettings
from krasis.runtime.serving.opening import open_core
from krasis.runtime.serving.prefix_folder import PrefixFolder
from krasis.runtime.settings import EngineSettings
from tests.support.random_weights import dequantised_state, transformers_logits, write_checkpoint
from tests.support.tiny_checkpoints import tiny

RelativeError = Callable[[np.ndarray, np.ndarray], float]
TOKENS = np.random.default_rng(15).integers(0, 203, 300).tolist()  # rings have 128 positions


@pytest.fixture(scope="module", params=["gpt_oss", "gemma4"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    arguments = [str(tiny(request.param, folder / "hf")), "-o", str(folder / "b.krasis"), "--quiet"]
    done = CliRunner().invoke(convert, [*arguments, "--tiers", "cpu", "--force-text"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder / "b.krasis"


@pytest.fixture(scope="module")
def weights(bundle: Path) -> Iterator[ModelWeights]:
    with Bundle.open(bundle) as opened:
        yield load_weights(opened, "cpu")


@pytest.fixture(scope="module")
def expected(weights: ModelWeights, bundle: Path) -> np.ndarray:
    config = json.loads((bundle.parent / "hf" / "config.json").read_text("utf-8"))
    folder = write_checkpoint(dequantised_state(weights), config, bundle.parent / "dequantised")
    return transformers_logits(folder, TOKENS)


def opened(weights: ModelWeights, **changes: object) -> CpuBackend:
    settings = {"context": 512, "threads": 2, "slots": 4} | changes
    return CpuBackend(weights, EngineSettings(**settings))  # type: ignore[arg-type]


def logits_of(backend: Backend, chunks: list[int], slot: int, start: int = 0) -> np.ndarray:
    """Of TOKENS from start on, in chunks of these sizes."""
    out = []
    for size in chunks:
        piece = np.array(TOKENS[start : start + size])
        out.append(backend.run(one_sequence(piece, start, "all", slot)).copy())
        start += size
    return np.concatenate(out)


def test_float_equals_transformers_beyond_the_ring(
    weights: ModelWeights, expected: np.ndarray, relative_error: RelativeError
) -> None:
    settings = EngineSettings(context=320, kv_dtype="f32", activations="float32")
    backend = FloatBackend(weights, settings)
    for chunks in ([300], [100, 7, 190, 1, 1, 1]):
        slot = backend.state.open()
        assert relative_error(logits_of(backend, chunks, slot), expected) <= 1e-4
        backend.state.close(slot)


def test_int8_equals_transformers_in_any_chunks_with_the_same_bits(
    weights: ModelWeights, expected: np.ndarray, relative_error: RelativeError
) -> None:
    backend = opened(weights)
    assert backend.state.has_rings
    whole = logits_of(backend, [300], backend.state.open())
    assert relative_error(whole, expected) <= 2e-2
    for chunks in ([64, 65, 113, 58], [1] * 300):
        slot = backend.state.open()
        np.testing.assert_array_equal(logits_of(backend, chunks, slot), whole)
        backend.state.close(slot)
    backend.close()


@pytest.mark.parametrize("kv_dtype", ["f16", "int8"])
def test_the_ring_has_the_bits_of_a_whole_cache(
    weights: ModelWeights, monkeypatch: pytest.MonkeyPatch, kv_dtype: str
) -> None:
    backend = opened(weights, kv_dtype=kv_dtype)
    found = logits_of(backend, [130, 170], backend.state.open())
    backend.close()
    monkeypatch.setattr("krasis.runtime.state.places.ring_positions", lambda _: 512)
    backend = opened(weights, kv_dtype=kv_dtype)
    assert not backend.state.has_rings
    np.testing.assert_array_equal(logits_of(backend, [130, 170], backend.state.open()), found)
    backend.close()


@pytest.mark.parametrize("at", [299, 240, 100, 90])
def test_goes_back_within_the_ring_and_to_copies(weights: ModelWeights, at: int) -> None:
    backend = opened(weights)
    state, slot = backend.state, backend.state.open()
    first = logits_of(backend, [100], slot)
    state.checkpoint(slot)
    whole = np.concatenate([first, logits_of(backend, [200], slot, 100)])
    assert state.restorable(slot, at) == at
    assert state.restorable(slot, 50) == 0
    for _ in range(2):
        state.rewind(slot, at)
        state.checkpoint(slot)
        np.testing.assert_array_equal(logits_of(backend, [300 - at], slot, at), whole[at:])
        state.rewind(slot, at)
        backend.run(one_sequence(np.array([7] * 200), at, "none", slot))  # another turn, over the whole ring
    backend.close()


def test_sequences_of_one_batch_get_the_bits_of_their_own_runs(weights: ModelWeights) -> None:
    """Long ones that are cut into rounds beside short ones and single tokens."""
    backend = opened(weights)
    slots = [backend.state.open() for _ in range(4)]
    backend.run(one_sequence(np.array(TOKENS[:140]), 0, "none", slots[0]))
    starts = (140, 0, 0, 0)
    ends = (300, 1, 150, 70)
    parts = [(s, a, TOKENS[a:b], "all") for s, a, b in zip(slots, starts, ends, strict=True)]
    together = backend.run(batch_of(parts)).copy()
    for slot in slots:
        backend.state.close(slot)
    whole = logits_of(backend, [300], backend.state.open())
    wanted = [whole[a:b] for a, b in zip(starts, ends, strict=True)]
    np.testing.assert_array_equal(together, np.concatenate(wanted))
    backend.close()


def test_rounds_cover_the_rows_in_order() -> None:
    spans = (Span(3, 0, 1, 9), Span(1, 1, 150, 40), Span(0, 151, 2, 0), Span(2, 153, 64, 5))
    found = cut_spans(spans, 64)
    assert [[(s.slot, s.first_row, s.rows, s.start) for s in part] for part in found] == [
        [(3, 0, 1, 9), (1, 1, 64, 40)],
        [(1, 0, 64, 104)],
        [(1, 0, 22, 168), (0, 22, 2, 0), (2, 24, 64, 5)],
    ]


def open_engine(bundle: Path, **changes: object) -> Engine:
    settings = {"context": 512, "threads": 1, "prefault": False, "device": "cpu"} | changes
    return Engine.open(bundle, EngineSettings(**settings))  # type: ignore[arg-type]


def test_a_turn_that_is_written_again_goes_on_from_the_end_of_its_prompt(bundle: Path) -> None:
    """As templates do that drop the thinking of a turn: all of a long answer, and the header before it."""
    turn = TOKENS[100:110]
    with open_engine(bundle) as engine:
        engine.prefill(TOKENS[:150])
        for token in TOKENS[:140]:
            engine.decode(token)
        assert engine.keep_prefix([*TOKENS[:147], *turn]) == 147
        found = engine.prefill(turn)
        engine.reset()
        engine.prefill(TOKENS[:147])
        np.testing.assert_array_equal(engine.prefill(turn), found)
        assert engine.keep_prefix([*TOKENS[:9], 1, 2, 3]) in (0, 9)


def test_a_saved_prefix_holds_the_ends_of_windows(bundle: Path, tmp_path: Path) -> None:
    """And one of before, which holds all of them, goes on as well."""
    path = tmp_path / "a.kv"
    with open_engine(bundle) as engine:
        engine.prefill(TOKENS)
        engine.save_prefix(path)
        expected = [engine.decode(token) for token in (5, 6)]
    with safe_open(path, "np") as file:
        assert set(file.keys()) == {"keys", "values", "window_keys", "window_values", "tokens"}
        assert file.get_tensor("window_keys").shape[2] == 16
        assert file.get_tensor("keys").shape[2] == 300
    with open_engine(bundle, context=320) as engine:
        engine.prefill(TOKENS[100:])
        engine.load_prefix(path)
        np.testing.assert_array_equal([engine.decode(token) for token in (5, 6)], expected)


@pytest.mark.parametrize("bundle", ["gpt_oss"], indirect=True)  # of gemma4 none were saved
def test_a_prefix_of_whole_windows_still_opens(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.kv"
    with monkeypatch.context() as patch, open_engine(bundle) as engine:
        engine.prefill(TOKENS[:100])
        expected = engine.decode(5)
        engine.truncate(100)
        state = engine._backend.state
        patch.setattr(type(state), "keeps_windows", False)
        patch.setattr(state, "_window", lambda _: None)
        engine.save_prefix(path)
    with safe_open(path, "np") as file:
        assert set(file.keys()) == {"keys", "values", "tokens"}
        assert file.get_tensor("keys").shape[2] == 100
    with open_engine(bundle) as engine:
        engine.load_prefix(path)
        np.testing.assert_array_equal(engine.decode(5), expected)


def greedy(engine: Engine, prompt: list[int], count: int) -> list[int]:
    engine.reset()
    out = [int(engine.prefill(prompt).argmax())]
    while len(out) < count:
        out.append(int(engine.decode(out[-1]).argmax()))
    return out


def test_conversations_on_a_server_get_what_each_gets_alone(bundle: Path, tmp_path: Path) -> None:
    """A turn with other last tokens, a branch, one that had to make room, and an earlier server's."""
    settings = EngineSettings(context=512, threads=1, prefault=False, device="cpu")
    with open_engine(bundle) as alone:

        def ask(core: EngineCore, prompt: list[int], name: str) -> tuple[list[int], int]:
            wanted = {"max_tokens": 6, "ignore_ends": True, "conversation": name}
            request = Request(id=name, prompt=tuple(prompt), **wanted)  # type: ignore[arg-type]
            events = list(core.submit(request).events(60))
            assert isinstance(events[-1], Finished), events[-1]
            ids = [token for event in events if isinstance(event, Delta) for token in event.tokens]
            assert ids == greedy(alone, prompt, 6)
            return ids, events[-1].usage.num_cached

        with open_core(
            bundle, settings, CoreSettings(num_slots=2, cache_bytes=10**8), prefix_dir=tmp_path
        ) as opened:
            opened.core.start()
            assert ask(opened.core, TOKENS[:200], "a")[1] == 0
            second = [*TOKENS[:198], *TOKENS[40:140]]  # the end of the prompt written in another way
            assert ask(opened.core, second, "a")[1] == 198
            answer, cached = ask(opened.core, second, "a")
            assert cached == len(second) - 1
            assert ask(opened.core, [*TOKENS[:190], *TOKENS[30:60]], "b")[1] == 190
            for number in range(3):
                ask(opened.core, TOKENS[number + 1 : number + 161], f"other {number}")
            assert ask(opened.core, [*second, *answer, 11, 12], "a")[1] == len(second) + 5
        with open_core(bundle, settings, CoreSettings(num_slots=1), prefix_dir=tmp_path) as opened:
            opened.core.start()
            assert ask(opened.core, [*second, *answer, 11, 13], "a")[1] >= len(second) + 5
    # Several GPUs keep whole contexts: they have no use for these files, and let them be.
    whole = SimpleNamespace(description="GPUs", kv_dtype="f16", capacity=512)
    with Bundle.open(bundle) as found:
        folder = PrefixFolder(tmp_path, found, whole, 1 << 40)
        files = set(tmp_path.iterdir())
        assert files
        assert folder.prefixes() == []
        assert set(tmp_path.iterdir()) == files
