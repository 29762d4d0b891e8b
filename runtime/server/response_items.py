"""The input of responses in chat's form, which templates read."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

from krasis.formats.names import shown
from krasis.runtime.server.errors import refused
from krasis.runtime.server.fields import Fields
from krasis.runtime.server.images import with_notes

Row = dict[str, Any]

_OUTPUTS = ("function_call_output", "custom_tool_call_output", "local_shell_call_output", "mcp_call_output")


def read_input(fields: Fields) -> list[Row]:
    """The messages: instructions first. Raises ApiError."""
    rows: list[Row] = []
    instructions = fields.text("instructions")
    if instructions:
        rows.append({"role": "system", "content": instructions})
    given = fields.any("input")
    if isinstance(given, str):
        return [*rows, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise fields.wrong("input", "a string or a list of at least one item")
    for number, item in enumerate(given):
        _add(rows, item, f"input[{number}]")
    if not any(row["role"] != "system" for row in rows):
        return rows
    return rows


def _add(rows: list[Row], item: Any, where: str) -> None:
    if not isinstance(item, Mapping):
        raise refused(f"'{where}' must be an object.", where)
    kind = item.get("type", "message")
    if kind == "message":
        _add_message(rows, item, where)
    elif kind == "reasoning":
        _assistant(rows, fresh=True)["reasoning_content"] = _thoughts(item)
    elif kind in ("function_call", "custom_tool_call"):
        _assistant(rows).setdefault("tool_calls", []).append(_call(item, where))
    elif kind in _OUTPUTS:
        output = _words(with_notes(item.get("output", "")), where)
        rows.append({"role": "tool", "tool_call_id": str(item.get("call_id", "")), "content": output})
    elif kind == "item_reference":
        raise refused(f"'{where}' refers to an item: this server keeps none; replay the input.", where)
    # Other kinds are of tools that their provider runs: nothing a model here could read.


def _add_message(rows: list[Row], item: Mapping[str, Any], where: str) -> None:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer", "tool"):
        raise refused(
            f"'{where}.role' must be user, assistant, system or developer (got {shown(role)}).", where
        )
    words = _words(item.get("content", ""), where)
    if role == "assistant":
        row = _assistant(rows)
        if row["content"] or row.get("tool_calls"):
            rows.append({"role": "assistant", "content": words})
        else:
            row["content"] = words
    else:
        rows.append({"role": role, "content": words})


def _assistant(rows: list[Row], *, fresh: bool = False) -> Row:
    """The assistant's turn that is being put together. fresh: one that has said nothing yet."""
    last = rows[-1] if rows else None
    if last is None or last["role"] != "assistant" or (fresh and (last["content"] or last.get("tool_calls"))):
        rows.append({"role": "assistant", "content": ""})
    return rows[-1]


def _call(item: Mapping[str, Any], where: str) -> Row:
    name = item.get("name")
    if not isinstance(name, str) or not name:
        raise refused(f"'{where}.name' must be a string.", where)
    arguments = item.get("arguments", item.get("input", ""))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "id": str(item.get("call_id", item.get("id", ""))),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _thoughts(item: Mapping[str, Any]) -> str:
    """The reasoning's text: its content, or what this server has hidden for clients that keep only that."""
    for key in ("content", "summary"):
        parts = item.get(key)
        if isinstance(parts, list) and parts:
            return "".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))
    hidden = item.get("encrypted_content")
    if isinstance(hidden, str):
        try:
            return base64.b64decode(hidden, validate=True).decode("utf-8")
        except (binascii.Error, ValueError):
            return ""
    return ""


def hidden_thoughts(text: str) -> str:
    """Thoughts for ``encrypted_content``: nothing is secret, but clients send it back unchanged."""
    return base64.b64encode(text.encode("utf-8")).decode("ascii")


def _words(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return json.dumps(content, ensure_ascii=False)
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text"):
            raise refused(f"'{where}': this model reads text only (got a part of type {shown(kind)}).", where)
        texts.append(str(part.get("text", part.get("refusal", ""))))
    return "".join(texts)
