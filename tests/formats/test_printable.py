"""What a file says reaches a terminal escaped, once, in sentences, notes and log lines."""

from __future__ import annotations

import logging

import pytest

from krasis.formats.errors import FormatError
from krasis.formats.names import shown
from krasis.formats.printable import printable, printable_lines
from krasis.formats.process.log_lines import PrintableFormatter

RUDE = {
    "title": "\x1b]0;owned\x07",
    "colour": "\x1b[31mEVIL",
    "c1": "\x9b31m\x90q\x9d0;owned\x9c",
    "line end": "fine\nkrasis-run: forged",
    "carriage return": "fine\rforged",
    "line separators": "a\u2028b\u2029c\x85d",
    "direction": "\u202eevil\u2066\u2069",
    "invisible": "a\u200bb\ufeffc\u00add",
    "half a character": "\ud800",
    "bytes of a name": "caf\udce9",
    "tags": "\U000e0041",
    "delete": "\x7f\x00\x08",
}


@pytest.mark.parametrize("text", RUDE.values(), ids=RUDE)
def test_everything_in_a_sentence_is_printable(text: str) -> None:
    for error in (
        FormatError(text),
        FormatError("x", where=text),
        FormatError("x", got=text),
        FormatError("x", limit=[text]),
        FormatError("x", hint=text),
    ):
        assert str(error).isprintable(), ascii(str(error))
        str(error).encode("utf-8")
    assert printable_lines(text).replace("\n", "").isprintable()


def test_it_is_escaped_once() -> None:
    assert str(FormatError("x", got=shown("\x1b[2J"))) == "x (got '\\x1b[2J')"
    assert str(FormatError("x", got=FormatError("y\x1b"))) == "x (got y\\x1b)"
    assert printable(printable("\x1b\udce9\u202e")) == "\\x1b\\xe9\\u202e"


def test_plain_text_is_left_alone() -> None:
    text = "Grüße, 世界 🙂 a\\b /path/with spaces"
    assert printable(text) == printable_lines(text) == text
    assert printable_lines("a\n\tb") == "a\n\tb"


def test_endless_text_is_cut() -> None:
    sentence = str(FormatError("x" * 10**6, got="y" * 10**6, hint="z" * 10**6, where="w" * 10**6))
    assert len(sentence) < 8000
    assert "(1000000 characters)" in sentence


def test_log_lines_are_escaped() -> None:
    record = logging.LogRecord("krasis", logging.INFO, "", 0, "opened %s", ("\x1b]0;owned\x07",), None)
    assert PrintableFormatter("%(name)s: %(message)s").format(record) == "krasis: opened \\x1b]0;owned\\x07"
