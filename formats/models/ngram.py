"""The sizes of hashed n-gram tables: consecutive primes, one a hash."""

from __future__ import annotations

from collections.abc import Iterator

from krasis.formats.errors import FormatError
from krasis.formats.limits import align_up

_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)  # decide every number below 2^64
_MAX_PRIMES = 1 << 12


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
