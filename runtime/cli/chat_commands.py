"""What a line of a chat is: a question, or a /command."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from krasis.formats.errors import UsageError
from krasis.runtime.cli.prompt_input import QUOTES, Typed, without_quotes

ALIASES = {"?": "help", "bye": "quit", "clear": "reset", "exit": "quit", "q": "quit"}
_COMMAND = re.compile(r"/([^\s/]+)(?:[ \t]+(.*))?", re.DOTALL)  # the word ends in its own line
AS_TEXT = "a blank before the slash sends it as a question"


@dataclass(frozen=True, slots=True)
class Question:
    """A text for the model."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A command: its name without the slash, and what follows it."""

    name: str
    argument: str


def parse(typed: Typed, names: Collection[str]) -> Question | Call:
    """A command if the first word is one of names behind a slash, or of ``ALIASES``; else a question.

    A text that begins with triple quotes, with a blank before its slash, or that was pasted in several lines
    is a question in any case. Raises UsageError for text that is none (bytes of another encoding), and for a
    word that looks like a misspelt command.
    """
    text = typed.text
    bad = next((index for index, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
    if bad is not None:
        raise UsageError(
            "what was entered is not text in the terminal's encoding",
            got=f"a bad byte at {bad}",
            hint="convert it, to UTF-8 for most terminals",
        )
    if typed.literal:
        return Question(text)
    if text.lstrip().startswith(QUOTES):
        return Question(without_quotes(text))
    if text.startswith(" /"):
        return Question(text[1:])
    escaped = text.startswith("//")
    found = _COMMAND.fullmatch(text[1:] if escaped else text)
    name = ALIASES.get(found[1], found[1]) if found else ""
    if found is None or escaped:
        return Question(text[1:] if name in names else text)
    if name in names:
        return Call(name, _argument(found[2] or ""))
    _refuse_misspelt(name, bool(found[2]), names)
    return Question(text)


def _argument(text: str) -> str:
    return without_quotes(text) if text.startswith(QUOTES) else text.strip()


def _refuse_misspelt(word: str, more: bool, names: Collection[str]) -> None:
    """Raises UsageError if word is like a command's name, or alone and like no path."""
    if not word.isalpha() or not word.isascii() or Path("/", word).exists():
        return
    near = [name for name in names if _distance(word, name) <= (1 if more or len(name) < 5 else 2)]
    if near:
        meant = " or ".join(f"/{name}" for name in near)
        raise UsageError("unknown command", got=f"/{word}", hint=f"did you mean {meant}? {AS_TEXT}")
    if not more:
        raise UsageError("unknown command", got=f"/{word}", hint=f"/help lists them; {AS_TEXT}")


def _distance(left: str, right: str) -> int:
    """Letters to insert, drop, replace or swap with their neighbour to make one word the other."""
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        two, before, row = before, row, [i]
        for j, b in enumerate(right, 1):
            best = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and left[i - 2] == b:
                best = min(best, two[j - 2] + 1)
            row.append(best)
    return row[-1]
