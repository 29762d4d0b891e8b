"""Grammars of clients who mean no good: none holds the engine up, none is quietly given up."""

from __future__ import annotations

from pathlib import Path

import pytest

from krasis.formats.errors import UsageError
from krasis.runtime.server.grammar import MAX_GBNF_CHARACTERS, Grammar, Grammars, Mask

from .conftest import Serve

TINY = Path(__file__).parents[2] / "assets" / "tiny-qwen3-moe" / "tokenizer.json"


class Matcher:
    """llguidance's, when it has stopped."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def is_error(self) -> bool:
        return True

    def stop_reason(self) -> str:
        return self._reason


def test_a_grammar_that_is_too_complex_ends_its_answer_with_an_error() -> None:
    with pytest.raises(UsageError, match="too complex"):
        Mask(Matcher("ParserTooComplex"), 8, (), lambda _: "").allowed()
    assert Mask(Matcher("NoExtensionBias"), 8, (), lambda _: "").allowed() is None  # complete


def test_what_takes_long_to_read_is_read_once_and_not_by_the_engine() -> None:
    grammars = Grammars(TINY.read_bytes, 4096, lambda: [0])
    found = grammars.check(Grammar("gbnf", 'root ::= "a" [b-d]+', "grammar"))
    assert found is not None
    assert (found.kind, found.param) == ("lark", "grammar")
    assert grammars.check(found) == found
    assert grammars.check(None) is None
    mask = grammars.mask(found, (), lambda _: "").allowed()
    assert mask is not None
    assert 0 < mask.sum() < 100


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/completion"])
def test_a_long_grammar_is_refused(serve: Serve, path: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "max_tokens": 2}
    reply = serve().post(path, {**body, "grammar": 'root ::= "' + MAX_GBNF_CHARACTERS * "a" + '"'})
    assert (reply.status, reply.json["error"]["param"]) == (400, "grammar")
