"""The sentences of errors: the docstring's examples, and an exit code of its own for each kind."""

from __future__ import annotations

import doctest

from krasis.formats import errors


def test_the_examples_in_the_docstring() -> None:
    results = doctest.testmod(errors)
    assert results.attempted >= 2
    assert results.failed == 0


def test_parts_come_in_order() -> None:
    error = errors.KrasisError("too large", where="x", got=3, limit=2, hint="less")
    assert str(error) == "x: too large (got 3; limit 2). Hint: less"
    assert str(errors.KrasisError("too large", got=0)) == "too large (got 0)"


def test_kinds_have_their_own_exit_codes() -> None:
    kinds = errors.KrasisError.__subclasses__()
    codes = [kind.exit_code for kind in kinds]
    assert len(kinds) >= 6
    assert len(set(codes)) == len(codes)
    assert errors.KrasisError.exit_code not in codes
