"""The library's face on a converted bundle: what the cache keeps, what is refused, what is freed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krasis.formats.errors import FormatError, MismatchError, UsageError
from krasis.runtime import Engine, EngineSettings, Message, SamplingSettings

GREEDY = SamplingSettings()


@pytest.fixture
def engine(chat_bundle: Path) -> Iterator[Engine]:
    with Engine.open(chat_bundle, EngineSettings(context=200, threads=2, prefill_chunk=16)) as engine:
        yield engine


def test_prefill_and_decode_go_on_from_what_is_held(engine: Engine) -> None:
    tokens = list(range(40, 80))
    whole = engine.prefill(tokens, all_logits=True)
    engine.reset()
    first = engine.prefill(tokens[:7])
    np.testing.assert_array_equal(first, whole[6])
    np.testing.assert_array_equal(engine.decode(tokens[7]), whole[7])
    np.testing.assert_array_equal(engine.prefill(tokens[8:]), whole[-1])
    assert engine.tokens == tuple(tokens)
    engine.truncate(20)
    np.testing.assert_array_equal(engine.prefill(tokens[20:25], all_logits=True), whole[20:25])


def test_only_new_tokens_of_a_conversation_are_computed(engine: Engine) -> None:
    messages = [Message("user", "hello")]
    first = engine.generate(messages, GREEDY, max_tokens=6)
    text = "".join(piece.text for piece in first)
    assert first.stats.num_cached_tokens == 0
    held = engine.tokens
    messages += [Message("assistant", text), Message("user", "and?")]
    second = engine.generate(messages, GREEDY, max_tokens=6)
    continued = "".join(piece.text for piece in second)
    prompt = engine.encode(messages)
    differ = [at for at, (new, old) in enumerate(zip(prompt, held, strict=False)) if new != old]
    common = min([*differ, len(held)])
    assert second.stats.num_cached_tokens == common >= 8
    # From scratch the answer is the same, bit for bit.
    engine.reset()
    again = engine.generate(messages, GREEDY, max_tokens=6)
    assert "".join(piece.text for piece in again) == continued
    assert again.stats.num_cached_tokens == 0


def test_the_same_prompt_again_computes_its_last_token_only(engine: Engine) -> None:
    list(engine.generate("the quick brown", GREEDY, max_tokens=4))
    answer = engine.generate("the quick brown", GREEDY, max_tokens=4)
    list(answer)
    assert answer.stats.num_cached_tokens == answer.stats.num_prompt_tokens - 1


def test_progress_counts_the_new_tokens(engine: Engine) -> None:
    seen: list[tuple[int, int]] = []
    engine.prefill(list(range(40)), progress=lambda done, total: seen.append((done, total)))
    done = [one for one, _ in seen]
    assert {total for _, total in seen} == {40}
    assert done == sorted(set(done))
    assert {16, 32, 40} <= set(done)  # whole chunks
    num_layers = engine.architecture.num_layers
    assert len(done) == 3 * num_layers  # each of them layer by layer


def test_an_interrupted_prefill_keeps_whole_chunks(engine: Engine) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.prefill(list(range(40)), progress=interrupt)
    assert engine.tokens == tuple(range(32))
    expected = engine.prefill(list(range(32, 40)))
    engine.reset()
    np.testing.assert_array_equal(engine.prefill(list(range(40))), expected)


def test_generation_to_the_end_of_the_context(engine: Engine) -> None:
    answer = engine.generate(list(range(190)), GREEDY)
    list(answer)
    assert answer.stats.stop_reason == "context"
    assert len(answer.stats.tokens) == 11
    assert len(engine.tokens) == engine.context == 200


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([], "empty"),
        ([-1], "vocabulary"),
        ([300], "vocabulary"),
        ([1] * 201, "context is full"),
        ([2**70], "vocabulary"),
    ],
)
def test_bad_tokens_are_refused(engine: Engine, tokens: list[int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        engine.prefill(tokens)
    assert engine.tokens == ()


def test_a_full_context_refuses_to_decode(engine: Engine) -> None:
    engine.prefill([1] * 200)
    with pytest.raises(UsageError, match="context is full"):
        engine.decode(1)
    engine.truncate(199)
    engine.decode(1)
    engine.truncate(10)
    with pytest.raises(UsageError, match="vocabulary"):
        engine.decode(300)
    with pytest.raises(UsageError, match="more tokens than are held"):
        engine.truncate(11)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": 0}, "context"),
        ({"threads": -1}, "threads"),
        ({"isa": "neon"}, "isa"),
        ({"activations": "int4"}, "activations"),
        ({"kv_dtype": "bf16"}, "kv_dtype"),
        ({"experts": "gpu"}, "GPU experts"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        EngineSettings(**changes)


def test_a_pass_on_a_cpu_is_512_tokens_unless_the_settings_say(chat_bundle: Path) -> None:
    for changes, expected in (({}, 512), ({"prefill_chunk": 700}, 700), ({"prefill_chunk": 16}, 16)):
        with Engine.open(
            chat_bundle, EngineSettings(context=1000, threads=1, prefault=False, **changes)
        ) as e:
            assert e.prefill_chunk == expected
    with Engine.open(chat_bundle, EngineSettings(context=100, threads=1, prefault=False)) as e:
        assert e.prefill_chunk == 100


def test_a_tier_that_was_left_out_is_named(
    make_bundle: Callable[..., Path], make_config: Callable[..., Any]
) -> None:
    bundle = make_bundle(make_config(num_hidden_layers=1), tiers=("gpu",))
    with pytest.raises(MismatchError, match="no cpu experts"):
        Engine.open(bundle)
    with Engine.open(bundle, EngineSettings(activations="float32", experts="gpu")) as engine:
        assert engine.prefill([1, 2, 3]).shape == (300,)


def test_closing_ends_threads_and_refuses_work(chat_bundle: Path) -> None:
    before = threading.active_count()
    engine = Engine.open(chat_bundle)
    engine.close()
    engine.close()
    assert threading.active_count() == before
    with pytest.raises(UsageError, match="closed"):
        engine.prefill([1])


def test_opening_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(FormatError, match="no manifest"):
        Engine.open(tmp_path)
    assert threading.active_count() == before


def test_loading_maps_and_does_not_copy(chat_bundle: Path) -> None:
    with Engine.open(chat_bundle, EngineSettings(prefault=False)) as engine:
        address, num_bytes = engine.bundle.mapping_of("cpu-000.safetensors")
        weights = engine._backend._weights
        for layer in weights.layers:
            assert address <= layer.experts.ctypes.data < address + num_bytes
            assert layer.experts.ctypes.data % 2**21 == 0
            assert not layer.experts.flags.writeable
        assert engine.load_s < 0.5


def test_prefault_reads_the_tiers_that_are_used(chat_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    from krasis.formats.bundle.reader import Bundle
    from krasis.runtime.host.prefault import files_of_tiers, start_prefault

    with Bundle.open(chat_bundle) as bundle, caplog.at_level("INFO"):
        prefault = start_prefault(bundle, ("dense", "cpu"))
        assert prefault is not None
        prefault.wait()
        files = files_of_tiers(bundle, ("dense", "cpu"))
        assert files == ["dense-000.safetensors", "cpu-000.safetensors"]
        num_bytes = sum(bundle.mapping_of(file)[1] for file in files)
        prefault.stop()
    assert f"{num_bytes / 1e9:.2f} GB" in caplog.text
    assert "GB/s" in caplog.text


def test_weights_beyond_memory_are_not_prefaulted(
    chat_bundle: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("krasis.runtime.host.prefault.available_memory_bytes", lambda: 1000)
    monkeypatch.setattr("krasis.runtime.host.filesystem.filesystem_of_path", lambda _: "ext4")  # or a tmpfs
    with Engine.open(chat_bundle) as engine:
        assert engine.prefill([1, 2]).shape == (300,)
    assert "do not fit in the 0.0 GB of memory" in caplog.text
