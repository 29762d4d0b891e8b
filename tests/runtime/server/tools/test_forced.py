"""Calls that have to be: the grammar of each format lets its own calls through, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from krasis.runtime.server.grammar import Grammars
from krasis.runtime.server.tools.forced import call_grammar
from krasis.runtime.server.tools.known import FORMATS
from krasis.runtime.text.call_markers import CALL_MARKERS
from tests.runtime.server.conftest import TINY
from tests.support.call_templates import written

from .test_formats import parse

llguidance = pytest.importorskip("llguidance")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "count": {"type": "integer"},
        "maybe": {"type": ["string", "null"]},
        "items": {"type": "array", "items": {"type": "string"}},
        "inner": {
            "type": "object",
            "properties": {"a": {"type": "string"}, "b": {"$ref": "#/$defs/n"}},
            "required": ["b"],
        },
        "any": {},
    },
    "required": ["text", "count"],
    "$defs": {"n": {"type": "integer"}},
}
TOOLS = [{"function": {"name": name, "parameters": SCHEMA}} for name in ("write", "read")]
BY_NAME = {one.name: one for one in FORMATS}
HARMONY = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>")
EVERYTHING = {
    "text": "a \"b\"\n<c> }", "unit": "F", "count": -7, "maybe": "x",
    "items": ["x", "y z"], "inner": {"a": "q", "b": 2}, "any": True,
}  # fmt: skip


# Each format with the marks of all formats as special tokens; of each kind one where they are text.
CASES = [(True, one) for one in sorted(BY_NAME)]
CASES += [(False, one) for one in ("dsml", "gemma", "kimi", "lfm2", "minimax_m3", "xml")]
each = pytest.mark.parametrize(("library", "name"), CASES, indirect=["library"])


@pytest.fixture(scope="module")
def libraries() -> dict[bool, Tokenizer]:
    """The tiny tokenizer, with the marks as special tokens, or without."""
    found = {one: Tokenizer.from_file(str(TINY / "tokenizer.json")) for one in (True, False)}
    marks = sorted({*CALL_MARKERS, *HARMONY})
    found[True].add_special_tokens([AddedToken(one, special=True) for one in marks])
    return found


@pytest.fixture(scope="module")
def all_grammars(libraries: dict[bool, Tokenizer]) -> dict[int, Grammars]:
    return {id(one): _grammars(one) for one in libraries.values()}


def _grammars(library: Tokenizer) -> Grammars:
    end = library.token_to_id("<|im_end|>")
    return Grammars(lambda: library.to_str().encode(), library.get_vocab_size(), lambda: [end])


@pytest.fixture
def library(request: pytest.FixtureRequest, libraries: dict[bool, Tokenizer]) -> Tokenizer:
    return libraries[getattr(request, "param", True)]


@pytest.fixture
def grammars(library: Tokenizer, all_grammars: dict[int, Grammars]) -> Grammars:
    return all_grammars[id(library)]


def special(library: Tokenizer) -> dict[str, int]:
    return {one.content: number for number, one in library.get_added_tokens_decoder().items() if one.special}


def goes(library: Tokenizer, grammars: Grammars, name: str, text: str) -> bool:
    """Whether the grammar lets a text through, and its end."""
    mask = grammars.mask(call_grammar(BY_NAME[name], TOOLS, special(library)), (), lambda _: "")
    for token in [*library.encode(text, add_special_tokens=False).ids, library.token_to_id("<|im_end|>")]:
        allowed = mask.allowed()
        if allowed is None or not allowed[token]:
            return False
        mask.accept(token)
    return True


def call(name: str, tool: str, values: dict[str, Any]) -> str:
    return written(name, (tool, values)).rstrip("\n").removesuffix("<|message_sep|>")


@each
def test_its_own_calls_go_through(library: Tokenizer, grammars: Grammars, name: str) -> None:
    for values in ({"text": "", "count": 0}, EVERYTHING):
        text = call(name, "read", values)
        assert goes(library, grammars, name, text), text
        assert parse(BY_NAME[name], [text], tools=TOOLS) == ("", [("read", values)])


@each
def test_nothing_else_does(library: Tokenizer, grammars: Grammars, name: str) -> None:
    good = {"text": "a", "count": 1}
    assert goes(library, grammars, name, call(name, "write", good))
    for text in (
        call(name, "other", good),
        call(name, "write", {"text": "a"}),
        call(name, "write", {"text": "a", "count": "many"}),
        call(name, "write", {"text": "a", "unit": "K", "count": 1}),
        "Certainly!" + call(name, "write", good),
        call(name, "write", good)[:-1],
    ):
        assert not goes(library, grammars, name, text), text


def test_thinking_may_come_first_in_harmony(library: Tokenizer, grammars: Grammars) -> None:
    thought = "<|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant"
    assert goes(library, grammars, "harmony", thought + call("harmony", "write", {"text": "a", "count": 1}))


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_any_schema_makes_a_grammar(grammars: Grammars, library: Tokenizer, name: str) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(40):
        deep = {"type": "object", "properties": {"x": deep}, "required": ["x"]}
    schemas: list[Any] = [
        {}, {"type": "object"}, {"properties": {}}, deep,
        {"properties": {"class": {"type": "string"}, "a-b": {"enum": ["", "x"]}, "c d": {"const": "y"}}},
        {"properties": {"l": {"type": "array"}, "o": {"type": "object"}, "e": True,
         "u": {"anyOf": [{"type": "null"}, deep]}}},
    ]  # fmt: skip
    for schema in schemas:
        grammars.check(
            call_grammar(BY_NAME[name], [{"function": {"name": "f", "parameters": schema}}], special(library))
        )
    quoted = [{"function": {"name": 'a"b\\', "parameters": {}}}]
    grammars.check(call_grammar(BY_NAME[name], quoted, special(library)))
