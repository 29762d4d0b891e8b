"""What goes wrong between ranks."""

from __future__ import annotations

from krasis.formats.errors import KrasisError


class RankError(KrasisError):
    """A rank failed, died or fell silent; the job cannot go on."""

    exit_code = 8
    is_final = True
