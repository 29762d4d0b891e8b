"""Streaming text: whole characters only, and nothing lost or invented."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krasis.formats.errors import FormatError
from krasis.runtime.text.tokenizer import REPLACEMENT, Tokenizer


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*[stream.push(token) for token in ids], stream.finish()]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain words and  two  spaces",
        "Grüße, 世界 🙂🙃 done",
        "é" * 30,
        "👩‍👩‍👧‍👦" * 8,
        "\ufffd real \ufffd\ufffd",
        "\n\n  x",
    ],
)
def test_streamed_text_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    pieces = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_text_streams(tokenizer: Tokenizer, text: str) -> None:
    assert "".join(streamed(tokenizer, tokenizer.encode(text))) == text


@given(st.lists(st.integers(0, 291), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_tokens_stream_as_they_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    # Random bytes are mostly broken UTF-8: what streams must still be what decoding at once gives.
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_of_several_tokens_appears_when_it_is_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦉")
    assert len(ids) > 1
    assert streamed(tokenizer, ids) == [*[""] * (len(ids) - 1), "🦉", ""]


def test_half_a_character_at_the_end_is_shown_as_broken(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🦉")[:-1]
    assert streamed(tokenizer, ids)[-1] == REPLACEMENT


def test_special_tokens_are_not_shown(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_id("<|im_end|>")
    assert end is not None
    assert tokenizer.encode("a<|im_end|>")[-1] == end
    assert "".join(streamed(tokenizer, [*tokenizer.encode("a"), end])) == "a"
    assert tokenizer.token_id("<|nothing|>") is None


def test_leading_spaces_of_a_sentencepiece_decoder_survive() -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models

    vocabulary = {"\u2581the": 0, "\u2581cat": 1, "s": 2}
    library = Library(models.WordLevel(vocabulary, unk_token="s"))  # noqa: S106  no password
    library.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(library.to_str().encode(), 3)
    ids = [0, 1, 2] * 10
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == " ".join(["the cats"] * 10)


def test_a_damaged_or_foreign_tokenizer_is_refused(tokenizer_json: bytes) -> None:
    with pytest.raises(FormatError, match=r"tokenizer\.json: the tokenizer cannot be read"):
        Tokenizer(tokenizer_json[:-40], 4096)
    with pytest.raises(FormatError, match="more tokens than the model"):
        Tokenizer(tokenizer_json, 100)
