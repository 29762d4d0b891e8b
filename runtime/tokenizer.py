"""Text to token ids and back, by the ``tokenizers`` library, and text that appears as tokens arrive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from krasis.formats.errors import FormatError, UnsupportedModelError
from krasis.formats.plain_text import decode_file, plain_text, what_it_is
from krasis.runtime.added_tokens import DeclaredTokens, join_tokens

if TYPE_CHECKING:
    import tokenizers

REPLACEMENT = "\ufffd"
# A decoder that looks back (a space that only the first token loses) looks back one token; a few more cost
# nothing.
CONTEXT_TOKENS = 4


class Tokenizer:
    """A bundle's ``tokenizer.json``. vocab_size: rows of the model's embedding; larger ids are refused.

    declared: tokens that stand beside the file. What the file says of truncation and padding was for training
    and is not done. notes: a sentence for each declared token that did not fit.
    """

    __slots__ = ("_tokenizer", "notes", "vocab_size")

    def __init__(
        self,
        data: bytes,
        vocab_size: int,
        where: str = "tokenizer.json",
        declared: DeclaredTokens | None = None,
    ) -> None:
        from tokenizers import Tokenizer as Library

        text = decode_file(data, where)
        try:
            self._tokenizer: tokenizers.Tokenizer = Library.from_str(text)
        except Exception as error:
            raise FormatError(
                "the tokenizer cannot be read", where=where, got=error, hint=what_it_is(data)
            ) from error
        self.notes: list[str] = []
        if declared is not None:
            self._tokenizer, self.notes = join_tokens(self._tokenizer, data, declared, vocab_size)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if size > vocab_size:
            raise FormatError(
                "the tokenizer has more tokens than the model", where=where, got=size, limit=vocab_size
            )
        self.vocab_size = vocab_size

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids. special: add what the tokenizer puts around a text (a begin token, if it has one).

        Raises UsageError for what is no text, or has half characters.
        """
        return list(self._tokenizer.encode(plain_text(text, "the text"), add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids; broken UTF-8 becomes U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def token_id(self, token: str) -> int | None:
        """The id of a token such as ``<|im_end|>``, None if there is none."""
        try:
            found = self._tokenizer.token_to_id(token)
        except UnicodeEncodeError:  # half a character is in no vocabulary
            return None
        return None if found is None else int(found)

    def special_tokens(self) -> dict[str, int]:
        """Text -> id of the tokens that decoding leaves out."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    def added_tokens(self) -> dict[str, int]:
        """Text -> id of all tokens that were added to the vocabulary, matched before any splitting."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items()}

    def stream(self) -> TokenStream:
        """A decoder for tokens that arrive one by one."""
        return TokenStream(self)


class TokenStream:
    """Turns tokens into text as they arrive; never gives half a character.

    The pieces of ``push`` and the last of ``finish`` together are the text of all the tokens. A trailing
    U+FFFD may be the beginning of a character whose other bytes are in later tokens, so it is held until more
    arrives.
    """

    __slots__ = ("_given", "_ids", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0  # characters of the text of _ids that were given out

    def push(self, token: int) -> str:
        """The text that became certain with this token; often a whole word, sometimes nothing."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        held = text.endswith(REPLACEMENT)
        certain = text[: len(text) - held]
        piece = certain[self._given :]
        self._given = max(self._given, len(certain))
        if not held and len(self._ids) > 2 * CONTEXT_TOKENS:
            self._forget(text)
        return piece

    def finish(self) -> str:
        """What was held back, a U+FFFD if the last character never became whole."""
        text = self._tokenizer.decode(self._ids)
        piece = text[self._given :]
        self._given = len(text)
        return piece

    def _forget(self, text: str) -> None:
        """Keeps a few tokens of context, if they begin with a whole character and read as in text."""
        kept = self._ids[-CONTEXT_TOKENS:]
        ending = self._tokenizer.decode(kept)
        if text.endswith(ending) and not ending.startswith(REPLACEMENT):
            self._ids, self._given = kept, len(ending)


def missing_tokenizer(where: str) -> UnsupportedModelError:
    """The error for a bundle that was converted without a tokenizer."""
    return UnsupportedModelError(
        "the bundle has no tokenizer.json, so text cannot be turned into tokens",
        where=where,
        hint="convert again from a folder that has tokenizer.json, or give token ids to Engine.prefill",
    )
