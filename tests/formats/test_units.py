"""Sizes: one grammar everywhere."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from krasis.formats.errors import UsageError
from krasis.formats.units import MAX_BYTES, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("14GiB", 14 << 30),
        ("14 gib", 14 << 30),
        ("14 GB", 14 * 10**9),
        ("14G", 14 << 30),
        ("2Gi", 2 << 30),
        ("1.5T", 3 << 39),
        ("1.5TB", 1_500_000_000_000),
        ("512m", 512 << 20),
        ("500kB", 500_000),
        ("500K", 500 << 10),
        ("1P", 1 << 50),
        ("4096", 4096),
        ("4096 B", 4096),
        ("4096 bytes", 4096),
        (" 0.1GB ", 100_000_000),  # exact, not as a float has it
        ("1152921504606846976", MAX_BYTES),
    ],
)
def test_what_is_a_size(text: str, size: int) -> None:
    assert parse_bytes(text, "--x") == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "x",
        "GiB",
        "-1",
        "-1GB",
        "+5",
        "1 GiB 2",
        "nan",
        "inf",
        "1e9",
        "1,5G",
        "1.G",
        ".5G",
        "16GiBs",
        "16 parsecs",
        "5ib",
        "1i",
        "0x10",
        "1_000",
    ],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="--x: not a size"):
        parse_bytes(text, "--x")


@pytest.mark.parametrize(
    "text",
    ["\u0661GB", "1\u00a0G\u200b", "9" * 400, "1." + "3" * 99],
    ids=["arabic", "spaces", "long", "fine"],
)
def test_odd_characters_and_long_numbers_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--x: not a size"):
        parse_bytes(text, "--x")


@pytest.mark.parametrize("text", ["0", "0.5", "0GiB", "2048P", "1152921504606846977", "9" * 30 + "T"])
def test_what_is_out_of_range(text: str) -> None:
    with pytest.raises(UsageError, match="--x: size is out of range"):
        parse_bytes(text, "--x")


@given(st.integers(1, 2**59))
def test_printed_sizes_are_read(value: int) -> None:
    assert parse_bytes(format_bytes(value)) == pytest.approx(value, rel=0.006)


@pytest.mark.parametrize("text", ["14 quarts", "-5", "1,5G"])
def test_every_option_reads_the_same_grammar(text: str) -> None:
    from krasis.convert.cli import main as convert
    from krasis.runtime.cli.info_command import main as info
    from krasis.runtime.cli.run import main as run

    for command, option, others in (
        (convert, "--shard-size", ["/nowhere", "-o", "/nowhere/x"]),
        (convert, "--memory-limit", ["/nowhere", "-o", "/nowhere/x"]),
        (run, "--vram", ["/nowhere", "--prompt", "x"]),
        (info, "--ram", ["--plan", "--shape", "qwen3-235b-a22b"]),
    ):
        result = CliRunner().invoke(command, [*others, f"{option}={text}"])
        assert result.exit_code == 2, result.output
        assert f"{option}: not a size (got {text!r})" in result.stderr
