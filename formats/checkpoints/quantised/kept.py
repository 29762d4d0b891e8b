"""Codes of 4 bits that bundles can keep, as far as headers or settings tell."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KeptCodes:
    """mxfp4: all experts are in MXFP4. group: weights that share a scale of symmetric codes, if all experts
    are such; None otherwise. What they are in truth is looked at when they are packed: others are rounded.
    """

    mxfp4: bool = False
    group: int | None = None

    @property
    def cpu_format(self) -> str | None:
        """What keeps them on the CPU, whose blocks are of 32; None for what none does."""
        if self.mxfp4:
            return "mxfp4"
        return "int4" if self.group is not None and self.group % 32 == 0 else None


NO_CODES = KeptCodes()
WHOLE_ROWS = 1 << 30  # a group of all input features: any that divides them will do


def symmetric(group: int | None) -> KeptCodes:
    """Codes with a scale for ``group`` weights, None for a row."""
    return KeptCodes(group=WHOLE_ROWS if group is None else group)
