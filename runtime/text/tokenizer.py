"""Text to token ids and back, by the ``tokenizers`` library, and text that appears as tokens arrive."""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Mapping, Sequence
from threading import Thread

from krasis.formats.errors import FormatError, KrasisError, UnsupportedModelError
from krasis.formats.plain_text import decode_file, plain_text, what_it_is
from krasis.formats.process.worker_protocol import unpack_parts
from krasis.runtime.text.added_tokens import DeclaredTokens
from krasis.runtime.text.byte_level import ByteLevelDecoder
from krasis.runtime.text.sandbox import Resident, shared_sandbox

logger = logging.getLogger(__name__)

REPLACEMENT = "\ufffd"
# A decoder that looks back (a space that only the first token loses) looks back one token; a few more cost
# nothing.
CONTEXT_TOKENS = 4
# Bounds on a worker's answers: ids beyond those of the text's bytes, bytes of one token's text.
MAX_ADDED_TOKENS = 4096
MAX_TOKEN_BYTES = 64 * 1024
MAX_SLICE_BYTES = 8 * 2**20
LEARNING_PAUSE_S = 0.0005  # in which others may ask the worker


class Tokenizer:
    """A bundle's ``tokenizer.json``. vocab_size: rows of the model's embedding; larger ids are refused.

    declared: tokens that stand beside the file. What the file says of truncation and padding was for training
    and is not done. notes: a sentence for each declared token that did not fit.

    The library runs in a worker with limits on time and memory (sandbox). Raises FormatError for a file
    that it refuses or does not survive, ResourceError if the system starts no worker.
    """

    __slots__ = ("_added", "_byte_level", "_learner", "_resident", "notes", "vocab_size")

    def __init__(
        self,
        data: bytes,
        vocab_size: int,
        where: str = "tokenizer.json",
        declared: DeclaredTokens | None = None,
    ) -> None:
        options = {} if declared is None else {"declared": declared.to_json(), "num_rows": vocab_size}
        text = decode_file(data, where).encode()
        self._resident = Resident("load_tokenizer", text, where, "the tokenizer cannot be read", options)
        self._byte_level: ByteLevelDecoder | None = None
        self._learner: Thread | None = None
        try:
            answer = shared_sandbox().load(self._resident)
        except FormatError as error:
            if hint := what_it_is(data):
                raise FormatError(error.what, where=where, got=error.got, hint=hint) from error
            raise
        try:
            facts, _ = unpack_parts(answer)
            size = int(facts["num_tokens"])
            self._added = [(int(number), str(text), bool(skip)) for number, text, skip in facts["added"]]
            self.notes = [str(note) for note in facts["notes"]]
            if facts["is_byte_level"] and size <= vocab_size:
                special = [number for number, _, is_special in self._added if is_special]
                self._byte_level = ByteLevelDecoder(size, special)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise FormatError("the tokenizer cannot be read", where=where, got=error) from error
        for note in self.notes:
            logger.info("%s: %s", where, note)
        if size > vocab_size:
            raise FormatError(
                "the tokenizer has more tokens than the model", where=where, got=size, limit=vocab_size
            )
        self.vocab_size = vocab_size

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids. special: add what the tokenizer puts around a text (a begin token, if it has one).

        Raises UsageError for what is no text or has half characters, FormatError if the tokenizer fails on it
        or exceeds its limits.
        """
        data = plain_text(text, "the text").encode()
        # Each byte is a token at worst, unless the tokenizer makes text of its own.
        most = 4 * (MAX_ADDED_TOKENS + 4 * len(data))
        answer = self._ask("encode", "the tokenizer fails on this text", {"special": special}, data, most)
        if len(answer) % 4:
            raise FormatError("the tokenizer gives no token ids", where=self._resident.where)
        self._learn_in_background()
        return array("I", answer).tolist()

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids; broken UTF-8 becomes U+FFFD. Raises as ``encode``."""
        if self._byte_level is not None:
            text = self._byte_level.decode(ids, skip_special=skip_special)
            if text is not None:
                return text
        most = MAX_TOKEN_BYTES * (len(ids) + 1)
        head = {"skip_special": skip_special}
        answer = self._ask(
            "decode", "the tokenizer fails on these tokens", head, array("I", ids).tobytes(), most
        )
        return answer.decode("utf-8", "replace")

    def token_id(self, token: str) -> int | None:
        """The id of a token such as ``<|im_end|>``, None if there is none."""
        try:
            data = token.encode("utf-8")
        except UnicodeEncodeError:  # half a character is in no vocabulary
            return None
        answer = self._ask("token_id", "the tokenizer fails on a token", {}, data, MAX_TOKEN_BYTES)
        try:
            found, _ = unpack_parts(answer)
            return None if found is None else int(found)
        except (ValueError, TypeError) as error:
            raise FormatError(
                "the tokenizer fails on a token", where=self._resident.where, got=error
            ) from error

    def special_tokens(self) -> dict[str, int]:
        """Text -> id of the tokens that decoding leaves out."""
        return {content: number for number, content, is_special in self._added if is_special}

    def added_tokens(self) -> dict[str, int]:
        """Text -> id of all tokens that were added to the vocabulary, matched before any splitting."""
        return {content: number for number, content, _ in self._added}

    def _learn_in_background(self) -> None:
        """Begins to fetch the table of a byte-level decoder, while the prompt is computed."""
        if self._byte_level is not None and self._learner is None:
            self._learner = Thread(target=self._learn, args=(self._byte_level,), daemon=True)
            self._learner.start()

    def _learn(self, decoder: ByteLevelDecoder) -> None:
        try:
            while not decoder.is_complete:
                begin, end = decoder.next_slice
                head = {"begin": begin, "end": end}
                answer = self._ask("spell", "the tokenizer fails on its tokens", head, b"", MAX_SLICE_BYTES)
                _, (spelled, begins) = unpack_parts(answer)
                decoder.learn(bytes(spelled), bytes(begins))
                time.sleep(LEARNING_PAUSE_S)
        except (KrasisError, ValueError) as error:
            logger.info("%s: tokens are decoded by the worker: %s", self._resident.where, error)

    def _ask(self, operation: str, failure: str, head: Mapping[str, int], data: bytes, most: int) -> bytes:
        return shared_sandbox().call(self._resident, operation, failure, head, data, most)

    @property
    def longest_token(self) -> int:
        """Characters of the longest token, as the vocabulary spells it: at least those it stands for."""
        answer = self._ask("longest_token", "the tokenizer fails on its tokens", {}, b"", MAX_TOKEN_BYTES)
        try:
            return int(unpack_parts(answer)[0])
        except (ValueError, TypeError) as error:
            raise FormatError(
                "the tokenizer fails on its tokens", where=self._resident.where, got=error
            ) from error

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
