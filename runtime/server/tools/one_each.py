"""Several calls in one message, for templates that know one call a message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from krasis.formats.errors import FormatError, UsageError
from krasis.runtime.text.chat import ChatTemplate
from krasis.runtime.text.messages import read_messages, render_chat

Row = dict[str, Any]

_NAMES = ("krasis_first", "krasis_second")


def writes_several(template: ChatTemplate) -> bool:
    """Whether the template writes both calls of a message. True if it writes not even one."""
    both, one = (_rendered(template, count) for count in (2, 1))
    if one is None or _NAMES[0] not in one:
        return True
    return both is not None and all(name in both for name in _NAMES)


def one_call_each(rows: Sequence[Row]) -> list[Row]:
    """The same conversation with a message for each call, followed by its result."""
    changed: list[Row] = []
    results: list[Row] = []  # of the calls before, which belong behind them
    pending: list[Row] = []
    end: Row = {"role": ""}
    for row in [*rows, end]:
        if row["role"] == "tool" and pending:
            results.append(row)
            continue
        changed += _paired(pending, results)
        pending, results = [], []
        calls: list[Row] = row.get("tool_calls") or []
        if len(calls) > 1:
            first = {**row, "tool_calls": [calls[0]]}
            others = [{"role": row["role"], "content": "", "tool_calls": [call]} for call in calls[1:]]
            pending = [first, *others]
        elif row["role"]:
            changed.append(row)
    return changed


def _paired(calls: Sequence[Row], results: Sequence[Row]) -> Iterator[Row]:
    """Each call and its results: by their ids, or in their order if none has one of these ids."""
    mine: dict[object, list[Row]] = {}
    for row in results:
        mine.setdefault(row.get("tool_call_id"), []).append(row)
    known = [mine.pop(row["tool_calls"][0].get("id", ""), []) for row in calls]
    left = [row for rows in mine.values() for row in rows]
    if not any(known):
        known, left = [[row] for row in left[: len(calls)]], left[len(calls) :]
    for place, row in enumerate(calls):
        yield row
        yield from known[place] if place < len(known) else ()
    yield from left


def _rendered(template: ChatTemplate, count: int) -> str | None:
    key = f"calls {count}"
    if key not in template.probes:
        calls = [
            {"id": f"call0000{at}", "type": "function", "function": {"name": name, "arguments": {"a": 1}}}
            for at, name in enumerate(_NAMES[:count])
        ]
        results = [{"role": "tool", "tool_call_id": one["id"], "content": "done"} for one in calls]
        asked = {"role": "user", "content": "?"}
        try:
            made = [asked, {"role": "assistant", "content": "", "tool_calls": calls}, *results]
            template.probes[key] = render_chat(template, read_messages(made))
        except (FormatError, UsageError):
            template.probes[key] = None
    return template.probes[key]
