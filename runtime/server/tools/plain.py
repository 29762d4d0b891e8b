"""Tools for a template that knows none: described in the system message, called and answered in plain
text."""

from __future__ import annotations

import json
from typing import Any

from krasis.runtime.server.tools.calls import (
    CallFormat,
    NotJsonError,
    Tools,
    Writer,
    function_of,
    strict_json,
)

Row = dict[str, Any]

_TOOLS = (
    "# Tools\n\nYou may call one or more functions. Their signatures are within <tools></tools>:\n<tools>\n{}"
    "\n</tools>\n\n"
)
_HOW = (
    "For each call write a JSON object with the function's name and arguments within "
    '<tool_call></tool_call>:\n<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>'
)
_SO = "Calls of functions look exactly so, with the arguments as JSON that fits the signature:\n{}"


def without_tools(rows: list[Row], tools: Tools) -> list[Row]:
    """The same conversation in messages of the system, the user and the assistant alone."""
    plain: list[Row] = []
    for row in rows:
        if row["role"] in ("tool", "function"):
            answer = f"<tool_response>\n{_words(row.get('content', ''))}\n</tool_response>"
            if plain and plain[-1].get("_answers"):
                plain[-1] = {**plain[-1], "content": f"{plain[-1]['content']}\n{answer}"}
            else:
                plain.append({"role": "user", "content": answer, "_answers": True})
        elif row.get("tool_calls"):
            said = [_words(row.get("content", "")), *(_written(call) for call in row["tool_calls"])]
            kept = {key: value for key, value in row.items() if key != "tool_calls"}
            plain.append({**kept, "content": "\n".join(one for one in said if one)})
        else:
            plain.append(row)
    plain = [{key: value for key, value in row.items() if key != "_answers"} for row in plain]
    return _described(plain, tools, _HOW)


def with_written_calls(rows: list[Row], write: Writer) -> list[Row]:
    """The same conversation for a template that describes tools but cannot write calls: they are words of
    the assistant, as the model would write them."""
    changed: list[Row] = []
    for row in rows:
        calls = row.get("tool_calls")
        if calls:
            functions = [function_of(call) for call in calls]
            said = write([(str(one["name"]), _object(one.get("arguments"))) for one in functions])
            kept = {key: value for key, value in row.items() if key != "tool_calls"}
            changed.append({**kept, "content": _words(row.get("content", "")) + said})
        else:
            changed.append(row)
    return changed


def _object(arguments: Any) -> Any:
    """Arguments as an object; those that are none stay readable, as text in one."""
    if isinstance(arguments, str):
        try:
            value = strict_json(arguments or "{}")
        except NotJsonError:
            value = None
        return value if isinstance(value, dict) else {"arguments": arguments}
    return arguments or {}


def with_description(rows: list[Row], tools: Tools, call_format: CallFormat) -> list[Row]:
    """The same conversation with the tools in the system message, for a template that writes calls but
    describes no tools."""
    write = call_format.write
    return _described(rows, tools, _HOW if write is None else _SO.format(write([("NAME", {"key": "value"})])))


def _described(rows: list[Row], tools: Tools, how: str) -> list[Row]:
    if not tools:
        return rows
    described = (
        _TOOLS.format("\n".join(json.dumps(function_of(tool), ensure_ascii=False) for tool in tools)) + how
    )
    if rows and rows[0]["role"] in ("system", "developer"):
        first = {**rows[0], "content": f"{_words(rows[0].get('content', ''))}\n\n{described}"}
        return [first, *rows[1:]]
    return [{"role": "system", "content": described}, *rows]


def _written(call: Row) -> str:
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {json.dumps(function["name"])}, "arguments": {text}}}\n</tool_call>'


def _words(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
