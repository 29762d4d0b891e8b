"""A tokenizer.json in the ``tokenizers`` library. Only workers load it: the library panics, aborts or grows
without bound on some files, and on some texts."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from tokenizers import Tokenizer, decoders

from krasis.runtime.text.added_tokens import DeclaredTokens, join_tokens


class LibraryTokenizer:
    """Loaded from the file's bytes; raises what the library raises.

    declared: ``DeclaredTokens.to_json``, the tokens that stand beside the file. notes: on those of them that
    did not fit into num_rows rows.
    """

    __slots__ = ("_library", "notes")

    def __init__(self, data: bytes, declared: dict[str, Any] | None = None, num_rows: int = 0) -> None:
        self._library = Tokenizer.from_str(data.decode("utf-8"))
        self.notes: list[str] = []
        if declared is not None:
            tokens = DeclaredTokens.from_json(declared)
            self._library, self.notes = join_tokens(self._library, data, tokens, num_rows)
        # Settings of the training that the file was saved from.
        self._library.no_truncation()
        self._library.no_padding()

    @property
    def num_tokens(self) -> int:
        """Tokens, added ones included."""
        return int(self._library.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, special: bool) -> list[int]:
        """As ``Tokenizer.encode``."""
        return list(self._library.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """As ``Tokenizer.decode``."""
        return str(self._library.decode(list(ids), skip_special_tokens=skip_special))

    def token_id(self, token: str) -> int | None:
        """As ``Tokenizer.token_id``."""
        return self._library.token_to_id(token)

    def longest_token(self) -> int:
        """Characters of the longest token as it is spelled in the vocabulary."""
        return max(map(len, self._library.get_vocab(with_added_tokens=True)), default=1)

    def added_tokens(self) -> list[tuple[int, str, bool]]:
        """Id, text, and whether decoding leaves it out when it skips special tokens."""
        added = self._library.get_added_tokens_decoder()
        return sorted((number, token.content, token.special) for number, token in added.items())

    @property
    def is_byte_level(self) -> bool:
        """Whether text is made by joining bytes, so that no token's text depends on others."""
        return type(self._library.decoder) is decoders.ByteLevel

    def spelled(self, begin: int, end: int) -> tuple[bytes, bytes]:
        """Tokens of ids begin to end as the file spells them, UTF-8 one behind the other, and where each
        begins: u32 [ids + 1]. An id without a token is empty."""
        texts = [(self._library.id_to_token(number) or "").encode("utf-8") for number in range(begin, end)]
        begins = array("I", [0, *accumulate(map(len, texts))])
        return b"".join(texts), begins.tobytes()
