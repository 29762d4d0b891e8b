"""Ids of calls as a model knows them, for templates that write them down: the client has the server's own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from krasis.runtime.server.tools.calls import Call, function_of

Row = dict[str, Any]

_NINE = re.compile(r"[0-9A-Za-z]{9}")
_SIGNS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def with_own_ids(rows: Sequence[Row], form: str, find: Callable[[str], Call | None]) -> list[Row]:
    """The same messages with the ids that the model gave, or would have given. form: see ``CallFormat.ids``.
    find: gives the call that was sent with an id."""
    own: dict[str, str] = {}
    count = 0
    changed: list[Row] = []
    for row in rows:
        calls = row.get("tool_calls")
        if calls:
            written = []
            for call in calls:
                number = str(call.get("id", ""))
                own[number] = _own_id(number, call, count, form, find(number))
                written.append({**call, "id": own[number]})
                count += 1
            row = {**row, "tool_calls": written}  # noqa: PLW2901
        answered = row.get("tool_call_id")
        if isinstance(answered, str):
            known = own.get(answered, _nine(answered) if form == "nine" else answered)
            row = {**row, "tool_call_id": known}  # noqa: PLW2901
        changed.append(row)
    return changed


def _own_id(number: str, call: Mapping[str, Any], count: int, form: str, sent: Call | None) -> str:
    given = sent.id if sent is not None else ""
    if form == "numbered":
        name = function_of(call).get("name", "")
        return given or (number if number.startswith("functions.") else f"functions.{name}:{count}")
    return given if _NINE.fullmatch(given) else _nine(number)


def _nine(number: str) -> str:
    """Nine letters and digits, always the same for one id."""
    if _NINE.fullmatch(number):
        return number
    value = int.from_bytes(hashlib.sha256(number.encode("utf-8", "replace")).digest(), "big")
    found = ""
    for _ in range(9):
        value, at = divmod(value, len(_SIGNS))
        found += _SIGNS[at]
    return found
