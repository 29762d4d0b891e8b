"""What ``krasis-info --verify`` says of a bundle's text files: not only whether their bytes are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from krasis.formats.bundle.reader import Bundle
from krasis.runtime.text.check import TEXT_FILES, TextProblem, check_text

MEND = "krasis-convert --refresh-text SOURCE BUNDLE replaces them, without packing weights anew"


def text_problems(path: Path) -> list[TextProblem]:
    """The problems of an intact bundle's text files. Raises KrasisError if it cannot be opened."""
    with Bundle.open(path) as bundle:
        names = {asset.name for asset in bundle.manifest.assets} & set(TEXT_FILES)
        files = {name: bundle.asset(name) for name in sorted(names)}
        return check_text(files, str(path), bundle.spec.vocab)


def add_text_check(path: Path, record: dict[str, Any], texts: list[str]) -> bool:
    """Adds what was found to the record and the lines; gives whether a file cannot be used."""
    found = text_problems(path)
    fatal = [str(problem) for problem in found if problem.error is not None]
    notes = [str(problem) for problem in found if problem.error is None]
    record["text_problems"], record["text_notes"] = fatal, notes
    if fatal:
        texts.append("\n".join([f"{path}: its text files cannot be used", *fatal, MEND]))
    if notes:
        texts.append("\n".join(f"note: {note}" for note in notes))
    return bool(fatal)
