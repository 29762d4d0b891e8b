"""Byte-level decoding equals that of the tokenizers library, token by token and together."""

from __future__ import annotations

import random

import pytest

from krasis.runtime.text.byte_level import SLICE_IDS, ByteLevelDecoder
from krasis.runtime.text.library_tokenizer import LibraryTokenizer


@pytest.fixture(scope="module")
def library() -> LibraryTokenizer:
    """All bytes, tokens with letters that no byte has, and added tokens of every kind."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġthe", "ä", "世界", "Ġ世", "a b", "Ċ", "\u200b"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(
        [AddedToken("<|im_end|>", special=True), AddedToken("\uff5cé\uff5c", special=True)]
    )
    made.add_tokens([AddedToken("<think>", special=False), AddedToken("two words", special=False), "Ġthe"])
    return LibraryTokenizer(made.to_str().encode())


@pytest.fixture(scope="module")
def decoder(library: LibraryTokenizer) -> ByteLevelDecoder:
    assert library.is_byte_level
    made = ByteLevelDecoder(
        library.num_tokens, [number for number, _, skip in library.added_tokens() if skip]
    )
    while not made.is_complete:
        made.learn(*library.spelled(*made.next_slice))
    return made


def test_every_token(library: LibraryTokenizer, decoder: ByteLevelDecoder) -> None:
    for number in range(library.num_tokens):
        for skip in (True, False):
            expected = library.decode([number], skip_special=skip)
            assert decoder.decode([number], skip_special=skip) == expected


def test_random_sequences(library: LibraryTokenizer, decoder: ByteLevelDecoder) -> None:
    # Random bytes: broken UTF-8 of every kind must be replaced as the library replaces it.
    rng = random.Random(3)
    for _ in range(5000):
        ids = [rng.randrange(library.num_tokens) for _ in range(rng.randrange(12))]
        assert decoder.decode(ids, skip_special=True) == library.decode(ids, skip_special=True)


def test_what_is_not_learnt_is_said() -> None:
    decoder = ByteLevelDecoder(SLICE_IDS + 10, [])
    assert decoder.decode([0], skip_special=True) is None
    decoder.learn(b"a" * SLICE_IDS, b"".join(i.to_bytes(4, "little") for i in range(SLICE_IDS + 1)))
    assert decoder.decode([0, 5, SLICE_IDS - 1], skip_special=True) == "aaa"
    assert decoder.decode([0, SLICE_IDS], skip_special=True) is None
    assert decoder.decode([-1], skip_special=True) is None
    assert decoder.next_slice == (SLICE_IDS, SLICE_IDS + 10)
    assert not decoder.is_complete


@pytest.mark.parametrize("begins", [[0, 1], [0, 1, 5], [0, 3, 2], []])
def test_a_table_that_is_none_is_refused(begins: list[int]) -> None:
    decoder = ByteLevelDecoder(2, [])
    with pytest.raises(ValueError, match="table"):
        decoder.learn(b"ab", b"".join(i.to_bytes(4, "little") for i in begins))
