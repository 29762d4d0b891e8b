"""Prefix reuse: what a conversation shares with the cache, edited turns, saved and restored prefixes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from krasis.formats.errors import ChecksumError, FormatError, MismatchError, UsageError
from krasis.runtime import Engine, EngineSettings, SamplingSettings
from krasis.runtime.cli.conversation import Conversation
from krasis.runtime.cli.run import main

GREEDY = SamplingSettings()
SETTINGS = EngineSettings(context=400, threads=2, prefill_chunk=16, prefault=False)


@pytest.fixture
def engine(chat_bundle: Path) -> Iterator[Engine]:
    with Engine.open(chat_bundle, SETTINGS) as engine:
        yield engine


def finish(conversation: Conversation, answer: Any) -> Any:
    for _ in answer:
        pass
    conversation.add_answer(answer.stats.text)
    return answer.stats


def shared(left: Any, right: Any) -> int:
    """How many items two sequences begin with alike."""
    differ = (at for at, (one, other) in enumerate(zip(left, right, strict=False)) if one != other)
    return next(differ, min(len(left), len(right)))


# ---- edited turns ------------------------------------------------------------------------------------------


def test_an_edited_last_turn_computes_only_what_changed(engine: Engine) -> None:
    talk = Conversation(engine, GREEDY, 6, "be brief")
    finish(talk, talk.ask("the first question, of some length"))
    finish(talk, talk.ask("the second question"))
    held = engine.tokens
    stats = finish(talk, talk.edit("the second thought, which is longer than it was"))
    assert [one.content for one in talk.turns if one.role == "user"] == [
        "the first question, of some length",
        "the second thought, which is longer than it was",
    ]
    prompt = engine.encode(talk.messages[:-1])
    common = shared(prompt, held)
    assert stats.num_cached_tokens == common > len(engine.encode(talk.messages[:3])) - 10
    # From nothing, the same bits: the answer is that of a conversation that never was another.
    logits = engine.prefill([5, 6, 7])
    everything = engine.tokens
    with Engine.open(engine.bundle.path, SETTINGS) as fresh:
        np.testing.assert_array_equal(fresh.prefill(everything), logits)
        fresh.reset()
        again = Conversation(fresh, GREEDY, 6, "be brief")
        again.turns = talk.turns[:-2]
        assert finish(again, again.ask(talk.turns[-2].content)).text == stats.text
        assert again.turns == talk.turns


def test_answering_again_computes_one_token(engine: Engine) -> None:
    talk = Conversation(engine, GREEDY, 6, None)
    first = finish(talk, talk.ask("a question"))
    again = finish(talk, talk.ask_again())
    assert again.text == first.text
    assert again.num_cached_tokens == again.num_prompt_tokens - 1


def test_an_edit_without_room_changes_nothing(engine: Engine) -> None:
    talk = Conversation(engine, GREEDY, 4, None)
    with pytest.raises(UsageError, match="no question"):
        talk.edit("x")
    finish(talk, talk.ask("a question"))
    before = list(talk.turns)
    with pytest.raises(UsageError, match="context is full"):
        talk.edit("word " * 500)
    assert talk.turns == before
    assert talk.last_question == "a question"


def test_a_changed_system_message_computes_everything(engine: Engine) -> None:
    talk = Conversation(engine, GREEDY, 4, "one")
    finish(talk, talk.ask("a question"))
    held = engine.tokens
    talk.system = "two"
    stats = finish(talk, talk.ask_again())
    assert stats.num_cached_tokens == shared(engine.encode(talk.messages[:-1]), held) < 12


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"kv_dtype": "f32"}, {"activations": "float32"}],
    ids=["int8-f16", "int8-f32", "reference"],
)
def test_going_on_from_a_file_gives_the_same_bits(
    chat_bundle: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = EngineSettings(context=120, threads=2, prefill_chunk=16, prefault=False, **changes)
    tokens = [int(one) for one in np.random.default_rng(2).integers(0, 258, 60)]
    path = tmp_path / "a.kv"
    with Engine.open(chat_bundle, settings) as engine:
        engine.prefill(tokens[:41])
        engine.decode(tokens[41])
        engine.save_prefix(path)
        prefilled = engine.prefill(tokens[42:], all_logits=True)
        decoded = engine.decode(9).copy()
    # The kernels' bits depend neither on the batch nor on the threads; those of NumPy's products do on the
    # batch.
    chunk = 16 if "activations" in changes else 7
    other = EngineSettings(context=77, threads=1, prefill_chunk=chunk, prefault=False, **changes)
    with Engine.open(chat_bundle, other) as engine:
        engine.prefill([1, 2, 3])  # what is held before is given up
        assert engine.load_prefix(path) == b""
        assert engine.tokens == tuple(tokens[:42])
        np.testing.assert_array_equal(engine.prefill(tokens[42:], all_logits=True), prefilled)
        np.testing.assert_array_equal(engine.decode(9), decoded)


def test_a_refused_file_leaves_what_is_held(chat_bundle: Path, engine: Engine, tmp_path: Path) -> None:
    tokens = list(range(30))
    whole = engine.prefill(tokens)
    path = tmp_path / "a.kv"
    engine.save_prefix(path)
    data = bytearray(path.read_bytes())
    data[6000] ^= 1
    (tmp_path / "altered.kv").write_bytes(bytes(data))
    engine.truncate(20)
    with pytest.raises(ChecksumError, match="altered"):
        engine.load_prefix(tmp_path / "altered.kv")
    with pytest.raises(FormatError, match="missing"):
        engine.load_prefix(tmp_path / "none.kv")
    for settings, error, words in (
        (EngineSettings(context=29, threads=1), UsageError, "longer than the context"),
        (EngineSettings(context=60, threads=1, kv_dtype="f32"), MismatchError, "another precision"),
    ):
        with Engine.open(chat_bundle, settings) as other:
            other.prefill([4, 5])
            with pytest.raises(error, match=words):
                other.load_prefix(path)
            assert other.tokens == (4, 5)
    assert engine.tokens == tuple(range(20))
    np.testing.assert_array_equal(engine.prefill(tokens[20:]), whole)


def test_a_read_error_halfway_forgets_the_old_tokens(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.prefill(list(range(30)))
    engine.save_prefix(tmp_path / "a.kv")
    state: Any = engine._backend.state
    original = state.import_

    def failing(slot: int, layer: int, *pair: Any) -> None:
        if layer == 1:
            raise OSError("disk gone")
        original(slot, layer, *pair)

    monkeypatch.setattr(state, "import_", failing)
    with pytest.raises(OSError, match="disk gone"):
        engine.load_prefix(tmp_path / "a.kv")
    assert engine.tokens == ()


def test_a_prefix_of_another_bundle_is_refused(
    make_bundle: Callable[..., Path], make_config: Callable[..., Any], tmp_path: Path
) -> None:
    small = EngineSettings(context=50, threads=1)
    config = make_config(num_hidden_layers=1)
    with Engine.open(make_bundle(config, seed=1), small) as engine:
        engine.prefill([1, 2, 3])
        engine.save_prefix(tmp_path / "a.kv")
    # The same shapes, other weights; and the same weights, converted again.
    another = Engine.open(make_bundle(config, seed=2), small)
    with another, pytest.raises(MismatchError, match="another bundle"):
        another.load_prefix(tmp_path / "a.kv")
    with Engine.open(make_bundle(config, seed=1), small) as engine:
        engine.load_prefix(tmp_path / "a.kv")
        assert engine.tokens == (1, 2, 3)


def test_a_chat_goes_on_from_its_file(chat_bundle: Path, engine: Engine, tmp_path: Path) -> None:
    talk = Conversation(engine, GREEDY, 6, "be brief")
    finish(talk, talk.ask("hello"))
    talk.save(tmp_path / "talk.kv")
    talk.save(tmp_path / "talk.json")
    held = engine.tokens
    expected = finish(talk, talk.ask("and then?"))
    with Engine.open(chat_bundle, SETTINGS) as other:
        again = Conversation(other, GREEDY, 6, None)
        assert again.load(tmp_path / "talk.kv")
        assert again.system == "be brief"
        assert other.tokens == held
        stats = finish(again, again.ask("and then?"))
        assert stats.text == expected.text
        assert stats.num_cached_tokens == expected.num_cached_tokens > 10
        # The JSON alone brings the words, not the cache.
        other.reset()
        assert again.load(tmp_path / "talk.json")
        assert finish(again, again.ask("and then?")).num_cached_tokens == 0
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [one["role"] for one in saved["messages"]] == ["system", "user", "assistant"]


# ---- krasis-run --------------------------------------------------------------------------------------------


def run(*arguments: Any, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments], input=stdin, prog_name="krasis-run")


FLAGS = ["--temperature", "0", "--max-tokens", "8", "--ctx", "300", "--threads", "2"]


def test_save_and_load_on_the_command_line(chat_bundle: Path, tmp_path: Path) -> None:
    path, text = tmp_path / "doc.kv", "a long document " * 8
    first = run(chat_bundle, "--raw", "--prompt", text + "first?", *FLAGS, "--save-kv", path)
    assert first.exit_code == 0, first.output
    assert "saved" in first.stderr
    fresh = run(chat_bundle, "--raw", "--prompt", text + "other?", *FLAGS, "--json")
    second = run(chat_bundle, "--raw", "--prompt", text + "other?", *FLAGS, "--json", "--load-kv", path)
    assert second.exit_code == 0, second.output
    cold, warm = json.loads(fresh.stdout), json.loads(second.stdout)
    assert cold["num_cached_tokens"] == 0
    assert warm["num_cached_tokens"] > 100
    assert warm["tokens"] == cold["tokens"]
    assert warm["prefilled_on"] == warm["decoded_on"] == "CPU"
    # An older prefix of the name is replaced.
    assert run(chat_bundle, "--prompt", "hello", *FLAGS, "--save-kv", path).exit_code == 0
    assert "tok/s on CPU" in first.stderr


def test_mistakes_with_prefix_files(chat_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = run(chat_bundle, "--prompt", "x", *FLAGS, "--save-kv", tmp_path / "notes.txt")
    assert result.exit_code == 2
    assert "no saved prefix" in result.stderr
    assert result.stdout == ""  # before the prompt is computed
    result = run(chat_bundle, "--prompt", "x", *FLAGS, "--save-kv", tmp_path / "no" / "a.kv")
    assert result.exit_code == 2
    assert "no such folder" in result.stderr
    result = run(chat_bundle, "--prompt", "x", *FLAGS, "--load-kv", tmp_path / "none.kv")
    assert result.exit_code == 3
    assert "missing" in result.stderr
    result = run(chat_bundle, "--prompt", "x", *FLAGS, "--load-kv", tmp_path / "notes.txt")
    assert result.exit_code == 3
    assert len(result.stderr.strip().splitlines()) == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "tpu"], "tpu"),
        (["--gpus", "0"], "gpus"),
        (["--gpu-dtype", "f32"], "gpu-dtype"),
        (["--vram", "much"], "--vram"),
    ],
)
def test_bad_device_options(chat_bundle: Path, flags: list[str], words: str) -> None:
    result = run(chat_bundle, "--prompt", "x", *FLAGS, *flags)
    assert result.exit_code == 2
    assert words in result.stderr
