"""What an answer must look like: JSON, a JSON schema, a call of a tool. llguidance says which tokens go on
with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import UsageError
from krasis.formats.names import shown
from krasis.runtime.server.errors import refused
from krasis.runtime.server.fields import Fields

Bits = npt.NDArray[np.bool_]

MAX_GRAMMAR_CHARACTERS = 2**20
MAX_GBNF_CHARACTERS = 2**16  # reading them takes the square of the time
_GIVEN_UP = ("InternalError", "LexerTooComplex", "ParserTooComplex")  # what follows would fit by chance
_BOUNDED = {"whitespace_pattern": r"[ \n\t]{0,20}"}  # or a model may write blanks for ever


@dataclass(frozen=True, slots=True)
class Grammar:
    """kind: ``json_schema``, ``lark`` or ``gbnf`` (llama.cpp's). text: the schema, or the grammar. param: the
    field it came in."""

    kind: str
    text: str
    param: str


class Mask:
    """Which tokens may come next, in one answer. It belongs to one thread at a time.

    closes: if the answer begins inside of thinking, the markers that end it; till then everything may come.
    """

    __slots__ = ("_closes", "_decode", "_matcher", "_num_rows", "_tail", "_waits")

    def __init__(
        self, matcher: Any, num_rows: int, closes: Sequence[str], decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._matcher, self._num_rows = matcher, num_rows
        self._closes, self._decode = tuple(closes), decode
        self._waits = bool(closes)
        self._tail: list[int] = []

    def allowed(self) -> Bits | None:
        """bool [vocab]; None: all of them. Raises UsageError for a grammar that takes too long to follow."""
        if self._waits:
            return None
        mask = None if self._matcher.is_error() else self._matcher.compute_bitmask()
        if self._matcher.is_error() and (reason := self._matcher.stop_reason()) in _GIVEN_UP:
            raise UsageError("the grammar has become too complex to follow", got=reason)
        if mask is None:
            return None
        bits = np.frombuffer(mask, dtype=np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self._num_rows].astype(np.bool_)

    def accept(self, token: int) -> None:
        """The token that was picked."""
        if not self._waits:
            self._matcher.consume_token(token)
            return
        self._tail = [*self._tail[-15:], token]
        text = self._decode(self._tail)
        self._waits = not any(one in text for one in self._closes)


class Grammars:
    """Makes masks for one model. tokenizer_json: its file. ends: ids that may follow a complete answer."""

    def __init__(
        self, tokenizer_json: Callable[[], bytes], num_rows: int, ends: Callable[[], Sequence[int]]
    ) -> None:
        self._tokenizer_json, self._num_rows, self._ends = tokenizer_json, num_rows, ends
        self._lock = Lock()
        self._tokenizer: Any = None

    def check(self, grammar: Grammar | None) -> Grammar | None:
        """The grammar, in a form that is quickly read again. Raises ApiError (400) for one that cannot be
        followed."""
        if grammar is None:
            return None
        library = _library(grammar.param)
        if grammar.kind == "gbnf":
            grammar = replace(grammar, kind="lark", text=_converted(library, grammar))
        text = _compiled(library, grammar)
        complaint = library.LLMatcher.validate_grammar(text, self._loaded(library))
        if complaint:
            raise refused(f"'{grammar.param}' cannot be followed: {complaint[:300]}", grammar.param)
        return grammar

    def prepare(self, grammar: Grammar) -> None:
        """Reads the tokenizer, which takes a second if it is large, so that ``mask`` does not."""
        self._loaded(_library(grammar.param))

    def mask(self, grammar: Grammar, closes: Sequence[str], decode: Callable[[Sequence[int]], str]) -> Mask:
        """A mask for one answer. closes, decode: see ``Mask``."""
        library = _library(grammar.param)
        matcher = library.LLMatcher(self._loaded(library), _compiled(library, grammar), log_level=0)
        return Mask(matcher, self._num_rows, closes, decode)

    def _loaded(self, library: Any) -> Any:
        with self._lock:
            if self._tokenizer is None:
                text = self._tokenizer_json().decode("utf-8", "replace")
                self._tokenizer = library.LLTokenizer(
                    text, n_vocab=self._num_rows, eos_token=list(self._ends())
                )
            return self._tokenizer


@dataclass(frozen=True, slots=True)
class MaskRecipe:
    """Makes the mask of one answer. Another process can make it too, of grammar and closes, with grammars and
    decode of its own."""

    grammar: Grammar
    closes: tuple[str, ...]
    grammars: Grammars
    decode: Callable[[Sequence[int]], str]

    def __call__(self) -> Mask:
        """A new one."""
        return self.grammars.mask(self.grammar, self.closes, self.decode)


def _library(param: str) -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise refused(f"'{param}' needs the package llguidance on the server.", param) from error
    return llguidance


def _compiled(library: Any, grammar: Grammar) -> str:
    if grammar.kind == "lark":
        return str(library.LLMatcher.grammar_from_lark(grammar.text))
    if grammar.kind == "gbnf":
        return str(library.LLMatcher.grammar_from_lark(_converted(library, grammar)))
    try:
        return str(library.LLMatcher.grammar_from_json_schema(grammar.text, defaults=_BOUNDED))
    except (ValueError, RecursionError) as error:
        raise refused(f"'{grammar.param}' cannot be followed: {error}", grammar.param) from error


def _converted(library: Any, grammar: Grammar) -> str:
    try:
        return str(library.gbnf_to_lark.gbnf_to_lark(grammar.text))
    except Exception as error:
        raise refused(f"'{grammar.param}' cannot be followed: {str(error)[:300]}", grammar.param) from error


def read_response_format(fields: Fields, name: str = "response_format") -> Grammar | None:
    """OpenAI's ``response_format`` (of responses: ``text.format``), and llama.cpp's ``json_schema`` and
    ``grammar``."""
    if fields.has("grammar"):
        text = fields.text("grammar") or ""
        if not 0 < len(text) <= MAX_GBNF_CHARACTERS:
            raise refused(f"'grammar' must have 1 to {MAX_GBNF_CHARACTERS} characters.", "grammar")
        return Grammar("gbnf", text, "grammar")
    if fields.has("json_schema"):
        return _schema(fields.any("json_schema"), "json_schema")
    form = fields.object(name)
    if form is None:
        return None
    kind = form.text("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return _schema(form.any("schema") or {"type": "object"}, name)
    if kind == "json_schema":
        inner = form.mapping("json_schema") or {"schema": form.any("schema")}
        return _schema(inner.get("schema"), name)
    raise refused(f"'{name}.type' must be text, json_object or json_schema (got {shown(kind)}).", name)


def _schema(schema: object, param: str) -> Grammar:
    if not isinstance(schema, Mapping):
        raise refused(f"'{param}' must have a JSON schema, which is an object.", param)
    text = json.dumps(schema, ensure_ascii=False)
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise refused(
            f"The JSON schema in '{param}' is longer than {MAX_GRAMMAR_CHARACTERS} characters.", param
        )
    return Grammar("json_schema", text, param)
