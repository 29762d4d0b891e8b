"""Models whose layers overwrite a state (matrices, or the last columns of a convolution) from a checkpoint
through the converter to logits on the CPU, in int8 and float; going back to a copy of the state, passes that
break off, and the server's slots.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from krasis.convert.cli import main as convert
from krasis.formats.bundle.reader import Bundle
from krasis.formats.errors import FormatError, KrasisError
from krasis.runtime import Engine, EngineSettings
from krasis.runtime.batch import batch_of
from krasis.runtime.cli.run import main as krasis_run
from krasis.runtime.cpu.weights import load_weights
from krasis.runtime.exclusive import CallCancelledError
from krasis.runtime.serving.api import Delta, Finished, Request
from krasis.runtime.serving.core import EngineCore
from krasis.runtime.serving.model_side import CoreSettings
from krasis.runtime.serving.opening import open_core
from krasis.runtime.state.borders import STEP_TOKENS, TAIL_TOKENS, borders, pieces
from tests.support.random_weights import dequantised_state, transformers_logits, write_checkpoint
from tests.support.tiny_checkpoints import tiny

SAVED = {
    "qwen3_next": {"keys", "values", "matrices", "columns"},
    "lfm2_moe": {"keys", "values", "conv_columns"},
    "nemotron_h": {"keys", "values", "matrices", "columns"},
    "kimi_linear": {"latents", "matrices", "columns"},
    "glm5_next": {"indexed_latents", "index_keys", "latents", "matrices", "columns"},
}
FAMILIES = tuple(SAVED)
TOKENS = np.random.default_rng(8).integers(0, 256, 90).tolist()
LONG = np.random.default_rng(9).integers(0, 256, 230).tolist()
RelativeError = Callable[[np.ndarray, np.ndarray], float]
SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "int8": ({}, 2e-2),
    "float": ({"activations": "float32", "kv_dtype": "f32"}, 1e-3),
}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(request.param, tmp_path_factory.mktemp(request.param) / "hf")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.parent / "b.krasis"
    arguments = [str(checkpoint), "-o", str(out), "--tiers", "cpu", "--quiet", "--force-text"]
    done = CliRunner().invoke(convert, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def expected(bundle: Path, checkpoint: Path) -> np.ndarray:
    """transformers' logits of TOKENS on the dequantised weights."""
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    with Bundle.open(bundle) as opened:
        state = dequantised_state(load_weights(opened, "cpu"))
    return transformers_logits(write_checkpoint(state, config, bundle.parent / "dequantised"), TOKENS)


def open_engine(bundle: Path, **changes: Any) -> Engine:
    return Engine.open(
        bundle, EngineSettings(context=256, threads=1, prefault=False, device="cpu", **changes)
    )


@pytest.mark.parametrize("settings", SETTINGS)
def test_logits_equal_transformers(
    bundle: Path, expected: np.ndarray, relative_error: RelativeError, settings: str
) -> None:
    changes, limit = SETTINGS[settings]
    with open_engine(bundle, **changes) as engine:
        whole = engine.prefill(TOKENS, all_logits=True)
        assert relative_error(whole, expected) <= limit
        engine.reset()
        parts = [engine.prefill(TOKENS[begin:end], all_logits=True) for begin, end in ((0, 7), (7, 70))]
        parts += [engine.decode(token)[None] for token in TOKENS[70:]]
    assert relative_error(np.concatenate(parts), expected) <= limit
    if settings == "int8":
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("settings", SETTINGS)
def test_goes_back_to_the_nearest_copy_and_computes_the_rest(bundle: Path, settings: str) -> None:
    with open_engine(bundle, **SETTINGS[settings][0]) as engine:
        engine.prefill(TOKENS[:60])
        for token in TOKENS[60:64]:
            engine.decode(token)
        border = 60 - TAIL_TOKENS
        other = [*TOKENS[:58], 3, 4, 5]
        assert engine.keep_prefix(other) == border
        found = engine.prefill(other[border:])
        assert engine.keep_prefix([*TOKENS[: border - 1], 9]) == 0
        again = engine.prefill(other)
    if settings == "int8":
        np.testing.assert_array_equal(found, again)
    else:  # products of NumPy depend on the number of rows
        np.testing.assert_allclose(found, again, atol=1e-5 * np.abs(again).max())


def test_what_a_cancelled_pass_spoilt_is_computed_again(bundle: Path) -> None:
    with open_engine(bundle) as engine:
        engine.prefill(TOKENS[:10])
        held = engine.tokens

        def cancel(_done: int, _of: int) -> None:
            engine.cancel()

        with pytest.raises(CallCancelledError):
            engine.prefill(TOKENS[10:26], progress=cancel)
        assert engine.tokens == held
        found = engine.prefill(TOKENS[10:40])
        engine.reset()
        np.testing.assert_array_equal(found, engine.prefill(TOKENS[:40]))


def test_a_saved_prefix_carries_the_state(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    with open_engine(bundle) as engine:
        engine.prefill(TOKENS[:30])

        def cancel(_done: int, _of: int) -> None:
            engine.cancel()

        with pytest.raises(CallCancelledError):
            engine.prefill(TOKENS[30:50], progress=cancel)
        engine.save_prefix(path, conversation=b"{}")
        expected = engine.prefill(TOKENS[30:60], all_logits=True)
    with open_engine(bundle) as engine:
        engine.prefill(TOKENS[40:50])
        assert engine.load_prefix(path) == b"{}"
        assert list(engine.tokens) == TOKENS[:30]
        np.testing.assert_array_equal(engine.prefill(TOKENS[30:60], all_logits=True), expected)
        assert engine.keep_prefix([*TOKENS[:29], 1, 2]) == 0


def test_a_saved_prefix_without_its_state_is_refused(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    with open_engine(bundle) as engine:
        engine.prefill(TOKENS[:30])
        engine.save_prefix(path)
        known = load_file(path)
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
        assert known.keys() == {*SAVED[bundle.parent.name.rstrip("0123456789")], "tokens"}
        state = next(name for name in ("matrices", "conv_columns") if name in known)
        last = "columns" if state == "matrices" else state
        for change in ({last: None}, {state: known[state][:1]}):
            tensors = {name: one for name, one in (known | change).items() if one is not None}
            save_file(tensors, path, metadata)
            with pytest.raises(FormatError, match=r"other tensors.*columns|wrong shape.*"):
                engine.load_prefix(path)
            assert list(engine.tokens) == TOKENS[:30]


def test_the_command_answers_and_saves(bundle: Path, tmp_path: Path) -> None:
    options = {"--prompt": "abc", "--max-tokens": "4", "--device": "cpu", "--ctx": "64"}
    arguments = [str(bundle), "--raw", *(part for option in options.items() for part in option)]
    done = CliRunner().invoke(krasis_run, [*arguments, "--save-kv", str(tmp_path / "a.kv")])
    assert done.exit_code == 0, done.output
    again = CliRunner().invoke(krasis_run, [*arguments, "--load-kv", str(tmp_path / "a.kv")])
    assert again.exit_code == 0, again.output


def test_prompts_are_cut_where_the_state_is_copied() -> None:
    assert list(pieces(10, 4, snapshots=False)) == [(0, 4), (4, 8), (8, 10)]
    assert list(pieces(TAIL_TOKENS, 512, snapshots=True)) == [(0, TAIL_TOKENS)]
    long = STEP_TOKENS + 100
    ends = [end for _, end in pieces(long, 10**6, snapshots=True)]
    assert ends == [STEP_TOKENS, long - TAIL_TOKENS, long]
    assert borders(7, 7 + long) == [7 + end for end in ends[:-1]]
    assert borders(7, 7 + TAIL_TOKENS) == []
    assert list(pieces(40, 10, snapshots=True)) == [(0, 10), (10, 20), (20, 24), (24, 34), (34, 40)]


@pytest.fixture(scope="module")
def alone(bundle: Path) -> Iterator[Engine]:
    with open_engine(bundle) as engine:
        yield engine


def greedy(engine: Engine, prompt: list[int], count: int) -> list[int]:
    engine.reset()
    logits, out = engine.prefill(prompt), []
    for _ in range(count):
        out.append(int(np.argmax(logits)))
        logits = engine.decode(out[-1])
    return out


def test_conversations_on_a_server_get_what_each_gets_alone(bundle: Path, alone: Engine) -> None:
    """A turn with other last tokens, a branch, and a conversation that had to make room."""
    settings = EngineSettings(context=256, threads=1, prefault=False, device="cpu")
    with open_core(bundle, settings, CoreSettings(num_slots=2, cache_bytes=10**8)) as opened:
        opened.core.start()

        def ask(prompt: list[int], name: str) -> tuple[list[int], int]:
            request = Request(
                id=name, prompt=tuple(prompt), max_tokens=6, ignore_ends=True, conversation=name
            )
            events = list(opened.core.submit(request).events(60))
            assert isinstance(events[-1], Finished), events[-1]
            ids = [token for event in events if isinstance(event, Delta) for token in event.tokens]
            assert ids == greedy(alone, prompt, 6)
            return ids, events[-1].usage.num_cached

        first = LONG[:100]
        _, cached = ask(first, "a")
        assert cached == 0
        second = [*first[:98], *LONG[150:200]]  # the end of the prompt written in another way
        _, cached = ask(second, "a")
        assert cached == 100 - TAIL_TOKENS
        answer, cached = ask(second, "a")
        assert cached == 147
        _, cached = ask([*first[:90], *LONG[200:230]], "b")  # a branch, copied
        assert cached == 100 - TAIL_TOKENS
        for number in range(3):
            ask(LONG[number + 1 : number + 81], f"other {number}")
        _, cached = ask([*second, *answer, 11, 12], "a")  # from the store
        assert cached == 148 + 5


def test_a_server_goes_on_from_what_an_earlier_one_saved(bundle: Path, alone: Engine, tmp_path: Path) -> None:
    """By itself from its folder, and from a slot's file that an operator had written."""
    settings = EngineSettings(context=256, threads=1, prefault=False, device="cpu")
    prompt = LONG[:60]

    def ask(core: EngineCore, ids: list[int]) -> tuple[list[int], int]:
        request = Request(id="a", prompt=tuple(ids), max_tokens=4, ignore_ends=True)
        events = list(core.submit(request).events(60))
        assert isinstance(events[-1], Finished), events[-1]
        found = [token for event in events if isinstance(event, Delta) for token in event.tokens]
        return found, events[-1].usage.num_cached

    with open_core(bundle, settings, CoreSettings(num_slots=1), prefix_dir=tmp_path) as opened:
        opened.core.start()
        answer, _ = ask(opened.core, prompt)
        saved = opened.core.slot_actions(opened.bundle, tmp_path).save(0, "slot.bin").result(60)
        assert saved.num_tokens == 63
    follow = [*prompt, *answer, 5]
    expected = greedy(alone, follow, 4)
    with open_core(bundle, settings, CoreSettings(num_slots=1), prefix_dir=tmp_path) as opened:
        opened.core.start()
        assert ask(opened.core, follow) == (expected, 63)
    for path in tmp_path.glob("*.kv"):
        path.unlink()
    with open_core(bundle, settings, CoreSettings(num_slots=1)) as opened:
        opened.core.start()
        opened.core.slot_actions(opened.bundle, tmp_path).restore(0, "slot.bin").result(60)
        assert ask(opened.core, follow) == (expected, 63)
        assert ask(opened.core, [*prompt[:50], 1])[1] == 0


def test_a_batch_must_begin_where_the_state_is(bundle: Path) -> None:
    with open_engine(bundle) as engine:
        engine.prefill(TOKENS[:8])
        with pytest.raises(KrasisError, match="gone back"):
            engine._backend.run(batch_of([(0, 5, TOKENS[5:8], "last")]))
