"""Whether text files serve a model: tried as the runtime will read them, before hours go into its weights.

The converter asks before it begins, ``--refresh-text`` before it replaces, ``krasis-info --verify`` of a
finished bundle.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from krasis.formats.errors import FormatError, KrasisError
from krasis.formats.limits import MAX_ASSET_BYTES
from krasis.formats.names import shown
from krasis.formats.strict_json import parse_json_object
from krasis.runtime.text.assets import (
    ADDED_TOKENS,
    GENERATION_CONFIG,
    SPECIAL_TOKENS_MAP,
    TEMPLATE_FILE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TextAssets,
    parse_text_json,
)
from krasis.runtime.text.chat import ChatTemplate

TEXT_FILES = (TOKENIZER, TOKENIZER_CONFIG, TEMPLATE_FILE, GENERATION_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS)
_JSON_FILES = (TOKENIZER_CONFIG, GENERATION_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MARK = re.compile(r"<\|[A-Za-z0-9_]+\|>")

_ASKED = "krasis asks nineteen"
_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number", "description": "the first"}},
            "required": ["a"],
        },
    },
}


@dataclass(frozen=True, slots=True)
class TextProblem:
    """name: the file. what: a sentence. error: set if the file cannot be used; without one it is a note."""

    name: str
    what: str
    error: KrasisError | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def check_text(files: Mapping[str, bytes], where: str, vocab_size: int) -> list[TextProblem]:
    """What is wrong with the text files of a model whose embedding has vocab_size rows, fatal things first.

    files: name -> contents; those that are no text side's are not looked at. where: their folder, for
    messages. Raises ResourceError if the system does not let it look.
    """
    files = {name: data for name, data in files.items() if name in TEXT_FILES}
    problems: list[TextProblem] = []
    for name in _JSON_FILES:
        if name not in files:
            continue
        try:
            parse_text_json(files[name], f"{where}: {name}")
        except FormatError as error:
            problems.append(_fatal(name, error))
    unread = {problem.name for problem in problems}
    text = TextAssets.of_files(
        {name: data for name, data in files.items() if name not in unread}, where, vocab_size
    )
    is_read = False
    if TOKENIZER in files:
        problem = _tried(TOKENIZER, lambda: text.tokenizer)
        is_read = problem is None
        problems += [problem] if problem is not None else _tokenizer_notes(text, files[TOKENIZER], where)
    if GENERATION_CONFIG in files and GENERATION_CONFIG not in unread:
        problems += _generation(text, files, where, vocab_size, is_read=is_read)
    problems += _template(text, files, is_read=is_read)
    return sorted(problems, key=lambda problem: problem.error is None)


def _tried(name: str, read: Any) -> TextProblem | None:
    """The problem if reading fails. What else is raised (no memory, no worker) is none of the file's."""
    try:
        read()
    except FormatError as error:
        # What stands beside a file may be what makes it fail, and then the error names that.
        named = [other for other in TEXT_FILES if f": {other}" in error.where]
        return _fatal(named[0] if named else name, error)
    return None


def _fatal(name: str, error: KrasisError) -> TextProblem:
    """The error's sentence without its place, which is named beside."""
    return TextProblem(name, str(error).removeprefix(f"{error.where}: "), error)


# ---- tokenizer ---------------------------------------------------------------------------------------------


def _tokenizer_notes(text: TextAssets, data: bytes, where: str) -> list[TextProblem]:
    notes = [TextProblem(TOKENIZER_CONFIG, note) for note in text.tokenizer.notes]
    try:
        ids = vocabulary(data, where)
    except FormatError as error:
        return [*notes, TextProblem(TOKENIZER, f"its ids are not checked: {error.what}")]
    rows = text.tokenizer.vocab_size
    beyond = [token for token, number in ids.items() if number >= rows]
    if beyond:
        refused = FormatError(
            "a token has an id beyond the model's rows",
            where=f"{where}: {TOKENIZER}",
            got=f"{shown(beyond[0])} is {ids[beyond[0]]}"
            + (f", {len(beyond)} such" if len(beyond) > 1 else ""),
            limit=f"{rows} rows",
            hint="the tokenizer is of another model, or its embedding was not resized",
        )
        return [_fatal(TOKENIZER, refused), *notes]
    for token, number in ids.items():
        if token.startswith("<") and (found := text.tokenizer.token_id(token)) != number:
            notes.append(
                TextProblem(TOKENIZER, f"{shown(token)} is {number} in the file, but read as {found}")
            )
    return notes


def vocabulary(data: bytes, where: str) -> dict[str, int]:
    """Token -> id of a tokenizer.json, as the file says. FormatError if it cannot be told."""
    record = parse_json_object(data, f"{where}: {TOKENIZER}", max_bytes=MAX_ASSET_BYTES, wide_text=True)
    model = record.get("model")
    listed = model.get("vocab") if isinstance(model, dict) else None
    found: dict[str, int] = {}
    if isinstance(listed, dict):
        found = {token: number for token, number in listed.items() if type(number) is int}
    elif isinstance(listed, list):  # of Unigram: [token, score], the id is the place
        found = {str(one[0]): at for at, one in enumerate(listed) if isinstance(one, list) and one}
    for one in record.get("added_tokens") or []:
        if isinstance(one, dict) and isinstance(one.get("content"), str) and type(one.get("id")) is int:
            found[one["content"]] = one["id"]
    return found


# ---- generation_config.json --------------------------------------------------------------------------------


def _generation(
    text: TextAssets, files: Mapping[str, bytes], where: str, vocab_size: int, *, is_read: bool
) -> list[TextProblem]:
    problem = _tried(GENERATION_CONFIG, lambda: text.sampling)
    if problem is None and is_read:
        problem = _tried(GENERATION_CONFIG, lambda: text.named_ends)
    if problem is not None:
        return [problem]
    config = parse_text_json(files[GENERATION_CONFIG], where)
    notes = []
    for key in _IDS:
        value = config.get(key)
        for one in value if isinstance(value, list) else [value]:
            if type(one) is int and not 0 <= one < vocab_size:
                what = f"{key} {one} is no row of the model, which has {vocab_size}"
                notes.append(TextProblem(GENERATION_CONFIG, what))
    if is_read and not _has_ends(text):
        notes.append(TextProblem(GENERATION_CONFIG, "no token ends an answer: it goes on until --max-tokens"))
    return notes


def _has_ends(text: TextAssets) -> bool:
    try:
        return bool(text.end_tokens.ids)
    except FormatError:  # of the template, which has its own problem
        return True


# ---- chat template -----------------------------------------------------------------------------------------


def _template(text: TextAssets, files: Mapping[str, bytes], *, is_read: bool) -> list[TextProblem]:
    name = TEMPLATE_FILE if TEMPLATE_FILE in files else TOKENIZER_CONFIG
    problem = _tried(name, lambda: text.template)
    if problem is not None:
        return [problem]
    template = text.template
    if template is None:
        what = "there is no chat template: krasis-run continues plain text (--raw)"
        return [TextProblem(name, what)] if TOKENIZER in files else []
    rendered, refusals = _render(template)
    if not rendered:
        return [_fatal(name, next(iter(refusals.values())))]
    # Many templates are for some conversations only, and say so: that is told and is no fault.
    problems = [
        TextProblem(name, f"the chat template does not take {what} ({error.got or error.what})")
        for what, error in refusals.items()
    ]
    first = next(iter(rendered.values()))
    if _ASKED not in first:
        problems.append(TextProblem(name, "the chat template leaves out what the user says"))
    if is_read:
        marks = dict.fromkeys(mark for said in rendered.values() for mark in _MARK.findall(said))
        problems += [
            TextProblem(name, f"the chat template writes {mark}, which is no token of the tokenizer")
            for mark in marks
            if text.tokenizer.token_id(mark) is None
        ]
    return problems


def _render(template: ChatTemplate) -> tuple[dict[str, str], dict[str, KrasisError]]:
    """What it makes of the conversations that people have, and why it refuses others, by name."""
    asked, answered = {"role": "user", "content": _ASKED}, {"role": "assistant", "content": "and hears"}
    system = {"role": "system", "content": "krasis explains"}
    tries: dict[str, tuple[list[dict[str, str]], list[dict[str, Any]] | None]] = {
        "a question": ([asked], None),
        "two turns": ([asked, answered, asked], None),
        "a system message": ([system, asked], None),
        "tools": ([system, asked], [_TOOL]),
    }
    rendered: dict[str, str] = {}
    refusals: dict[str, KrasisError] = {}
    for name, (messages, tools) in tries.items():
        try:
            rendered[name] = template.render(messages, tools=tools)
        except FormatError as error:
            refusals[name] = error
    return rendered, refusals
