"""Text from files as it may reach a terminal: every character that is not printable is written as an escape.

A file can hold the control sequences of a terminal, line ends that forge lines of ours, or marks that turn
the direction of text. Error sentences, notes, reports and log lines pass here, each once: where it is made.

>>> printable("a\\x1b]0;owned\\x07b")
'a\\\\x1b]0;owned\\\\x07b'
>>> printable("abc" * 100, 10)
'abcabcabca... (300 characters)'
"""

from __future__ import annotations

# The bytes of a name that are not UTF-8, as Python carries them (PEP 383).
_FIRST_LONE_BYTE, _LAST_LONE_BYTE = 0xDC80, 0xDCFF


def printable(text: object, max_chars: int = 0) -> str:
    """One line of text, escaped; max_chars: longer text is cut and its length said, 0: never."""
    line = str(text)
    if max_chars and len(line) > max_chars:
        line = f"{line[:max_chars]}... ({len(line)} characters)"
    return line if line.isprintable() else "".join(map(_escaped, line))


def printable_lines(text: object) -> str:
    """As ``printable``, but line ends and tabs stay: for text that we laid out ourselves."""
    lines = str(text)
    if lines.isprintable():
        return lines
    return "".join(one if one in "\n\t" else _escaped(one) for one in lines)


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    if _FIRST_LONE_BYTE <= code <= _LAST_LONE_BYTE:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")
