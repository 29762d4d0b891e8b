"""The tensors of a checkpoint, as the readers of quantised weights look for their parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from krasis.formats.checkpoints.quantised.stored import Stored
from krasis.formats.checkpoints.quantised.weight import QuantisedWeight
from krasis.formats.errors import FormatError
from krasis.formats.files.regular_file import Bytes


class Described(Protocol):
    """What a header says of a tensor."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Tensors:
    """All tensors by name, with ways to their bytes and to their places for messages."""

    infos: Mapping[str, Described]
    view: Callable[[str], Bytes]
    where: Callable[[str], str]

    def find(self, *names: str) -> Stored | None:
        """The first of these tensors that is there."""
        name = next((name for name in names if name in self.infos), None)
        if name is None:
            return None
        info = self.infos[name]
        return Stored(name, info.dtype, info.shape, self.where(name), self.view)

    def need(self, codes: str, *names: str) -> Stored:
        """The first of these, which belong to the tensor ``codes``. Raises FormatError if none is there."""
        found = self.find(*names)
        if found is None:
            raise FormatError(
                f"a quantised weight lacks its {names[0].rpartition('.')[2]}",
                where=self.where(codes),
                hint="the download may be incomplete, or config.json of another version of the model",
            )
        return found

    def codes(self, name: str, *ranks: int) -> Stored:
        """A tensor that is there, which must have one of these numbers of sizes, none of them 0."""
        stored = self.need(name, name)
        if len(stored.shape) not in ranks or 0 in stored.shape:
            raise FormatError(
                "the codes of a quantised weight are no matrix", where=stored.where, got=list(stored.shape)
            )
        return stored


@dataclass(frozen=True, slots=True)
class Found:
    """A quantised weight by the name that it would have if it were plain."""

    name: str
    weight: QuantisedWeight


class Reader(Protocol):
    """Knows the weights of one format by the names and types of their tensors."""

    def read(self, name: str, tensors: Tensors) -> Found | None:
        """The weight whose codes the tensor ``name`` holds; None if it holds none of this format.

        Looks at headers alone. Raises FormatError for missing parts and shapes that do not fit.
        """
