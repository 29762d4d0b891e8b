"""Text from outside: what is no UTF-8 text is refused in one sentence, before a library meets it."""

from __future__ import annotations

from krasis.formats.errors import FormatError, UsageError
from krasis.formats.names import shown

BYTE_ORDER_MARK = "\ufeff"


def plain_text(value: object, what: str, where: str = "") -> str:
    """The text itself. Raises UsageError for another type, or for half characters (lone surrogates), which
    is what Python makes of bytes of a command line or a terminal that are not UTF-8.
    """
    if not isinstance(value, str):
        raise UsageError(f"{what} must be text", where=where, got=type(value).__name__)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{what} is not UTF-8 text", where=where, got=f"bad byte at character {error.start}"
        ) from error
    return str(value)


def decode_file(data: bytes, where: str) -> str:
    """The text of a file; a byte order mark at its head says how the file is written and is no part of it.

    Raises FormatError for bytes that are not UTF-8.
    """
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            "the file is not UTF-8 text",
            where=where,
            got=f"bad byte at {error.start}",
            hint=what_it_is(data) or "it may be damaged: get it again",
        ) from error
    return text.removeprefix(BYTE_ORDER_MARK)


def what_it_is(data: bytes) -> str:
    """What a text file that cannot be read evidently is, and what to do; empty if nothing is known."""
    head = data[:512].removeprefix(BYTE_ORDER_MARK.encode()).lstrip()
    lower = head.lower()
    if not data:
        return "the file is empty: get it again"
    if not head.strip(b"\0"):
        return "the file holds zeros only: the download was cut, get it again"
    if head.startswith(b"version https://git-lfs.github.com"):
        return "this is a git-lfs pointer, not the file: run git lfs pull, or download the file itself"
    if lower.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head", b"<body")):
        return "this is a web page, not the file: download the file itself (its raw form)"
    if lower.startswith((b"entry not found", b"repository not found", b"not found", b"access to model")) or (
        b"invalid username or password" in lower or b"401 client error" in lower
    ):
        return f"a web site's error message was saved instead ({shown(_first_line(head))}): download it again"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or data[:512].count(0) * 3 > len(data[:512]):
        return "this looks like UTF-16: save it as UTF-8"
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"BZh")):
        return "the file is compressed: unpack it first"
    return ""


def _first_line(head: bytes) -> str:
    return head.splitlines()[0].decode("utf-8", "replace")[:80]
