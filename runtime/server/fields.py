"""Fields of a request's object, each read as one kind of value; null is the same as absent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from krasis.formats.names import shown
from krasis.runtime.server.errors import ApiError, refused


class Fields:
    """Reads a JSON object's fields. Each method raises ApiError (400) that names the field. where: of an
    object inside the request, such as ``stream_options``."""

    __slots__ = ("_object", "_where")

    def __init__(self, value: Mapping[str, Any], where: str = "") -> None:
        self._object, self._where = value, where

    def has(self, name: str) -> bool:
        """Whether it is there and not null."""
        return self._object.get(name) is not None

    def any(self, name: str) -> Any:
        """The value as it is."""
        return self._object.get(name)

    def text(self, name: str, default: str | None = None) -> str | None:
        """A string."""
        value = self._object.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self._object.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def integer(self, name: str, low: int | None = None, high: int | None = None) -> int | None:
        """A whole number, also one written with a point."""
        value = self._object.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "an integer")
        self._check(name, value, low, high)
        return value

    def number(self, name: str, low: float | None = None, high: float | None = None) -> float | None:
        """A finite number."""
        value = self._object.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(name, "a number")
        self._check(name, value, low, high)
        return float(value)

    def items(self, name: str) -> Sequence[Any] | None:
        """A list."""
        value = self._object.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.wrong(name, "a list")
        return value

    def object(self, name: str) -> Fields | None:
        """An object inside this one."""
        value = self._object.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return Fields(value, self.path(name))

    def mapping(self, name: str) -> dict[str, Any] | None:
        """An object's items."""
        value = self._object.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return None if value is None else dict(value)

    def path(self, name: str) -> str:
        """The field's name, with that of the object it is in."""
        return f"{self._where}.{name}" if self._where else name

    def wrong(self, name: str, wanted: str) -> ApiError:
        """The error for a value of another kind."""
        got = shown(self._object.get(name))
        return refused(f"'{self.path(name)}' must be {wanted} (got {got}).", self.path(name), "invalid_type")

    def _check(self, name: str, value: float, low: float | None, high: float | None) -> None:
        if (low is not None and value < low) or (high is not None and value > high):
            most = "" if high is None else f" and at most {high}"
            raise refused(
                f"'{self.path(name)}' must be at least {low}{most} (got {value}).",
                self.path(name),
                "invalid_value",
            )
