"""Messages as programs send them (OpenAI's form, dataclasses, plain dicts), read strictly, and their prompt.

What a template sees is what transformers gives it: keys whose value is None are not there, unknown keys pass
through, reasoning is found under all its names. Beyond that, text parts are joined for templates that cannot
read them, the arguments of tool calls become objects, or text, for templates that need that, and a message
that the template leaves out is an error instead of a silent loss.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from krasis.formats.errors import FormatError, UsageError
from krasis.formats.names import shown
from krasis.formats.plain_text import plain_text
from krasis.runtime.text.chat import ROLES, ChatTemplate

Row = dict[str, Any]

TEXT_PARTS = ("text", "input_text", "output_text")
REASONING = ("reasoning_content", "thinking", "reasoning")
MAX_DEPTH = 64
_WORD = re.compile(r"\w+")


def token_ids(prompt: object) -> list[int] | None:
    """The ids, if the prompt is a list (or an array) of them; None if it is not. An empty list is one."""
    if hasattr(prompt, "tolist") and not isinstance(prompt, (str, memoryview)):
        prompt = prompt.tolist()
    if isinstance(prompt, (str, bytes, bytearray, memoryview, Mapping)) or not isinstance(prompt, Sequence):
        return None
    ids: list[int] = []
    for one in prompt:
        if isinstance(one, bool) or not hasattr(one, "__index__"):
            return None
        ids.append(one.__index__())
    return ids


def read_messages(prompt: object) -> list[Row]:
    """Messages as plain JSON objects. Raises UsageError that names the message and what is wrong with it."""
    kinds = "a prompt must be text, a list of token ids or a list of messages"
    if isinstance(prompt, Mapping) or (hasattr(prompt, "role") and hasattr(prompt, "content")):
        raise UsageError(kinds, got="one message", hint="put it into a list")
    if isinstance(prompt, (str, bytes, bytearray, memoryview)) or not isinstance(prompt, Iterable):
        raise UsageError(kinds, got=type(prompt).__name__)
    rows = [_message(item, f"message {number}") for number, item in enumerate(prompt, start=1)]
    if not rows:
        raise UsageError("there are no messages")
    return rows


def render_chat(template: ChatTemplate, messages: Sequence[Row], **options: Any) -> str:
    """The prompt's text of messages from ``read_messages``. options: of ``ChatTemplate.render``.

    Raises UsageError for messages that the template has no place for, FormatError as ``render``.
    """
    rows = [_fitted(template, row, f"message {number}") for number, row in enumerate(messages, start=1)]
    failure: FormatError | None = None
    lost: int | None = None
    for attempt in _attempts(template, rows):
        try:
            text = template.render(attempt, **options)
        except FormatError as error:
            failure = failure or error
            continue
        missing = _first_lost(attempt, text)
        if missing is None:
            return text
        lost = missing if lost is None else lost
    if failure is not None and lost is None:
        raise failure
    raise UsageError(
        "the chat template leaves this message out",
        where=f"message {(lost or 0) + 1}",
        got=f"role {messages[lost or 0]['role']}",
        hint="this model's template has no place for it; put its text into a message of the user",
    )


def _attempts(template: ChatTemplate, rows: list[Row]) -> Iterator[list[Row]]:
    """The messages as they are, and then, for a template that fails on them or loses one, with the same
    meaning in other forms."""
    yield rows
    filled = [row if "content" in row else {**row, "content": ""} for row in rows]
    if filled != rows:
        yield filled
    if any(row["role"] == "developer" for row in filled):
        # The newer name of the system role.
        filled = [{**row, "role": "system"} if row["role"] == "developer" else row for row in filled]
        yield filled
    if any(isinstance(row["content"], str) for row in filled) and _reads_parts(template):
        yield [
            {**row, "content": [{"type": "text", "text": row["content"]}]}
            if isinstance(row["content"], str)
            else row
            for row in filled
        ]


# ---- reading -----------------------------------------------------------------------------------------------


def _message(item: object, where: str) -> Row:
    raw = _as_mapping(item)
    if raw is None:
        raise UsageError(
            "a message must be an object with role and content", where=where, got=type(item).__name__
        )
    row: Row = {}
    for key, value in raw.items():
        if value is not None:
            row[plain_text(key, "a key", where)] = _plain(value, f"{where}: {key}", 0)
    role = row.get("role")
    if not isinstance(role, str) or not role:
        raise UsageError("a message must have a role", where=where, limit=", ".join(ROLES), got=_kind(role))
    _check_calls(row, where)
    row = _with_reasoning(row)
    if "content" not in row:
        if role != "assistant" or not (row.get("tool_calls") or "reasoning_content" in row):
            raise UsageError("a message must have content", where=where, got=f"role {shown(role)} alone")
        return row
    row["content"] = _content(row["content"], role, where)
    return row


def _as_mapping(item: object) -> Mapping[Any, Any] | None:
    if isinstance(item, Mapping):
        return item
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
    dump = getattr(item, "model_dump", None)  # what pydantic's models have
    dumped = dump() if callable(dump) and not isinstance(item, type) else None
    return dumped if isinstance(dumped, Mapping) else None


def _plain(value: object, where: str, depth: int) -> Any:
    """Nothing but JSON's types, so that a template cannot reach into objects of the caller."""
    if depth > MAX_DEPTH:
        raise UsageError("a message is nested too deeply", where=where, limit=MAX_DEPTH)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return plain_text(value, "the text", where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UsageError("a number must be finite", where=where, got=value)
        return float(value)
    mapping = _as_mapping(value)
    if mapping is not None:
        return {
            plain_text(key, "a key", where): _plain(one, where, depth + 1) for key, one in mapping.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(one, where, depth + 1) for one in value]
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # NumPy's numbers and arrays
        return _plain(value.tolist(), where, depth + 1)
    raise UsageError("a message must hold text, numbers, lists and objects", where=where, got=_kind(value))


def _content(content: Any, role: str, where: str) -> Any:
    if isinstance(content, str) or (role == "tool" and isinstance(content, dict)):
        return content
    if not isinstance(content, list):
        raise UsageError("content must be text or a list of text parts", where=where, got=_kind(content))
    parts = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}  # noqa: PLW2901  the short form of a part
        if not isinstance(part, dict):
            raise UsageError("a part of content must be an object", where=where, got=_kind(part))
        kind = part.get("type", "text" if "text" in part else None)
        if kind not in TEXT_PARTS:
            raise UsageError(
                "this model reads text only", where=where, got=f"a part of type {shown(kind)}", limit="text"
            )
        if not isinstance(part.get("text"), str):
            raise UsageError("a part of type text must have text", where=where, got=_kind(part.get("text")))
        parts.append({**part, "type": "text"})
    return parts


def _check_calls(row: Row, where: str) -> None:
    calls = row.get("tool_calls", [])
    if not isinstance(calls, list):
        raise UsageError("tool_calls must be a list", where=where, got=_kind(calls))
    for call in calls:
        function = _function(call)
        if function is None or not isinstance(function.get("name"), str):
            raise UsageError("a tool call must have a function with a name", where=where, got=_kind(call))
        arguments = function.get("arguments")
        if arguments is not None and not isinstance(arguments, (str, dict)):
            raise UsageError(
                "arguments of a tool call must be JSON text or an object", where=where, got=_kind(arguments)
            )


def _function(call: object) -> Row | None:
    """The part of a call that has name and arguments: OpenAI's ``function``, or the call itself."""
    function = call.get("function", call) if isinstance(call, dict) else None
    return function if isinstance(function, dict) else None


def _with_reasoning(row: Row) -> Row:
    reasoning = next((row[key] for key in REASONING if key in row), None)
    return row if reasoning is None else {"thinking": reasoning, **row, "reasoning_content": reasoning}


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


# ---- what a template can read ------------------------------------------------------------------------------


def _fitted(template: ChatTemplate, row: Row, where: str) -> Row:
    role, content, calls = row["role"], row.get("content"), row.get("tool_calls")
    if role not in ROLES and role not in template.source:
        raise UsageError("unknown role of a message", where=where, got=shown(role), limit=", ".join(ROLES))
    if isinstance(content, list) and not _reads_parts(template):
        row = {**row, "content": "".join(part["text"] for part in content)}
    if calls:
        if "tool_calls" not in template.source:
            raise UsageError(
                "the chat template does not use tool_calls",
                where=where,
                hint="this model's template has no form for calls of tools",
            )
        if not content:
            row = {**row, "content": _content_beside_calls(template)}
        row = {**row, "tool_calls": [_fitted_call(template, call, where) for call in calls]}
    return row


def _fitted_call(template: ChatTemplate, call: Row, where: str) -> Row:
    function = _function(call)
    arguments = function.get("arguments") if function is not None else None
    if function is None or arguments is None:
        return call
    if isinstance(arguments, dict):
        if _reads_arguments(template, as_text=False) or not _reads_arguments(template, as_text=True):
            return call
        changed = {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return {**call, "function": changed} if "function" in call else changed
    if arguments.strip() and _reads_arguments(template, as_text=True):
        return call
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise UsageError(
            "arguments of a tool call are not JSON", where=where, got=shown(arguments)
        ) from error
    if not isinstance(value, dict):
        raise UsageError(
            "arguments of a tool call must be a JSON object", where=where, got=type(value).__name__
        )
    changed = {**function, "arguments": _plain(value, where, 0)}
    return {**call, "function": changed} if "function" in call else changed


def _reads_parts(template: ChatTemplate) -> bool:
    """Whether the template writes the texts of a list of parts, and not the list."""
    parts = [{"type": "text", "text": text} for text in ("krasis-one", "krasis-two")]
    text = _probe(template, "parts", [{"role": "user", "content": parts}])
    if text is None:
        return False
    begin, end = text.find("krasis-one"), text.find("krasis-two")
    return 0 <= begin < end and "text" not in text[begin:end]


def _reads_arguments(template: ChatTemplate, *, as_text: bool) -> bool:
    """Whether the template writes arguments that are JSON text as they are (and not quoted once more), or
    such as are an object."""
    written = '{"krasis":1}'
    function = {"name": "probe", "arguments": written if as_text else {"krasis": 1}}
    call = {"type": "function", "id": "call00001", "function": function}
    asked: Row = {"role": "user", "content": "?"}
    calls: Row = {"role": "assistant", "content": _content_beside_calls(template), "tool_calls": [call]}
    text = _probe(template, "text" if as_text else "object", [asked, calls, asked])
    if text is None or (written if as_text else "krasis") not in text:
        return False
    return not as_text or f"{{{written}}}" not in text  # or it puts what it takes for the inside into braces


def _content_beside_calls(template: ChatTemplate) -> str | None:
    """What a message that has nothing but calls must have for content: some templates write calls only where
    it is none."""
    for arguments in ({"krasis": 1}, '{"krasis":1}'):
        call = {"type": "function", "id": "call00001", "function": {"name": "probe", "arguments": arguments}}
        for content in ("", None):
            asked: Row = {"role": "user", "content": "?"}
            calls: Row = {"role": "assistant", "content": content, "tool_calls": [call]}
            name = f"content {content} {type(arguments).__name__}"
            if "krasis" in (_probe(template, name, [asked, calls, asked]) or ""):
                return content
    return ""


def _probe(template: ChatTemplate, name: str, rows: list[Row]) -> str | None:
    """What the template makes of a made-up conversation, tried once; None if it refuses."""
    if name not in template.probes:
        try:
            template.probes[name] = template.render(rows)
        except FormatError:
            template.probes[name] = None
    return template.probes[name]


def _first_lost(rows: Sequence[Row], rendered: str) -> int | None:
    """The index of the first message of which no word is in the prompt. Of an assistant's words, templates
    drop what they like (thoughts of earlier turns)."""
    cursor = 0
    for index, row in enumerate(rows):
        content = row.get("content")
        if row["role"] == "assistant" or not isinstance(content, (str, list)):
            continue
        texts = [content] if isinstance(content, str) else [part["text"] for part in content]
        for text in texts:
            wanted = text.strip()
            found = rendered.find(wanted, cursor)
            if found >= 0:
                cursor = found + len(wanted)
            elif wanted not in rendered and not _shares_a_word(wanted, rendered):
                return index
    return None


def _shares_a_word(text: str, rendered: str) -> bool:
    """Whether one of the longest words of a text is in the prompt; a text without words counts as there."""
    words = sorted(set(_WORD.findall(text[:20_000])), key=len, reverse=True)[:8]
    return not words or any(word in rendered for word in words)
