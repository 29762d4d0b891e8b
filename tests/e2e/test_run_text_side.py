"""Ends, sampling defaults, template variables and thinking, from a checkpoint's files to krasis-run's output.

The model is random; where a test needs it to say something, the sampler reads it from a script.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from krasis.formats.errors import KrasisError, UsageError
from krasis.runtime import Engine, EngineSettings, SamplingSettings
from krasis.runtime.cli.conversation import Conversation
from krasis.runtime.cli.terminal import Terminal
from krasis.runtime.sampler import Sampler

# Opens the thinking in the prompt, or closes it at once: the switch of Qwen3's templates.
SWITCHED = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{{- '<think>\\n' if enable_thinking is not defined or enable_thinking "
    "else '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
)
QUESTION = [{"role": "user", "content": "def"}]
GREEDY = SamplingSettings()


@pytest.fixture(scope="module")
def text_bundle(
    chat_bundle: Path, tokenizer_json: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """(tokenizer_config changes, generation_config or None) -> the chat bundle's model with such files.

    The files name ``<|endoftext|>`` as the only end, as those of fine-tunes of base models do.
    """
    from krasis.convert.conversion import convert, prepare
    from krasis.convert.progress import Reporter
    from krasis.convert.settings import ConvertSettings

    library = json.loads(tokenizer_json)
    last = max(token["id"] for token in library["added_tokens"])
    end = {**library["added_tokens"][0], "id": last + 1, "content": "<|endoftext|>"}
    library["added_tokens"].append(end)

    def make(generation: dict[str, Any] | None = None, **tokens: Any) -> Path:
        folder = tmp_path_factory.mktemp("text")
        shutil.copytree(chat_bundle.parent / "hf", folder / "hf")
        (folder / "hf/tokenizer.json").write_text(json.dumps(library))
        config = {"eos_token": "<|endoftext|>", "chat_template": SWITCHED, **tokens}
        (folder / "hf/tokenizer_config.json").write_text(json.dumps(config))
        path = folder / "hf/generation_config.json"
        path.unlink() if generation is None else path.write_text(json.dumps(generation))
        reporter = Reporter(0)
        out = folder / "model.krasis"
        convert(prepare([folder / "hf"], out, ConvertSettings(num_threads=1), reporter), reporter)
        return out

    return make


@pytest.fixture(scope="module")
def bundle(text_bundle: Callable[..., Path]) -> Path:
    """With a switch of thinking; without recommended sampling."""
    return text_bundle()


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Iterator[Engine]:
    with Engine.open(bundle, EngineSettings(threads=1, prefault=False)) as opened:
        yield opened


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> Callable[[str], None]:
    """(text, special tokens among it) -> every answer is that, over and over."""

    def script(text: str) -> None:
        ids = engine.text.tokenizer.encode(text)
        monkeypatch.setattr(
            Sampler, "pick", lambda self, logits, context, answer: ids[len(answer) % len(ids)]
        )

    return script


def krasis_run(bundle: Path, *arguments: str) -> Result:
    from krasis.runtime.cli.run import main

    return CliRunner().invoke(main, [str(bundle), "--threads", "1", "--prompt", "def", *arguments])


def test_an_answer_ends_where_the_template_ends_turns(engine: Engine, says: Callable[[str], None]) -> None:
    says("so</think>Hi<|im_end|>\n<|im_start|>user")
    answer = engine.generate(QUESTION, GREEDY, max_tokens=40)
    assert "".join(piece.text for piece in answer if piece.kind == "answer") == "Hi"
    assert (answer.stats.text, answer.stats.reasoning, answer.stats.stop_reason) == ("Hi", "so", "end")
    assert engine.text.end_tokens.added == ("<|im_end|>",)
    # Ids of a rendered conversation are one, too.
    ids = engine.generate(engine.encode(QUESTION), GREEDY, max_tokens=40)
    assert ["".join(piece.text for piece in ids), ids.stats.stop_reason] == ["soHi", "end"]
    # A text that is continued ends as the files say, and nothing in it is thinking.
    plain = engine.generate("def", GREEDY, max_tokens=22)
    assert "".join(piece.text for piece in plain).startswith("so</think>Hi\nuser")
    assert plain.stats.stop_reason == "length"


def test_a_special_token_as_stop(engine: Engine, bundle: Path, says: Callable[[str], None]) -> None:
    says("quick<|im_start|>user brown<|endoftext|>")
    for stop, text in (("<|im_start|>", "quick"), ("<|im_start|>user", "quick"), ("user b", "quick")):
        answer = engine.generate("def", GREEDY, max_tokens=40, stop=[stop])
        assert "".join(piece.text for piece in answer) == text
        assert answer.stats.stop_reason == "stop"
    whole = engine.generate("def", GREEDY, max_tokens=40, stop=["<|im_start|>x"])
    assert "".join(piece.text for piece in whole) == "quickuser brown"
    assert whole.stats.stop_reason == "end"
    assert krasis_run(bundle, "--raw", "--stop", "<|im_start|>").stdout == "quick\n"


def test_thinking_is_shown_apart(bundle: Path, says: Callable[[str], None]) -> None:
    says("\nthe fox\n</think>\n\nquick brown<|im_end|>")
    result = krasis_run(bundle)
    assert result.stdout == "quick brown\n"
    assert "fox" not in result.stderr
    shown = krasis_run(bundle, "--show-thinking")
    assert shown.stdout == "quick brown\n"
    assert "[thinking]\nthe fox\n[answer]\n" in shown.stderr
    assert krasis_run(bundle, "--show-thinking", "--no-stream").stderr.startswith(
        shown.stderr[: shown.stderr.index("load ")]
    )
    report = json.loads(krasis_run(bundle, "--json").stdout)
    assert (report["text"], report["reasoning"]) == ("quick brown", "the fox")
    raw = json.loads(krasis_run(bundle, "--json", "--raw", "--max-tokens", "9").stdout)
    assert raw["reasoning"] == ""


def test_an_answer_that_never_comes_is_explained(bundle: Path, says: Callable[[str], None]) -> None:
    says("the fox ")
    result = krasis_run(bundle, "--max-tokens", "9")
    assert result.stdout == "\n"
    assert "still thinking after 9 tokens" in result.stderr
    assert "--max-tokens" in result.stderr


def test_switches_of_the_template(engine: Engine, bundle: Path, says: Callable[[str], None]) -> None:
    def prompt(**variables: Any) -> str:
        ids = engine.encode(QUESTION, template_vars=variables)
        return engine.text.tokenizer.decode(ids, skip_special=False)

    assert prompt().endswith("assistant\n<think>\n")
    assert prompt(enable_thinking=True) == prompt()
    assert prompt(enable_thinking=False).endswith("<think>\n\n</think>\n\n")
    says("quick<|im_end|>")
    answer = engine.generate(QUESTION, GREEDY, template_vars={"enable_thinking": False})
    assert "".join(piece.text for piece in answer) == answer.stats.text == "quick"
    off = len(engine.encode(QUESTION, template_vars={"enable_thinking": False}))
    on = len(engine.encode(QUESTION))
    for flags, count in (
        ((), on),
        (("--think",), on),
        (("--no-think",), off),
        (("--template-var", "enable_thinking=False"), off),
    ):
        report = json.loads(krasis_run(bundle, "--json", *flags).stdout)
        assert report["num_prompt_tokens"] == count
        assert report["settings"]["template_vars"] == ({} if not flags else {"enable_thinking": count == on})


def test_settings_have_variables_for_every_call(bundle: Path) -> None:
    settings = EngineSettings(threads=1, prefault=False, template_vars={"enable_thinking": False})
    with Engine.open(bundle, settings) as opened:
        off = opened.encode(QUESTION)
        on = opened.encode(QUESTION, template_vars={"enable_thinking": True})
    assert len(off) > len(on)


def test_variables_that_do_nothing_or_must_not_be(
    engine: Engine, bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        engine.encode(QUESTION, template_vars={"budget": 3, "enable_thinking": True})
    assert [record.message for record in caplog.records if "budget" in record.message] == [
        "the chat template does not use budget (it offers: enable_thinking)"
    ]
    for prompt in ("text", [1, 2]):
        with pytest.raises(UsageError, match="chat template"):
            engine.encode(prompt, template_vars={"enable_thinking": True})
    with pytest.raises(UsageError, match="messages"):
        engine.encode(QUESTION, template_vars={"messages": []})
    for flags in (("--template-var", "messages=1"), ("--template-var", "x"), ("--raw", "--no-think")):
        result = krasis_run(bundle, *flags)
        assert result.exit_code == 2
        assert result.stderr.startswith("krasis-run: ")
        assert len(result.stderr.splitlines()) == 1


def test_a_template_without_the_switch_says_so(chat_bundle: Path) -> None:
    result = krasis_run(chat_bundle, "--no-think", "--max-tokens", "1")
    assert result.exit_code == 0
    assert "--no-think has no effect" in result.stderr


def test_sampling_without_a_recommendation_is_told(
    bundle: Path, chat_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = "recommend no sampling"
    assert "greedy (temperature 0)" in krasis_run(bundle, "--max-tokens", "1").stderr
    assert told not in krasis_run(bundle, "--max-tokens", "1", "--temperature", "0").stderr
    assert told not in krasis_run(chat_bundle, "--max-tokens", "1").stderr
    with Engine.open(bundle, EngineSettings(threads=1, prefault=False)) as opened:
        for _ in range(2):
            list(opened.generate(QUESTION, max_tokens=1))
    assert [told in record.message for record in caplog.records].count(True) == 1


def test_files_in_other_programs_forms(
    text_bundle: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    generation = {"temperature": "0.6", "top_k": -1, "typical_p": 0.9, "eos_token_id": [-1, 999_999, "fox"]}
    made = text_bundle(generation | {"stop_strings": ["STOP"]})
    with Engine.open(made, EngineSettings(threads=1, prefault=False)) as opened:
        assert opened.text.sampling == SamplingSettings(temperature=0.6)
        assert opened.text.named_ends == {opened.text.tokenizer.token_id("<|endoftext|>")}
        assert opened.text.defaults.stops == ("STOP",)
    for name in ("temperature is text", "typical_p", "999999", "'fox'"):
        assert any(name in record.message for record in caplog.records)


def test_penalties_reach_the_sampler(engine: Engine) -> None:
    chosen = SamplingSettings(frequency_penalty=100.0)
    answer = engine.generate("def", chosen, max_tokens=30)
    list(answer)
    assert len(set(answer.stats.tokens)) == len(answer.stats.tokens) == 30
    again = engine.generate("def", SamplingSettings(presence_penalty=100.0), max_tokens=30)
    list(again)
    assert again.stats.tokens == answer.stats.tokens
    few = engine.generate("def", SamplingSettings(presence_penalty=100.0, penalty_last_n=1), max_tokens=30)
    list(few)
    assert 2 <= len(set(few.stats.tokens)) < 30


def test_a_chat_sends_answers_back_without_their_thinking(
    engine: Engine, says: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    says("the fox</think>quick<|im_end|>")
    conversation = Conversation(engine, GREEDY, 40, None)
    answer = conversation.ask("def")
    list(answer)
    conversation.add_answer(answer.stats.text)
    assert [turn.content for turn in conversation.turns] == ["def", "quick"]
    terminal = Terminal(conversation)
    terminal.set_value("think off")
    assert conversation.template_vars == {"enable_thinking": False}
    assert "enable_thinking off" in capsys.readouterr().err
    says("quick<|im_end|>")
    assert "".join(piece.text for piece in conversation.ask_again()) == "quick"
    terminal.set_value("enable-thinking on")
    assert conversation.template_vars == {"enable_thinking": True}
    terminal.set_value("think none")
    assert conversation.template_vars == {}
    assert "enable_thinking (not set)" in capsys.readouterr().err
    terminal.set_value("show_thinking off")
    assert terminal.show_thinking is False
    terminal.set_value("presence_penalty 1.5")
    assert conversation.sampling.presence_penalty == 1.5
    for wrong in ("think perhaps", "show_thinking 7", "budget 3", "messages []", "enable_thinking"):
        with pytest.raises(UsageError):
            terminal.set_value(wrong)


def test_krasis_info_tells_of_ends_and_sampling(bundle: Path, text_bundle: Callable[..., Path]) -> None:
    from krasis.runtime.cli.info_command import main

    def info(path: Path, *flags: str) -> str:
        result = CliRunner().invoke(main, [str(path), *flags])
        assert result.exit_code == 0
        return result.stdout

    text = info(bundle)
    assert "<|endoftext|>; in a chat also <|im_end|>" in text
    assert "the chat template ends turns with <|im_end|>" in " ".join(text.split())
    assert "greedy (temperature 0) (the model's files recommend none)" in text
    assert "enable_thinking" in text
    record = json.loads(info(bundle, "--json"))["text"]
    assert record["added_end_tokens"] == ["<|im_end|>"]
    assert record["template_variables"] == ["enable_thinking"]
    assert record["thinking"] == ["<think>"]
    with pytest.raises(KrasisError, match="temperature is out of range"):  # before the hours
        text_bundle({"do_sample": True, "temperature": -1})
