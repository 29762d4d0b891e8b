"""Anthropic's messages and tools in OpenAI's form, which templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from krasis.formats.names import shown
from krasis.runtime.server.errors import ApiError, refused
from krasis.runtime.server.fields import Fields
from krasis.runtime.server.images import NOTE

Row = dict[str, Any]

# Claude Code's first system block: its text differs from session to session, and with it every prefix.
BILLING = "x-anthropic-billing-header"


def read_conversation(fields: Fields) -> list[Row]:
    """The messages, the system's first. Raises ApiError."""
    rows: list[Row] = []
    system = _system(fields.any("system"))
    if system:
        rows.append({"role": "system", "content": system})
    messages = fields.items("messages")
    if not messages:
        raise refused("messages: at least one message is required.", "messages")
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise refused(f"{where}: must be an object with role and content.", where)
        rows += _rows(message, where)
    return rows


def read_tools(fields: Fields) -> list[Row]:
    """The tools that the client runs itself; the provider's own are left out."""
    tools = []
    for number, tool in enumerate(fields.items("tools") or ()):
        if not isinstance(tool, Mapping):
            raise refused(f"tools.{number}: must be an object.", "tools")
        if not isinstance(tool.get("input_schema"), Mapping):
            if tool.get("type") in (None, "custom"):
                raise refused(f"tools.{number}.input_schema: must be an object.", "tools")
            continue
        if not isinstance(tool.get("name"), str) or not tool["name"]:
            raise refused(f"tools.{number}.name: must be a string.", "tools")
        function = {"name": tool["name"], "parameters": tool["input_schema"]}
        if isinstance(tool.get("description"), str):
            function = {
                "name": tool["name"],
                "description": tool["description"],
                "parameters": tool["input_schema"],
            }
        tools.append({"type": "function", "function": function})
    return tools


def read_choice(fields: Fields) -> tuple[str, str]:
    """(none, auto or required; the one tool that must be called, or nothing)."""
    choice = fields.mapping("tool_choice")
    if choice is None:
        return "auto", ""
    kind = choice.get("type")
    if kind == "tool" and isinstance(choice.get("name"), str):
        return "required", str(choice["name"])
    words = {"auto": "auto", "any": "required", "none": "none"}
    if not isinstance(kind, str) or kind not in words:
        raise refused(
            f"tool_choice.type: must be auto, any, tool or none (got {shown(kind)}).", "tool_choice"
        )
    return words[kind], ""


def read_think(fields: Fields) -> bool | None:
    """Whether to think; None: as the model does."""
    thinking = fields.object("thinking")
    if thinking is None:
        return None
    kind = thinking.text("type")
    return {"enabled": True, "adaptive": True, "disabled": False}.get(kind or "")


def _system(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise refused("system: must be a string or a list of text blocks.", "system")
    texts = [_text(block, "system") for block in value]
    return "\n\n".join(one for one in texts if one and not one.lstrip().startswith(BILLING))


def _rows(message: Mapping[str, Any], where: str) -> list[Row]:
    """One message's rows: results of tools are messages of their own."""
    role, content = message["role"], message.get("content")
    if role not in ("user", "assistant", "system"):
        raise refused(f"{where}.role: must be user, assistant or system (got {shown(role)}).", where)
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if content is None:
        return [{"role": role, "content": ""}]
    if not isinstance(content, list):
        raise refused(f"{where}.content: must be a string or a list of blocks.", where)
    return _assistant(content, where) if role == "assistant" else _others(role, content, where)


def _assistant(blocks: Sequence[Any], where: str) -> list[Row]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Row] = []
    for block in blocks:
        kind = _kind(block, where)
        if kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        elif kind == "tool_use":
            calls.append(_call(block, where))
        elif kind == "text":
            texts.append(_text(block, where))
    row: Row = {"role": "assistant", "content": "".join(texts)}
    if any(thoughts):
        row["reasoning_content"] = "\n".join(one for one in thoughts if one)
    if calls:
        row["tool_calls"] = calls
    return [row]


def _call(block: Mapping[str, Any], where: str) -> Row:
    name, given = block.get("name"), block.get("input", {})
    if not isinstance(name, str) or not name:
        raise refused(f"{where}: a tool_use block must have a name.", where)
    arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return {
        "id": str(block.get("id", "")),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _others(role: str, blocks: Sequence[Any], where: str) -> list[Row]:
    rows: list[Row] = []
    texts: list[str] = []
    for block in blocks:
        kind = _kind(block, where)
        if kind == "tool_result":
            if texts:
                rows.append({"role": role, "content": "\n\n".join(texts)})
                texts = []
            content = _result(block.get("content"), where)
            rows.append(
                {"role": "tool", "tool_call_id": str(block.get("tool_use_id", "")), "content": content}
            )
        elif kind in ("text", "document"):
            texts.append(_document(block, where) if kind == "document" else _text(block, where))
        elif kind == "image":
            raise refused(f"{where}: this model reads text only (got an image).", where)
    if texts or not rows:
        rows.append({"role": role, "content": "\n\n".join(texts)})
    return rows


def _result(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return json.dumps(content, ensure_ascii=False)
    texts = []
    for block in content:
        kind = _kind(block, where)
        if kind == "text":
            texts.append(_text(block, where))
        elif kind == "image":
            texts.append(NOTE)
        else:
            texts.append(json.dumps(block, ensure_ascii=False))
    return "\n".join(texts)


def _document(block: Mapping[str, Any], where: str) -> str:
    source = block.get("source")
    if isinstance(source, Mapping) and source.get("type") == "text" and isinstance(source.get("data"), str):
        return str(source["data"])
    raise refused(f"{where}: this model reads text only (got a document that is no text).", where)


def _kind(block: Any, where: str) -> str:
    if not isinstance(block, Mapping):
        raise refused(f"{where}: a block of content must be an object.", where)
    return str(block.get("type", "text"))


def _text(block: Any, where: str) -> str:
    if isinstance(block, str):
        return block
    if not isinstance(block, Mapping) or not isinstance(block.get("text"), str):
        raise refused(f"{where}: a text block must have text.", where)
    return str(block["text"])


__all__ = ["ApiError", "read_choice", "read_conversation", "read_think", "read_tools"]
