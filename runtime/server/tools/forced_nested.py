"""The grammars of calls whose values are written in a syntax of the format's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from krasis.runtime.server.tools.coerce import kinds_of
from krasis.runtime.server.tools.gemma import CLOSER as GEMMA_CLOSER
from krasis.runtime.server.tools.gemma import OPENER as GEMMA_OPENER
from krasis.runtime.server.tools.gemma import QUOTE
from krasis.runtime.server.tools.nested_tags import CLOSER as TAG_CLOSER
from krasis.runtime.server.tools.nested_tags import OPENER as TAG_OPENER
from krasis.runtime.server.tools.nested_tags import SIGN
from krasis.runtime.server.tools.spelling import Spelling, properties_of, separated, texts_of

MAX_DEPTH = 12
_TEXT = {"type": "string"}
_SCALARS = frozenset(("integer", "number", "boolean", "null"))


def pythonic_rule(spelling: Spelling, rule: str, name: str, schema: Mapping[str, Any]) -> str:
    """``[name(key="value", other=1)]``: values as JSON, which Python reads nearly all of, and we the rest."""
    known, must, shared = properties_of(schema)
    parts = []
    for number, (key, value) in enumerate(known.items()):
        if key.replace("-", "_").isidentifier():
            inner = value if isinstance(value, Mapping) else {}
            written = spelling.json(f"{rule}_p{number}", {**inner, **shared})
            parts.append((f"{spelling.literal(f'{key}=')} {written}", key in must))
    inside = separated(spelling, rule, parts, '", "')
    begin, end = spelling.literal(f"<|tool_call_start|>[{name}("), spelling.literal(")]<|tool_call_end|>")
    return f"{begin} {inside} {end}"


def gemma_rule(spelling: Spelling, rule: str, name: str, schema: Mapping[str, Any]) -> str:
    """``call:name{key:<|"|>text<|"|>}``."""
    inside = _gemma_pairs(spelling, f"{rule}_a", schema, 0)
    begin, end = spelling.literal(f"{GEMMA_OPENER}call:{name}{{"), spelling.literal(f"}}{GEMMA_CLOSER}")
    return f"{begin} {inside} {end}"


def _gemma_pairs(spelling: Spelling, rule: str, schema: Mapping[str, Any], depth: int) -> str:
    known, must, _ = properties_of(schema)
    parts = [
        (
            f"{spelling.literal(f'{key}:')} {_gemma_value(spelling, f'{rule}_{number}', value, depth + 1)}",
            key in must,
        )
        for number, (key, value) in enumerate(known.items())
    ]
    return separated(spelling, rule, parts, '","')


def _gemma_value(spelling: Spelling, rule: str, schema: object, depth: int) -> str:
    known = schema if isinstance(schema, Mapping) else {}
    kinds = kinds_of(known)
    quote = spelling.literal(QUOTE)
    if texts := texts_of(known):
        return f"{quote} {spelling.one_of(texts)} {quote}"
    if kinds == {"string"}:
        return f"{quote} {spelling.text(rule, QUOTE)}"
    if kinds and kinds <= _SCALARS:
        return spelling.json(rule, known)
    if kinds == {"array"} and depth < MAX_DEPTH:
        item = _gemma_value(spelling, f"{rule}_x", known.get("items"), depth + 1)
        item = spelling.add(f"{rule}_item", item)
        return f'"[" ({item} ("," {item})*)? "]"'
    if kinds == {"object"} and depth < MAX_DEPTH and isinstance(known.get("properties"), Mapping):
        inside = _gemma_pairs(spelling, f"{rule}_o", known, depth)
        return f'"{{" {inside} "}}"'
    return _gemma_anything(spelling)


def _gemma_anything(spelling: Spelling) -> str:
    """Any value; the rules are added once."""
    if not any(one.startswith("gemma_value:") for one in spelling.rules):
        quote = spelling.literal(QUOTE)
        spelling.add("gemma_text", f"{quote} {spelling.text('gemma_words', QUOTE)}")
        spelling.json("gemma_plain", {"type": ["number", "boolean", "null"]})
        spelling.add("gemma_list", '"[" (gemma_value ("," gemma_value)*)? "]"')
        spelling.add("gemma_pair", r'/[A-Za-z_][A-Za-z0-9_.\-]{0,63}/ ":" gemma_value')
        spelling.add("gemma_object", '"{" (gemma_pair ("," gemma_pair)*)? "}"')
        spelling.add("gemma_value", "gemma_text | gemma_plain | gemma_list | gemma_object")
    return "gemma_value"


def nested_tag_rule(spelling: Spelling, rule: str, name: str, schema: Mapping[str, Any]) -> str:
    """An element for each value."""
    inside = _elements(spelling, f"{rule}_a", schema, properties_of(schema)[2], 0)
    begin = spelling.literal(f'{SIGN}<tool_call>\n{TAG_OPENER}"{name}">')
    end = spelling.literal(f"{TAG_CLOSER}\n{SIGN}</tool_call>")
    return f"{begin} {inside} {end}"


def _elements(
    spelling: Spelling, rule: str, schema: Mapping[str, Any], shared: Mapping[str, Any], depth: int
) -> str:
    known, must, _ = properties_of(schema)
    parts: list[str] = []
    for number, (key, value) in enumerate(known.items()):
        name = f"{rule}_{number}"
        here = spelling.add(name, _element(spelling, f"{name}_v", key, value, shared, depth))
        parts.append(here if key in must else f"{here}?")
    return " ".join(parts)


def _element(
    spelling: Spelling, rule: str, key: str, schema: object, shared: Mapping[str, Any], depth: int
) -> str:
    known = schema if isinstance(schema, Mapping) else {}
    kinds = kinds_of(known)
    begin, end = spelling.literal(f"{SIGN}<{key}>"), f"{SIGN}</{key}>"
    if kinds == {"array"} and depth < MAX_DEPTH:
        item = _element(spelling, f"{rule}_x", "item", known.get("items"), shared, depth + 1)
        return f"{begin} {spelling.add(f'{rule}_item', item)}* {spelling.literal(end)}"
    if kinds == {"object"} and depth < MAX_DEPTH and isinstance(known.get("properties"), Mapping):
        inside = _elements(spelling, f"{rule}_o", known, shared, depth + 1)
        return f"{begin} {inside} {spelling.literal(end)}"
    return f"{begin} {spelling.value(rule, known or _TEXT, end, shared)}"
