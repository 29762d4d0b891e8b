"""The inputs' text files, tried before the work: what cannot be used is refused, or left out if asked."""

from __future__ import annotations

import json
from collections.abc import Mapping

from krasis.convert.progress import Reporter
from krasis.formats.errors import FormatError, KrasisError
from krasis.runtime.text.assets import TOKENIZER_CONFIG, parse_text_json
from krasis.runtime.text.check import TextProblem, check_text

WAY_OUT = "--force-text converts without what cannot be used; --refresh-text puts it into the bundle later"


def sound_text(
    files: Mapping[str, bytes],
    unreadable: Mapping[str, KrasisError],
    where: str,
    vocab_size: int,
    reporter: Reporter,
    *,
    force: bool,
) -> dict[str, bytes]:
    """The text files that the bundle shall have.

    unreadable: files that are there but could not be read. Raises the first error among them (FormatError, or
    what reading raised) unless force is set: then each is a note, and the file, or the chat template in it,
    is left out.
    """
    kept = dict(files)
    found = unreadable_problems(unreadable)
    found += check_text(kept, where, vocab_size)
    while any(problem.error is not None for problem in found):
        before = dict(kept)
        for problem in found:
            if problem.error is None:
                continue
            if not force:
                raise _with_way_out(problem.error)
            reporter.warn(f"{where}: {problem}; it is left out (--force-text)")
            _leave_out(kept, problem)
        if kept == before and found[0].name not in unreadable:
            raise found[0].error or FormatError(found[0].what, where=where)
        # One file may have hidden what is wrong with another.
        found, unreadable = check_text(kept, where, vocab_size), {}
    for problem in found:
        reporter.warn(str(problem))
    return kept


def unreadable_problems(unreadable: Mapping[str, KrasisError]) -> list[TextProblem]:
    """Files that are there and could not be read, as problems."""
    return [
        TextProblem(name, str(error).removeprefix(f"{error.where}: "), error)
        for name, error in unreadable.items()
    ]


def _with_way_out(error: KrasisError) -> KrasisError:
    hint = f"{error.hint}; {WAY_OUT}" if error.hint else WAY_OUT
    return type(error)(error.what, where=error.where, got=error.got, limit=error.limit, hint=hint)


def _leave_out(files: dict[str, bytes], problem: TextProblem) -> None:
    data = files.pop(problem.name, None)
    if data is None or problem.name != TOKENIZER_CONFIG:
        return
    try:
        config = parse_text_json(data, problem.name)
    except FormatError:
        return
    if config.pop("chat_template", None) is not None:  # the rest of the file is worth keeping
        files[problem.name] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
