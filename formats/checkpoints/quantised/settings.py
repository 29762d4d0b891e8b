"""The settings by which a checkpoint says that its weights are quantised, and what is made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from krasis.formats.checkpoints.quantised.kept import NO_CODES, KeptCodes
from krasis.formats.checkpoints.quantised.tensors import Reader
from krasis.formats.checkpoints.quantised_checkpoint import way_out
from krasis.formats.errors import UnsupportedModelError
from krasis.formats.models.hf import Config
from krasis.formats.names import shown

_MAX_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a checkpoint's weights are quantised. name: for people. readers: of its formats. kept: what a
    bundle can keep of them.
    """

    name: str
    readers: tuple[Reader, ...]
    kept: KeptCodes = NO_CODES


class Settings(Config):
    """A ``quantization_config``. folder: the checkpoint's, whose name may tell what it was made from."""

    __slots__ = ("folder",)

    def __init__(self, table: Any, where: str, folder: str = "") -> None:
        super().__init__(table, where)
        self.folder = folder

    def inner(self, name: str) -> Settings:
        """A table inside; empty where it is absent."""
        child = self.child(name)
        return Settings(child.table, child.where, self.folder)

    def expect(self, name: str, *allowed: Any, limit: str = "") -> None:
        """Raises UnsupportedModelError unless a field is absent or one of these."""
        value = self.table.get(name)
        if value is None or any(type(value) is type(one) and value == one for one in allowed):
            return
        raise self.refused(name, value, limit or ", ".join(str(one) for one in allowed))

    def text(self, name: str) -> str | None:
        """A text in lower case, None where it is absent. Raises UnsupportedModelError for others."""
        value = self.table.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.refused(name, value, "a text")
        return value.lower()

    def pair(self, name: str) -> tuple[int, int]:
        """Two sizes in a list."""
        value = self.table.get(name)
        if (
            not isinstance(value, list)
            or len(value) != 2
            or not all(type(one) is int and 1 <= one <= _MAX_BLOCK for one in value)
        ):
            raise self.refused(name, value, "two sizes")
        return value[0], value[1]

    def refused(self, name: str, value: object, limit: str) -> UnsupportedModelError:
        """The error for a setting that is not read."""
        got = str(value) if isinstance(value, bool | int | float) else shown(value, 60)
        return UnsupportedModelError(
            "the checkpoint is quantised in a way that Krasis does not convert",
            where=self.path(name),
            got="nothing" if value is None else got,
            limit=limit,
            hint=way_out(self.folder),
        )
