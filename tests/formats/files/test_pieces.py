"""Raw pieces of a cut file, by their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from krasis.formats.errors import FormatError
from krasis.formats.files.pieces import piece_of, pieces_among, pieces_error, refuse_piece


@pytest.mark.parametrize(
    ("name", "number", "count"),
    [
        ("m.gguf.part1of2", 1, 2),
        ("m.Q8_0.gguf.part02of10", 2, 10),
        ("m.gguf.part-2-of-3", 2, 3),
        ("m.gguf-split-a", 0, 0),
        ("m.gguf-split-b", 1, 0),
        ("m.gguf.part.aa", 0, 0),
        ("m.gguf.part_aab", 1, 0),
        ("m.gguf.ab", 1, 0),
        ("m.gguf.001", 1, 0),
        ("m.gguf.part3", 3, 0),
        ("model.safetensors.part1of2", 1, 2),
        ("M.GGUF.Part1of2", 1, 2),
    ],
)
def test_names_of_pieces(name: str, number: int, count: int) -> None:
    piece = piece_of(name)
    assert piece is not None
    assert (piece.number, piece.count) == (number, count)
    assert piece.whole == name[: name.lower().index("gguf" if "gguf" in name.lower() else "safetensors")] + (
        "GGUF" if "GGUF" in name else "gguf" if "gguf" in name else "safetensors"
    )


@pytest.mark.parametrize(
    "name",
    [
        "m.gguf",
        "m-00001-of-00003.gguf",
        "m.gguf.bak",
        "m.gguf.gz",
        "m.gguf.xz",
        "m.gguf.sha256",
        "m.gguf.json",
        "part1of2",
        "m.gguf.part1of",
    ],
)
def test_other_names(name: str) -> None:
    assert piece_of(name) is None


def test_a_lone_name_with_a_number_is_no_piece(tmp_path: Path) -> None:
    assert pieces_among(["m.gguf", "m.gguf.1"]) == {}
    (tmp_path / "m.gguf.1").touch()
    refuse_piece(tmp_path / "m.gguf.1")


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["m.gguf.part2of2", "m.gguf.part1of2"], ["cat m.gguf.part1of2 m.gguf.part2of2 > m.gguf"]),
        (["m.gguf.part10of10"], ["pieces 1, 2, 3, 4, 5, 6, ... of 10 are missing"]),
        (["m.gguf.part1of3", "m.gguf.part3of3"], ["piece 2 of 3 is missing", "download all"]),
        (["m.gguf-split-a"], ["others are missing"]),
        (["m.gguf-split-b", "m.gguf-split-a"], ["cat m.gguf-split-a m.gguf-split-b > m.gguf"]),
        (["m.gguf-split-c", "m.gguf-split-a"], ["piece 1 is missing"]),
        (["m.gguf.000", "m.gguf.001"], ["cat m.gguf.000 m.gguf.001 >"]),
        (["m.gguf.002", "m.gguf.003"], ["piece 1 is missing"]),
        (["my model.gguf.part1of2", "my model.gguf.part2of2"], ["cat 'my model.gguf.part1of2' 'my"]),
        (
            [f"m.gguf.part{i}of12" for i in range(1, 13)],
            ["12 raw pieces", "cat m.gguf.part1of12 ... m.gguf.part12of12"],
        ),
    ],
)
def test_the_sentence_says_how_to_join_or_what_is_missing(
    tmp_path: Path, names: list[str], parts: list[str]
) -> None:
    for name in names:
        (tmp_path / name).touch()
    (pieces,) = pieces_among(names).values()
    sentence = str(pieces_error(tmp_path, pieces))
    for part in parts:
        assert part in sentence
    with pytest.raises(FormatError) as caught:
        refuse_piece(tmp_path / names[0])
    assert str(caught.value) == sentence
