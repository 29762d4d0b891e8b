"""JSON from files that nobody vouches for: bounded before it is parsed, and without JSON's ambiguities.

Refused: more bytes, more nesting or denser structure than asked for (before the parser allocates anything),
duplicate keys, NaN and Infinity, integers beyond 64 bits, floats that overflow, lone surrogates, bytes that
are not UTF-8.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from krasis.formats.errors import FormatError
from krasis.formats.limits import MAX_JSON_DEPTH
from krasis.formats.names import shown

# Steps from bracket to bracket (or to the end) over strings and all else. Possessive, never failing, and an
# unterminated string reaches to the end: linear in the input whatever it is.
_TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.?)*+(?:"|(?P<open>)))*+([\[\]{}]|\Z)', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_WHITE_SPACE = b" \t\n\r"
_SPACES = b" " * (1 << 16)  # compared at once
_INT64_DIGITS = 20  # with a sign
# An object or array costs the parser about 70 bytes however few it has in the file. Real headers have 15 or
# more bytes a bracket pair; a file of nothing but brackets is an attack on memory.
_MIN_BYTES_PER_CONTAINER = 8
_FREE_CONTAINERS = 4096
_FREE_BYTES = 1 << 20
_FOUR_BYTE_CHARACTER = re.compile(rb"[\xf0-\xff]")


class _RefusedError(ValueError):
    """A hook's complaint on its way through the parser."""


def parse_json(
    data: bytes | memoryview,
    where: str,
    *,
    max_bytes: int,
    max_depth: int = MAX_JSON_DEPTH,
    wide_text: bool = False,
) -> Any:
    """The value in ``data`` (UTF-8). FormatError for anything on the module's list.

    wide_text: a long text may have characters beyond U+FFFF, which make it take four bytes for each of its
    characters in memory: for what people wrote, under a bound that allows for it.
    """
    if len(data) > max_bytes:
        raise FormatError("JSON text is too long", where=where, got=f"{len(data)} bytes", limit=max_bytes)
    # A shard's header is filled up with megabytes of white space: nothing below needs to look through them.
    data = memoryview(data)[: _length_without_end(data)]
    _check_structure(data, where, max_depth)
    text = _decoded(data, where, wide_text=wide_text)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
        )
    except json.JSONDecodeError as error:
        raise FormatError(
            f"not valid JSON: {error.msg}",
            where=where,
            got=f"at byte {error.pos}, line {error.lineno}",
            hint="the file may be damaged or incomplete",
        ) from error
    except _RefusedError as error:
        raise FormatError(f"JSON is refused: {error}", where=where) from error
    if _SURROGATE_ESCAPE.search(data):
        _check_encodable(value, where)
    return value


def parse_json_object(
    data: bytes | memoryview,
    where: str,
    *,
    max_bytes: int,
    max_depth: int = MAX_JSON_DEPTH,
    wide_text: bool = False,
) -> dict[str, Any]:
    """As ``parse_json``; the value must be an object."""
    value = parse_json(data, where, max_bytes=max_bytes, max_depth=max_depth, wide_text=wide_text)
    if not isinstance(value, dict):
        raise FormatError("JSON must be an object", where=where, got=type(value).__name__)
    return value


def _check_structure(data: memoryview, where: str, max_depth: int) -> None:
    """Bounds depth and number of containers without parsing. Linear time, no memory."""
    depth = containers = 0
    limit = _FREE_CONTAINERS + len(data) // _MIN_BYTES_PER_CONTAINER
    for match in _TO_BRACKET.finditer(data):
        if match["open"] is not None:
            raise FormatError(
                "not valid JSON: a string has no end", where=where, hint="the file may be incomplete"
            )
        bracket = bytes(data[match.start(2) : match.end(2)])
        if not bracket:
            break
        if bracket in (b"[", b"{"):
            depth += 1
            containers += 1
            if depth > max_depth:
                raise FormatError(
                    "JSON is nested too deeply", where=where, got=f"byte {match.end()}", limit=max_depth
                )
            if containers > limit:
                raise FormatError("JSON has too many objects and arrays", where=where, limit=limit)
        else:
            depth -= 1


def _length_without_end(data: bytes | memoryview) -> int:
    """Bytes up to the last that is no white space. Looks at the end alone, a copied piece at a time."""
    end = len(data)
    while end >= len(_SPACES) and bytes(data[end - len(_SPACES) : end]) == _SPACES:
        end -= len(_SPACES)
    while end:
        begin = max(0, end - len(_SPACES))
        end = begin + len(bytes(data[begin:end]).rstrip(_WHITE_SPACE))
        if end > begin:
            break
    return end


def _decoded(data: memoryview, where: str, *, wide_text: bool) -> str:
    try:
        return str(data, "ascii")  # as nearly all is, in a fraction of the time that a search takes
    except UnicodeDecodeError:
        pass
    if not wide_text and len(data) > _FREE_BYTES and _FOUR_BYTE_CHARACTER.search(data):
        # One of them makes Python keep four bytes for every character of the text.
        raise FormatError(
            "long JSON must not have raw characters beyond U+FFFF", where=where, limit=_FREE_BYTES
        )
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("JSON is not UTF-8", where=where, got=f"bad byte at {error.start}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _RefusedError(f"key {shown(twice)} occurs twice in an object")
    return result


def _integer(digits: str) -> int:
    if len(digits) > _INT64_DIGITS or not -(1 << 63) <= (value := int(digits)) < 1 << 64:
        raise _RefusedError(f"integer of {len(digits)} digits exceeds 64 bits")
    return value


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _RefusedError("number is too large")
    return value


def _constant(name: str) -> NoReturn:
    raise _RefusedError(f"{name} is not JSON")


def _check_encodable(value: Any, where: str) -> None:
    """Refuses lone surrogates: such a string cannot be printed or written."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
        elif isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError as error:
                raise FormatError(
                    "JSON has half a character (lone surrogate)", where=where, got=shown(item)
                ) from error
