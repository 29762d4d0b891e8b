"""Notices weights that no training leaves, while they are converted: stretches of zeros, and errors that the
format of the bundle does not explain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from krasis.convert.constant_runs import ConstantRun, constant_runs
from krasis.convert.progress import Reporter
from krasis.convert.slices import TensorSlice
from krasis.formats.errors import FormatError
from krasis.formats.layouts.matrix import PackStats

# Rows of zeros are padding of a vocabulary or of an expert, or were pruned, as long as they are few.
MAX_ZERO_ROWS = 1 / 8
# Experts that no token ever reached may be zero; if more are, a piece of the file is missing.
MAX_ZERO_EXPERTS = 1 / 8
_SLACK_WEIGHTS = 8  # beside rows of zeros, weights that happen to be zero too
_MAX_TOLD = 5
_FORCE = "--force-weights converts the weights as they are"
DAMAGED = f"get the file again and compare its checksum; {_FORCE}"
TOO_SMALL = f"multiply these matrices by a power of two and divide those before them by it; {_FORCE}"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about weights that should not be. text: a sentence; hint: the way out."""

    text: str
    hint: str = DAMAGED


@dataclass(frozen=True, slots=True)
class PackedPart:
    """What is known of one matrix of an expert after packing. limit: its layout's ``explained_error``."""

    piece: TensorSlice
    runs: Sequence[ConstantRun]
    stats: PackStats
    limit: float
    layout_id: str

    @property
    def is_zero(self) -> bool:
        """Whether every weight is."""
        return self.stats.squared_sum == 0.0

    @property
    def is_lost(self) -> bool:
        """Whether nothing to speak of is left of it."""
        return self.is_zero or self.stats.relative_mse > self.limit


@dataclass(slots=True)
class Alarms:
    """What was noticed in one conversion.

    found: since the last ``take``. padded: tensors with rows of zeros; unused: experts of zeros.
    """

    found: list[Finding] = field(default_factory=list)
    padded: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    _zero_experts: list[str] = field(default_factory=list)

    def look_at(self, piece: TensorSlice) -> None:
        """Reports the long stretches of one weight in a dense tensor, but for a norm's ones and padding."""
        runs = constant_runs(piece)
        if len(piece.shape) == 1:
            runs = [run for run in runs if run.is_zero and 4 * run.num_weights >= piece.shape[0]]
            self.found += [Finding(_stretch(piece.where, piece, run)) for run in runs]
        else:
            self._judge_rows(piece.where, piece, runs)

    def look_at_packed(self, part: PackedPart, where: str) -> None:
        """Reports a packed matrix whose error its layout does not explain."""
        stats = part.stats
        if stats.relative_mse > part.limit:
            size = math.sqrt(stats.squared_sum / max(stats.count, 1))
            text = (
                f"{where}: {100 * stats.relative_mse:.3g} % of the weights (squared) is lost in "
                f"{part.layout_id}, which explains {100 * part.limit:.2g} % at most: they are of about "
                f"{size:.1g}, and scales of 16 bits hold no less than 6e-08"
            )
            self.found.append(Finding(text, TOO_SMALL))

    def look_at_expert(self, name: str, parts: Sequence[PackedPart]) -> None:
        """The same for gate, up and down of an expert; one of which nothing is left is for ``end_layer``."""
        if all(part.is_lost for part in parts):
            self._zero_experts.append(name)
            return
        for part in parts:
            where = f"{part.piece.where}, {name}"
            if part.is_zero:
                text = f"{where}: all weights are zero, and those of the expert's other matrices are not"
                self.found.append(Finding(text))
            elif part.is_lost:
                self.look_at_packed(part, where)
            else:
                self._judge_rows(where, part.piece, part.runs)

    def end_layer(self, num_experts: int) -> None:
        """Reports the experts of zeros if they are too many to be merely unused."""
        zero, self._zero_experts = self._zero_experts, []
        if len(zero) > max(1, MAX_ZERO_EXPERTS * num_experts):
            self.found.append(Finding(f"{len(zero)} of {num_experts} experts are all zero: {_list(zero)}"))
        else:
            self.unused += zero

    def take(self) -> list[Finding]:
        """What was found since the last call."""
        found, self.found = self.found, []
        return found

    def notes(self) -> list[str]:
        """Sentences about what is unusual but may be as it was meant."""
        notes = []
        if self.padded:
            notes.append(f"rows of zeros, as padding or pruning leaves them, are in {_list(self.padded)}")
        if self.unused:
            notes.append(f"experts of zeros, as those are that training never reached: {_list(self.unused)}")
        return notes

    def _judge_rows(self, where: str, piece: TensorSlice, runs: Sequence[ConstantRun]) -> None:
        """Whole rows of zeros, if few, are noted; anything else is reported."""
        columns = piece.shape[1]
        slack = max(_SLACK_WEIGHTS, piece.block[0])
        num_rows = 0
        for run in runs:
            first, last = -(-run.start // columns), run.stop // columns
            beside = max(first * columns - run.start, run.stop - last * columns)
            if not run.is_zero or first >= last or beside > slack:
                self.found.append(Finding(_stretch(where, piece, run)))
                return
            num_rows += last - first
        if num_rows > MAX_ZERO_ROWS * piece.shape[0]:
            self.found.append(Finding(f"{where}: {num_rows} of {piece.shape[0]} rows are zero"))
        elif num_rows:
            self.padded.append(f"{where} ({num_rows} of {piece.shape[0]} rows)")


def tell(alarms: Alarms, reporter: Reporter, *, force: bool) -> None:
    """Raises FormatError for what was found since the last time; if forced, notes it."""
    found = alarms.take()
    if found and not force:
        raise FormatError(
            f"the weights look damaged: {found[0].text}",
            got=f"{len(found)} such places so far" if len(found) > 1 else None,
            hint=found[0].hint,
        )
    for finding in found:
        reporter.warn(finding.text)


def _stretch(where: str, piece: TensorSlice, run: ConstantRun) -> str:
    total = math.prod(piece.shape)
    what = "zero" if run.is_zero else "one and the same"
    share = (
        "all weights"
        if run.num_weights == total
        else f"{run.num_weights} of {total} weights, from {run.start} on,"
    )
    return f"{where}: {share} are {what}"


def _list(items: Sequence[str]) -> str:
    more = f", and {len(items) - _MAX_TOLD} more" if len(items) > _MAX_TOLD else ""
    return ", ".join(items[:_MAX_TOLD]) + more
