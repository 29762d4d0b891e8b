"""Pieces of a Lark grammar for llguidance, by one model's tokens and a tool's JSON schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from krasis.runtime.server.tools.coerce import kinds_of

_COMPACT = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
_ANYTHING, _NOTHING = "/(?s:.*)/", '""'


class Spelling:
    """Writes rules. special: text -> id of the tokens that no text is made of; a grammar names them by
    number."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = {text: number for text, number in special.items() if text}
        words = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, words))})") if words else None
        self.rules: list[str] = []

    def literal(self, text: str) -> str:
        """Exactly this text; empty for none."""
        pieces = [text] if self._pattern is None else self._pattern.split(text)
        return " ".join(self._piece(one) for one in pieces if one)

    def _piece(self, text: str) -> str:
        number = self._special.get(text)
        return json.dumps(text, ensure_ascii=False) if number is None else f"<[{number}]>"

    def one_of(self, texts: Sequence[str]) -> str:
        """Any of these texts."""
        return f"({' | '.join(self.literal(one) or _NOTHING for one in texts)})"

    def add(self, rule: str, body: str) -> str:
        """A new rule; gives its name."""
        self.rules.append(f"{rule}: {body}")
        return rule

    def json(self, rule: str, schema: Mapping[str, Any]) -> str:
        """What a JSON schema allows, without needless blanks; gives the rule's name."""
        guided = {**schema, "x-guidance": _COMPACT}
        return self.add(rule, f"%json {json.dumps(guided, ensure_ascii=False)}")

    def text(self, rule: str, end: str) -> str:
        """Any text up to end, and that; gives an expression."""
        if self._pattern is not None and self._pattern.match(end):
            return f"{self.add(rule, _ANYTHING)} {self.literal(end)}"
        suffix, rest = self._plain_part(end)
        self.rules.append(f"{rule}[suffix={json.dumps(suffix, ensure_ascii=False)}]: {_ANYTHING}")
        return f"{rule} {self.literal(rest)}"

    def _plain_part(self, text: str) -> tuple[str, str]:
        found = None if self._pattern is None else self._pattern.search(text)
        return (text, "") if found is None else (text[: found.start()], text[found.start() :])

    def value(self, rule: str, schema: object, end: str, shared: Mapping[str, Any]) -> str:
        """A value as text that is read by the schema, and end; gives an expression."""
        known = schema if isinstance(schema, Mapping) else {}
        texts = texts_of(known)
        if texts:
            return f"{self.one_of(texts)} {self.literal(end)}"
        if "string" in kinds_of(known):
            return self.text(rule, end)
        return f"{self.json(rule, {**known, **shared})} {self.literal(end)}"


def texts_of(schema: Mapping[str, Any]) -> list[str]:
    """The texts that are all a value may be; none if there are others."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if not isinstance(values, Sequence) or isinstance(values, str):
        return []
    texts = [one for one in values if isinstance(one, str)]
    return texts if len(texts) == len(values) else []


def properties_of(schema: Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str], dict[str, Any]]:
    """(the schemas of an object's values, the names of those that must be there, what all may refer to)."""
    known, required = schema.get("properties"), schema.get("required")
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    must = (
        frozenset(one for one in required if isinstance(one, str))
        if isinstance(required, list)
        else frozenset()
    )
    return dict(known) if isinstance(known, Mapping) else {}, must, shared


def separated(spelling: Spelling, rule: str, parts: Sequence[tuple[str, bool]], comma: str) -> str:
    """The parts (expression, whether it must be there) in their order, with commas between; gives the name of
    a rule, which may be empty text."""
    first = later = _NOTHING
    for number, (part, must) in reversed(list(enumerate(parts))):
        here = spelling.add(f"{rule}_i{number}", part)
        rest = later
        if must:
            first, later = f"{here} {rest}", f"{comma} {here} {rest}"
        else:
            first, later = f"({here} {rest} | {first})", f"({comma} {here} {rest} | {rest})"
        later = spelling.add(f"{rule}_l{number}", later)
        first = spelling.add(f"{rule}_f{number}", first)
    return first
