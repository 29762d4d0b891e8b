"""Errors on their way from one process to another: the same class, sentence and exit code arrive."""

from __future__ import annotations

from typing import Any

from krasis.formats import errors as formats_errors
from krasis.formats.errors import KrasisError
from krasis.formats.process.last_resort import exit_code, sentence
from krasis.runtime.serving.api import ContextTooLongError, CoreClosedError, EngineLostError, QueueFullError

_SPECIAL = (ContextTooLongError, CoreClosedError, EngineLostError, QueueFullError)
_PARTS = ("where", "got", "limit", "hint")
_FIELDS = ("retry_after_s", "num_tokens", "context")  # of some


def _classes() -> dict[str, type[KrasisError]]:
    found = [one for one in vars(formats_errors).values() if isinstance(one, type)]
    return {one.__name__: one for one in (*found, *_SPECIAL) if issubclass(one, KrasisError)}


_CLASSES = _classes()


def told(error: BaseException) -> dict[str, Any]:
    """The error as an object of JSON. What is none of ours becomes what a command would say of it."""
    if not isinstance(error, KrasisError):
        return {"class": "KrasisError", "what": sentence(error), "exit_code": exit_code(error)}
    name = next(one.__name__ for one in type(error).__mro__ if one.__name__ in _CLASSES)
    parts = {one: None if (value := getattr(error, one)) is None else str(value) for one in _PARTS}
    fields = {one: getattr(error, one) for one in _FIELDS if hasattr(error, one)}
    return {
        "class": name,
        "what": error.what,
        **parts,
        "exit_code": error.exit_code,
        "is_final": error.is_final,
        **fields,
    }


def heard(said: dict[str, Any]) -> KrasisError:
    """The error that was told."""
    kind = _CLASSES.get(str(said.get("class")), KrasisError)
    error = kind.__new__(kind)
    parts = {one: said.get(one) for one in _PARTS}
    parts |= {one: parts[one] or "" for one in ("where", "hint")}
    KrasisError.__init__(error, str(said.get("what", "")), **parts)  # type: ignore[arg-type]
    fields = {one: said[one] for one in ("exit_code", "is_final", *_FIELDS) if one in said}
    for name, value in fields.items():
        setattr(error, name, value)
    return error
