"""Units for people and flags."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krasis.formats.errors import UsageError
from krasis.formats.text_tables import text_fields, text_table
from krasis.formats.units import (
    format_binary,
    format_bytes,
    format_count,
    format_rate,
    format_seconds,
    parse_bytes,
    parse_gpus,
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999.5 kB"),
        (999_500, "1.00 MB"),
        (117_096_579_072, "117.1 GB"),
        (2**40, "1.10 TB"),
        (5e18, "5000.0 PB"),
    ],
)
def test_bytes_are_decimal(value: float, expected: str):
    assert format_bytes(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(16 * 2**30, "16 GiB"), (2**40, "1 TiB"), (3 * 2**29, "1.5 GiB"), (12, "12 B")]
)
def test_memory_as_it_is_sold(value: int, expected: str):
    assert format_binary(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(235_093_634_560, "235.1 B"), (42, "42"), (4_300_000, "4.30 M")]
)
def test_counts(value: float, expected: str):
    assert format_count(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0000082, "8.2 us"),
        (0.031, "31 ms"),
        (9.007, "9.01 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (0.9999, "1 s"),
    ],
)
def test_seconds(value: float, expected: str):
    assert format_seconds(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1556.3, "1556 tok/s"), (5.352, "5.35 tok/s"), (61.63, "61.6 tok/s"), (0.0123, "0.0123 tok/s")],
)
def test_rates(value: float, expected: str):
    assert format_rate(value) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16GiB", 16 * 2**30),
        ("16 gib", 16 * 2**30),
        ("141GB", 141 * 10**9),
        ("1.5TiB", 3 * 2**39),
        ("4096", 4096),
        ("1TB", 10**12),
    ],
)
def test_sizes_are_read(text: str, expected: int):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GB", "16 parsecs", "1e9", "nan", "inf", "0", "9" * 40, "16GiBs", "\u0661GB"]
)
def test_nonsense_sizes_are_refused(text: str):
    with pytest.raises(UsageError):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3x16GiB", (16 * 2**30,) * 3),
        ("16GiB", (16 * 2**30,)),
        ("2x16GiB,24GiB", (16 * 2**30, 16 * 2**30, 24 * 2**30)),
        ("none", ()),
        ("0", ()),
    ],
)
def test_gpu_lists_are_read(text: str, expected: tuple[int, ...]):
    assert parse_gpus(text) == expected


@pytest.mark.parametrize(
    "text", ["3x", "x16GiB", "0x16GiB", "9999x1GiB", "99999999999x1GiB", "3x16GiB,", ",", "3 GPUs"]
)
def test_nonsense_gpu_lists_are_refused(text: str):
    with pytest.raises(UsageError):
        parse_gpus(text)


@given(st.integers(1, 2**59))
def test_a_printed_size_reads_back_within_its_digits(value: int):
    assert parse_bytes(format_bytes(value)) == pytest.approx(value, rel=0.006)


def test_tables_align():
    assert text_table(["a", "bytes"], [["x", "10"], ["long", "9"]], "lr") == (
        "a     bytes\n----  -----\nx        10\nlong      9"
    )
    assert text_fields([("a", "1"), ("bcd", "2")]) == "  a    1\n  bcd  2"
