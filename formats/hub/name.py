"""A model's name on the hub as users write it: ``org/model``, ``org/model@revision``, ``org/model:Q8_0``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from krasis.formats.errors import UsageError

# Shells and pathlib make one slash of two; browsers' addresses name the revision behind /tree/ or /blob/.
_SCHEME = re.compile(r"(?:hf|https?):/+")
_HOST = re.compile(r"https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/")
_OTHER_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:/")
_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_NAME = re.compile(rf"({_PART}/{_PART})")
_PAGE = re.compile(r"/(?:tree|blob|resolve)/([^/]+)(?:/(.+))?")


@dataclass(frozen=True, slots=True)
class HubName:
    """repo: ``org/model``. revision: a branch, tag or commit; None is the main one. variant: which GGUF of a
    repository of several, by its quantisation or its file's name.
    """

    repo: str
    revision: str | None = None
    variant: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}" + (f":{self.variant}" if self.variant else "")

    @property
    def model(self) -> str:
        """The name without its organisation."""
        return self.repo.partition("/")[2]


def hub_name(text: str) -> HubName | None:
    """The name that ``text`` is, or None for a path.

    What exists is a path, and so is what lies in a folder that exists, unless it begins with ``hf://``.
    Raises UsageError for an address that is none of a model on the hub.
    """
    if not _SCHEME.match(text):
        if _OTHER_SCHEME.match(text):
            raise UsageError(
                "krasis-convert takes local files and names of models on the hub",
                got=text,
                hint="download the model first, or name it as org/model",
            )
        if os.path.lexists(text) or text.startswith(".") or Path(text).parent.is_dir():
            return None
        return _parse(text)
    found = _parse(_SCHEME.sub("", _HOST.sub("hf://", text)))
    if found is None:
        raise UsageError("this address is none of a model on the hub", got=text, hint="name it as org/model")
    return found


def _parse(text: str) -> HubName | None:
    match = _NAME.match(text)
    if match is None:
        return None
    repo, rest = match[1], text[match.end() :].rstrip("/")
    if page := _PAGE.fullmatch(rest):
        return HubName(repo, page[1], page[2])
    revision = variant = None
    while rest:
        piece = re.match(r"([@:])([^@:]+)", rest)
        if piece is None:
            return None
        if piece[1] == "@" and revision is None:
            revision = piece[2]
        elif piece[1] == ":" and variant is None:
            variant = piece[2]
        else:
            return None
        rest = rest[piece.end() :]
    return HubName(repo, revision, variant)
