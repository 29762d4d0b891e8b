"""The errors a user can meet. Each says what went wrong, where, what was found, what is allowed, what to do.

>>> str(FormatError("tensor ends outside the file", where="a.safetensors", got="900", limit="800 bytes"))
'a.safetensors: tensor ends outside the file (got 900; limit 800 bytes)'
>>> str(UsageError("no bundle given", hint="name a .krasis folder"))
'no bundle given. Hint: name a .krasis folder'
"""

from __future__ import annotations

from krasis.formats.printable import printable

# Longest parts of a sentence, in characters: what a file says of itself may be of any length.
_MAX_WHERE, _MAX_WHAT, _MAX_DETAIL = 5000, 1000, 500


class KrasisError(Exception):
    """Base of every error that Krasis raises on purpose. ``exit_code`` is what a command returns for it;
    ``is_final``: what raised it works no more."""

    exit_code = 1
    is_final = False

    def __init__(
        self, what: str, *, where: str = "", got: object = None, limit: object = None, hint: str = ""
    ) -> None:
        self.what, self.where, self.got, self.limit, self.hint = what, where, got, limit, hint
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        """One line that is safe on a terminal: this is where what files say is escaped, and nowhere else."""
        details = []
        if self.got is not None:
            details.append(f"got {printable(self.got, _MAX_DETAIL)}")
        if self.limit is not None:
            details.append(f"limit {printable(self.limit, _MAX_DETAIL)}")
        sentence = printable(self.what, _MAX_WHAT)
        if self.where:
            sentence = f"{printable(self.where, _MAX_WHERE)}: {sentence}"
        if details:
            sentence += f" ({'; '.join(details)})"
        if self.hint:
            sentence += f". Hint: {printable(self.hint, _MAX_WHAT)}"
        return sentence


class UsageError(KrasisError):
    """The command line or a setting is unusable."""

    exit_code = 2


class FormatError(KrasisError):
    """A file is damaged, hostile or not of the format it claims."""

    exit_code = 3


class VersionError(FormatError):
    """A bundle of a newer format version than this program reads."""


class ChecksumError(FormatError):
    """Bytes on disk differ from the checksum in the manifest."""


class UnsupportedModelError(KrasisError):
    """A sound model that this version does not handle (architecture, shape, feature)."""

    exit_code = 4


class MismatchError(KrasisError):
    """Two inputs that should hold one model do not, or a resumed conversion's inputs or settings changed."""

    exit_code = 5


class ResourceError(KrasisError):
    """Not enough disk, memory or address space, or the system refused an operation."""

    exit_code = 6


class OutOfDeviceMemoryError(ResourceError):
    """A GPU's memory is exhausted; a smaller batch may fit."""


class NativeError(KrasisError):
    """The native library is missing, of another ABI, or refused its arguments (a bug in a wrapper)."""

    exit_code = 7
