import pytest

from krasis.formats.errors import FormatError
from krasis.formats.limits import MAX_SIZE, align_up, checked_add, checked_mul


def test_products_up_to_the_limit_pass():
    assert checked_mul([1 << 31, 1 << 31], "x") == 1 << 62
    assert checked_mul([MAX_SIZE], "x") == MAX_SIZE
    assert checked_mul([], "x") == 1
    assert checked_mul([5, 0, 7], "x") == 0


@pytest.mark.parametrize("factors", [[1 << 32, 1 << 32], [1 << 62, 2], [1 << 62, 4, 0]])
def test_overflowing_products_are_refused(factors):
    with pytest.raises(FormatError, match="here: size overflows"):
        checked_mul(factors, "here")


def test_negative_sizes_are_refused():
    with pytest.raises(FormatError, match="negative"):
        checked_mul([-1, -1], "x")
    with pytest.raises(FormatError, match="negative"):
        checked_add([5, -1], "x")


def test_sums_are_bounded():
    assert checked_add([1, 2, 3], "x") == 6
    with pytest.raises(FormatError, match="overflows"):
        checked_add([MAX_SIZE, 1], "x")


def test_a_number_too_long_to_print_is_still_named():
    with pytest.raises(FormatError, match="a number of 20001 bits"):
        checked_mul([1 << 20_000], "x")


@pytest.mark.parametrize(
    ("size", "alignment", "expected"), [(0, 32, 0), (1, 32, 32), (32, 32, 32), (33, 32, 64), (7, 3, 9)]
)
def test_align_up(size, alignment, expected):
    assert align_up(size, alignment) == expected
