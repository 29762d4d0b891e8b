"""Hashed n-gram tables: which rows the last tokens choose, by hashes whose moduli are consecutive primes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from krasis.formats.errors import FormatError
from krasis.formats.limits import align_up

if TYPE_CHECKING:
    from krasis.formats.models.spec import ModelSpec

Ids = npt.NDArray[np.int64]

_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)  # decide every number below 2^64
_MAX_PRIMES = 1 << 12
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SEED_STEP = 10007


@dataclass(frozen=True, slots=True)
class TableHash:
    """Which rows of a table tokens choose. multipliers: [longest], of the id now first. moduli, offsets: a
    hash each, those of pairs first. boundary: see ``NgramTable``.
    """

    multipliers: Ids
    moduli: Ids
    offsets: Ids
    boundary: int

    def rows(self, history: Ids) -> Ids:
        """[n, hashes] of the last n of history [longest - 1 + n]; before a sequence stands ``boundary``."""
        reach = len(self.multipliers) - 1
        count = len(history) - reach
        heads = len(self.moduli) // reach
        mixed = history[reach:] * self.multipliers[0]
        is_inside = np.ones(count, bool)
        found = np.empty((count, len(self.moduli)), np.int64)
        for back in range(1, reach + 1):
            earlier = history[reach - back : reach - back + count]
            is_inside &= earlier != self.boundary
            # The product wraps, as it does in 64 bits everywhere.
            mixed = mixed ^ (np.where(is_inside, earlier, self.boundary) * self.multipliers[back])
            part = slice((back - 1) * heads, back * heads)
            found[:, part] = mixed[:, None] % self.moduli[part]
        return found + self.offsets


def table_hash(spec: ModelSpec, number: int) -> TableHash:
    """The hashes of a model's table of that number, counted over the layers that have one."""
    table = spec.ngram
    if table is None:
        raise FormatError("the model has no hashed table", where=spec.family)
    num_hashes = table.heads * (table.longest - 1)
    moduli = list(islice(_primes_from(table.base), number * num_hashes, (number + 1) * num_hashes))
    half = max(1, ((1 << 63) - 1) // spec.vocab // 2)
    seed = table.seed + _SEED_STEP * number
    multipliers = [2 * (_mixed(seed + _GOLDEN * (i + 1)) % half) + 1 for i in range(table.longest)]
    offsets = [0, *accumulate(moduli)][:-1]
    one, two, three = (np.array(numbers, np.int64) for numbers in (multipliers, moduli, offsets))
    return TableHash(one, two, three, table.boundary)


def _mixed(value: int) -> int:
    """SplitMix64."""
    value = (value + _GOLDEN) & _MASK
    for shift, factor in zip((30, 27), _MIX, strict=True):
        value = ((value ^ (value >> shift)) * factor) & _MASK
    return value ^ (value >> 31)


def rows_of_table(base: int, num_hashes: int, num_tables: int, divisor: int) -> int:
    """Rows of the largest of ``num_tables`` tables: its hashes' moduli, consecutive primes from ``base`` on,
    rounded up to a multiple of ``divisor``. The tables take the primes one after the other.

    Raises FormatError for more hashes than any model has.
    """
    if num_hashes * num_tables > _MAX_PRIMES:
        got = num_hashes * num_tables
        raise FormatError("too many hashes", where="n-gram table", got=got, limit=_MAX_PRIMES)
    primes = _primes_from(base)
    sums = [sum(next(primes) for _ in range(num_hashes)) for _ in range(num_tables)]
    return align_up(max(sums), divisor)


def _primes_from(base: int) -> Iterator[int]:
    candidate = max(base, 2)
    while True:
        if _is_prime(candidate):
            yield candidate
        candidate += 1


def _is_prime(number: int) -> bool:
    """Miller and Rabin's test, which these witnesses make exact."""
    for prime in _WITNESSES:
        if number % prime == 0:
            return number == prime
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(_passes(number, pow(witness, odd, number), twos) for witness in _WITNESSES)


def _passes(number: int, power: int, twos: int) -> bool:
    if power in (1, number - 1):
        return True
    for _ in range(twos - 1):
        power = power * power % number
        if power == number - 1:
            return True
    return False
