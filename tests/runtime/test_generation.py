"""Stop strings and the decode loop, with a scripted model in place of a real one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krasis.runtime.generation import Answer, Generation, GenerationPlan, StopStrings, run
from krasis.runtime.sampler import Sampler
from krasis.runtime.settings import SamplingSettings
from krasis.runtime.text.tokenizer import Tokenizer

VOCAB = 292


def shown(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    text = ""
    for piece in pieces:
        out, stopped = matcher.push(piece)
        text += out
        if stopped:
            return text, True
    return text + matcher.finish(), False


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.integers(1, 5),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_cut_at_the_first_one_however_the_text_arrives(
    text: str, stops: list[str], size: int
) -> None:
    # The first that is complete: reading letter by letter, the earliest end of any stop string.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    letters = shown(stops, list(text))
    if not ends:
        assert letters == (text, False)
        assert shown(stops, pieces) == (text, False)
        return
    assert letters[1]
    assert shown(stops, pieces)[1]
    assert letters[0] == text[: min(at for end, at in ends if end == min(ends)[0])]
    assert not any(stop in letters[0] for stop in stops)


def test_text_that_cannot_begin_a_stop_string_is_not_held() -> None:
    matcher = StopStrings(["<end>"])
    assert matcher.push("hello <") == ("hello ", False)
    assert matcher.push("e") == ("", False)
    assert matcher.push("gg") == ("<egg", False)
    assert matcher.push("a<end>b") == ("a", True)


def scripted(tokenizer: Tokenizer, script: list[int], **options: object) -> tuple[Answer, list[int]]:
    """An answer of a model that always says script, and the list of tokens it was fed."""
    fed: list[int] = []

    def logits() -> np.ndarray:
        row = np.zeros(VOCAB, dtype=np.float32)
        row[script[len(fed)]] = 1.0
        return row

    def step(token: int) -> np.ndarray:
        fed.append(token)
        return logits()

    plan = GenerationPlan(
        first=logits,
        step=step,
        context=fed,
        room=int(options.get("room", 1000)),
        sampler=Sampler(SamplingSettings()),
        stream=tokenizer.stream(),
        end_tokens=frozenset({291}),
        stops=StopStrings(options.get("stop", ())),
        max_tokens=int(options.get("max_tokens", 1000)),
    )
    stats = Generation(num_prompt_tokens=3)
    return Answer(run(plan, stats), stats), fed


def test_an_end_token_ends_and_is_not_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the fox 🦉")
    answer, fed = scripted(tokenizer, [*ids, 291, 5])
    assert "".join(piece.text for piece in answer) == "the fox 🦉"
    assert (answer.stats.stop_reason, answer.stats.text) == ("end", "the fox 🦉")
    assert answer.stats.tokens == fed == ids
    assert answer.stats.num_decode_steps == len(ids)


@pytest.mark.parametrize(
    ("options", "count", "reason"),
    [({"max_tokens": 4}, 4, "length"), ({"room": 2}, 3, "context"), ({"room": 0}, 1, "context")],
)
def test_limits(tokenizer: Tokenizer, options: dict[str, int], count: int, reason: str) -> None:
    answer, fed = scripted(tokenizer, list(range(70, 90)), **options)
    list(answer)
    assert (len(answer.stats.tokens), answer.stats.stop_reason) == (count, reason)
    # The last token needs no place in the cache.
    assert len(fed) == count - 1


def test_a_stop_string_over_several_tokens_ends(tokenizer: Tokenizer) -> None:
    answer, _ = scripted(tokenizer, [*tokenizer.encode("the quick fox jumps"), 291], stop=["k fo"])
    assert "".join(piece.text for piece in answer) == "the quic"
    assert answer.stats.stop_reason == "stop"


def test_half_a_character_is_flushed_at_the_limit(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x🦉")
    answer, _ = scripted(tokenizer, ids, max_tokens=len(ids) - 1)
    assert "".join(piece.text for piece in answer) == "x\ufffd" == answer.stats.text


def test_a_reader_that_leaves_stops_the_work(tokenizer: Tokenizer) -> None:
    answer, fed = scripted(tokenizer, tokenizer.encode("the quick brown fox"))
    first = next(answer)
    answer.close()
    assert answer.stats.stop_reason == "interrupted"
    assert answer.stats.text == first.text
    assert fed == []
