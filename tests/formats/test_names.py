import pytest

from krasis.formats.errors import FormatError
from krasis.formats.names import check_file_name, check_tensor_name, shown


@pytest.mark.parametrize("name", ["a", "model-00001-of-00002.safetensors", "..a", "ä b", "x" * 255])
def test_plain_names_pass(name):
    assert check_file_name(name, "x") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "/etc/passwd",
        "../x",
        "a\\b",
        "a\0b",
        "a\nb",
        "\x1b[2J",
        "\ud800",
        "x" * 256,
        "ä" * 128,
    ],
)
def test_other_names_are_refused_where_they_stand(name):
    with pytest.raises(FormatError, match=r"index.json"):
        check_file_name(name, "index.json")


def test_tensor_names_may_have_slashes_but_are_bounded():
    assert check_tensor_name("a/b", "x") == "a/b"
    with pytest.raises(FormatError, match="512"):
        check_tensor_name("x" * 513, "x")


def test_shown_names_are_escaped_and_cut():
    assert shown("a\x1b[2J") == "'a\\x1b[2J'"
    assert len(shown("x" * 10_000)) < 120
    assert shown([1, 2]) == "list [1, 2]"
